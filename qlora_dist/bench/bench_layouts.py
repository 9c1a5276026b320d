"""The layouts by name: what each changes in a configuration, and on which numbers of ranks it can be."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from qlora_dist.config.config_file import apply_changes
from qlora_dist.config.schema import Config
from qlora_dist.data.dataloader import gradient_accumulation
from qlora_dist.errors import UserError

RESIDENT_DIVISOR = 4
"""Of what is paged, the n-th part is on the device."""
_MIN_PAGE_BYTES = 4096
_ALIGNMENT = 16  # bytes, of a parameter in a page


@dataclass(frozen=True)
class ModelBytes:
    """Of the model, in bytes, on one rank."""

    layers: list[int]
    """The frozen part of each decoder layer."""
    moments: int
    """Of the optimizer, in 32 bit."""


@dataclass(frozen=True)
class BenchCase:
    """A layout on a number of ranks."""

    layout: str
    ranks: int
    config: Config
    """The whole of it."""
    overrides: dict[str, Any]
    """What the layout changes, by `section.key`."""

    @property
    def words(self) -> str:
        """For people."""
        return layout_label(self.layout, self.ranks)

    @property
    def name(self) -> str:
        """Of its runs."""
        return f"{self.layout}-{self.ranks}"


def layout_label(layout: str, ranks: int) -> str:
    """For people."""
    return f"{layout} on {ranks} {'rank' if ranks == 1 else 'ranks'}"


Sections = dict[str, dict[str, Any]]
LayoutBuilder = Callable[[Config, int, ModelBytes], Sections | str]
"""What it changes, or why there is no such layout."""


def _single_paged(config: Config, ranks: int, sizes: ModelBytes) -> Sections | str:
    """One device that has room for a part of the layers and of the optimizer's states."""
    least, total = 2 * max(sizes.layers), sum(sizes.layers)
    if least >= total:
        return f"a model of {len(sizes.layers)} layers has none that could be paged"
    in_8_bit = config.optim.name in ("adamw-8bit", "paged-adamw-8bit")
    moments = sizes.moments // 4 if in_8_bit else sizes.moments
    page = max(_MIN_PAGE_BYTES, -(-moments // (2 * RESIDENT_DIVISOR) // _MIN_PAGE_BYTES) * _MIN_PAGE_BYTES)
    return {
        "parallel": {"engine": "fsdp2", "base": "paged", "resident_bytes": max(least, total // RESIDENT_DIVISOR)},
        # resident_bytes: two pages
        "optim": {"name": f"paged-adamw-{'8' if in_8_bit else '32'}bit", "resident_bytes": 0, "offload": "none"},
        "paging": {"page_bytes": page, "to": "auto" if config.paging.to == "unified" else config.paging.to},
    }


def _fsdp2(config: Config, ranks: int, sizes: ModelBytes) -> Sections | str:
    """Base and adapters over all ranks."""
    return {"parallel": {"engine": "fsdp2", "base": "world"}, "optim": _non_zero_optimizer(config)}


def _two_mesh(config: Config, ranks: int, sizes: ModelBytes) -> Sections | str:
    """The base over nodes of half the ranks each, the adapters over all."""
    if ranks % 2:
        return "two nodes need an even number of ranks"
    return {"parallel": {"engine": "fsdp2", "base": ranks // 2}, "optim": _non_zero_optimizer(config)}


def _zero3(config: Config, ranks: int, sizes: ModelBytes) -> Sections | str:
    """DeepSpeed's ZeRO-3 over all ranks."""
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed; DS_BUILD_OPS=0 pip install 'qlora-dist[zero]'"
    return {"parallel": {"engine": "zero3", "base": "world"}}


LAYOUTS: dict[str, LayoutBuilder] = {
    "single-paged": _single_paged,
    "fsdp2": _fsdp2,
    "two-mesh": _two_mesh,
    "zero3": _zero3,
}
_SINGLE_RANK_LAYOUT = "single-paged"
"""On one rank, whatever the others are on."""


def parse_layout_names(text: str) -> list[str]:
    """The names of `--compare`.

    Raises:
        UserError: there is no layout of a name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--compare: names no layout; give some of {', '.join(LAYOUTS)}")
    for name in names:
        if name not in LAYOUTS:
            near = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LAYOUTS)}"
            raise UserError(f"--compare: {name}: unknown layout; {hint}")
    return names


def parse_rank_counts(text: str) -> list[int]:
    """The numbers of `--ranks`.

    Raises:
        UserError: one of them is none.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--ranks: {text}: should be numbers of ranks such as 1,2,4")
    return sorted({int(word) for word in words})


def make_bench_cases(
    config: Config, names: Sequence[str], ranks: Sequence[int], sizes: ModelBytes
) -> tuple[list[BenchCase], list[tuple[str, int, str]]]:
    """The layouts on their numbers of ranks.

    Args:
        config: what they have in common.
        names: of layouts.
        ranks: of each.
        sizes: of the model.

    Returns:
        Those that there are; and the layout, the ranks and the reason of those that there are not.

    Raises:
        UserError: the global batch cannot be dealt out to so many ranks.
    """
    for number in sorted({1, *ranks} if _SINGLE_RANK_LAYOUT in names else ranks):
        gradient_accumulation(config.train.global_batch, config.train.micro_batch, number)
    cells, skipped = [], []
    for name in names:
        for number in [1] if name == _SINGLE_RANK_LAYOUT else ranks:
            sections = LAYOUTS[name](config, number, sizes)
            if not isinstance(sections, str):
                sections = {**sections, "parallel": {"adapter": "world", "offload": "none", **sections["parallel"]}}
                sections = {section: keys for section, keys in sections.items() if keys}
                try:
                    case_config = apply_changes(config, sections)
                except ValidationError as error:
                    sections = error.errors()[0]["msg"].removeprefix("Value error, ")
            if isinstance(sections, str):
                skipped.append((name, number, sections))
                continue
            overrides = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
            cells.append(BenchCase(name, number, case_config, overrides))
    return cells, skipped


def count_model_bytes(config: Config) -> ModelBytes:
    """Of the model, from its folder's headers.

    Raises:
        UserError: no such model, or the adapters don't fit it.
    """
    from qlora_dist.model.meta_model import get_decoder_layers
    from qlora_dist.train.run_setup import set_up_model

    _, model, _ = set_up_model(config)
    frozen = [[p.nbytes for p in layer.parameters() if not p.requires_grad] for layer in get_decoder_layers(model)]
    layers = [sum(-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in layer) for layer in frozen]
    return ModelBytes(layers, sum(8 * p.numel() for p in model.parameters() if p.requires_grad))


def _non_zero_optimizer(config: Config) -> dict[str, Any]:
    """The configuration's, unless it is ZeRO's."""
    return {"name": "paged-adamw-32bit", "offload": "none"} if config.optim.name == "zero-adamw" else {}
