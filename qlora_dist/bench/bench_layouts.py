"""The layouts by name: the settings that each changes, and the numbers of ranks on which it exists."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from qlora_dist.bench.bench_result import SkippedLayout
from qlora_dist.config.config_file import ConfigChanges, apply_changes
from qlora_dist.config.schema import Config
from qlora_dist.data.dataloader import gradient_accumulation
from qlora_dist.errors import UserError
from qlora_dist.runtime.byte_sizes import align_bytes

RESIDENT_DIVISOR = 4
"""The resident part of layers and optimizer state that are paged is 1 / RESIDENT_DIVISOR."""
_MIN_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the model on one rank."""

    layers: list[int]
    """Bytes of the frozen part of each decoder layer."""
    moments: int
    """Bytes of the optimizer's 32-bit moments."""


@dataclass(frozen=True)
class BenchCase:
    """A layout on a number of ranks."""

    layout: str
    ranks: int
    config: Config
    """Complete configuration of the layout."""
    overrides: dict[str, Any]
    """Values that the layout changes, by `section.key`."""

    @property
    def label(self) -> str:
        return layout_label(self.layout, self.ranks)

    @property
    def name(self) -> str:
        return f"{self.layout}-{self.ranks}"


def layout_label(layout: str, ranks: int) -> str:
    return f"{layout} on {ranks} {'rank' if ranks == 1 else 'ranks'}"


LayoutBuilder = Callable[[Config, int, ModelBytes], ConfigChanges | str]
"""A function that returns a layout's changes, or the reason why the layout does not exist."""


def _single_paged(config: Config, ranks: int, sizes: ModelBytes) -> ConfigChanges | str:
    """Return the changes for one device that holds a part of the layers and of the optimizer state."""
    least, total = 2 * max(sizes.layers), sum(sizes.layers)
    if least >= total:
        return f"a model of {len(sizes.layers)} layers is too small for paging"
    in_8_bit = config.optim.name in ("adamw-8bit", "paged-adamw-8bit")
    moments = sizes.moments // 4 if in_8_bit else sizes.moments
    page = max(_MIN_PAGE_BYTES, -(-moments // (2 * RESIDENT_DIVISOR) // _MIN_PAGE_BYTES) * _MIN_PAGE_BYTES)
    return {
        "parallel": {"engine": "fsdp2", "base": "paged", "resident_bytes": max(least, total // RESIDENT_DIVISOR)},
        # resident_bytes: two pages
        "optim": {"name": f"paged-adamw-{'8' if in_8_bit else '32'}bit", "resident_bytes": 0, "offload": "none"},
        "paging": {"page_bytes": page, "to": "auto" if config.paging.to == "unified" else config.paging.to},
    }


def _fsdp2(config: Config, ranks: int, sizes: ModelBytes) -> ConfigChanges | str:
    """Return the changes that shard base and adapters over all ranks."""
    return {"parallel": {"engine": "fsdp2", "base": "world"}, "optim": _non_zero_optimizer(config)}


def _two_mesh(config: Config, ranks: int, sizes: ModelBytes) -> ConfigChanges | str:
    """Return the changes that shard the base over each half of the ranks, and the adapters over all."""
    if ranks % 2:
        return "two nodes need an even number of ranks"
    return {"parallel": {"engine": "fsdp2", "base": ranks // 2}, "optim": _non_zero_optimizer(config)}


def _zero3(config: Config, ranks: int, sizes: ModelBytes) -> ConfigChanges | str:
    """Return the changes for DeepSpeed's ZeRO-3 over all ranks."""
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
"""Layout that always runs on one rank."""


def parse_layout_names(text: str) -> list[str]:
    """Return the layouts that `--compare` names."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--compare: names no layout; give some of {', '.join(LAYOUTS)}")
    for name in names:
        if name not in LAYOUTS:
            matches = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.5)
            hint = f"did you mean {matches[0]}?" if matches else f"choose from {', '.join(LAYOUTS)}"
            raise UserError(f"--compare: {name}: unknown layout; {hint}")
    return names


def parse_rank_counts(text: str) -> list[int]:
    """Return the sorted numbers of `--ranks`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--ranks: {text}: should be numbers of ranks such as 1,2,4")
    return sorted({int(word) for word in words})


def make_bench_cases(
    config: Config, names: Sequence[str], ranks: Sequence[int], sizes: ModelBytes
) -> tuple[list[BenchCase], list[SkippedLayout]]:
    """Make the cases of some layouts on some numbers of ranks.

    Returns:
        The cases, and the layouts that do not exist on a number of ranks.

    Raises:
        UserError: the global batch does not divide among a number of ranks.
    """
    for number in sorted({1, *ranks} if _SINGLE_RANK_LAYOUT in names else ranks):
        gradient_accumulation(config.train.global_batch, config.train.micro_batch, number)
    cases, skipped = [], []
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
                skipped.append(SkippedLayout(layout=name, ranks=number, reason=sections))
                continue
            overrides = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
            cases.append(BenchCase(name, number, case_config, overrides))
    return cases, skipped


def count_model_bytes(config: Config) -> ModelBytes:
    """Return the bytes of the model, from the headers of its files.

    Raises:
        UserError: the model does not exist, or the adapters do not fit it.
    """
    from qlora_dist.model.meta_model import get_decoder_layers
    from qlora_dist.train.run_setup import set_up_model

    _, model, _ = set_up_model(config)
    frozen = [[p.nbytes for p in layer.parameters() if not p.requires_grad] for layer in get_decoder_layers(model)]
    layers = [sum(map(align_bytes, layer)) for layer in frozen]
    return ModelBytes(layers, sum(8 * p.numel() for p in model.parameters() if p.requires_grad))


def _non_zero_optimizer(config: Config) -> dict[str, Any]:
    """Return the changes that replace the optimizer of ZeRO; others stay."""
    return {"name": "paged-adamw-32bit", "offload": "none"} if config.optim.name == "zero-adamw" else {}
