"""A LoRA adapter in PEFT's folder: what it changes, checked before anything is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_dist.adapters.check import check_kind, wrong_values
from qlora_dist.adapters.names import PREFIX, plain_name
from qlora_dist.errors import UserError
from qlora_dist.model.folder import read_json
from qlora_dist.model.matrices import EXPERT_WEIGHTS
from qlora_dist.nf4.safetensors_file import Entry, Reader, read_header

_LOW_RANK = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix."""

    a: Entry
    """[r, in_features]; of experts [experts * r, in_features], an expert's rows together."""
    b: Entry
    """[out_features, r]; of experts [out_features, r * experts], an expert's columns `experts` apart."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) of rsLoRA."""
    magnitude: Entry | None
    """DoRA's, [out_features]; None: plain LoRA."""
    experts: int = 0
    """That have a pair of matrices each (`peft.tuners.lora.layer.ParamWrapper`); 0: a linear layer."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes."""

    path: Path
    base: str
    """The folder that it was trained on, as its configuration names it."""
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """By the module's name in transformers' class."""
    whole: dict[str, Entry] = field(default_factory=dict)
    """Trained whole (`modules_to_save`, biases), by the parameter's name."""


def read_adapter(path: Path) -> Adapter:
    """Read a folder's configuration and its file's header, and look at every value once.

    Raises:
        UserError: it is no LoRA adapter, something is missing, of the wrong shape or not finite, it changes nothing
            because every B is zero, or it has something that is not merged here.
    """
    config = read_json(path / "adapter_config.json")
    check_kind(config, path)
    entries = read_header(path / "adapter_model.safetensors")
    parts: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = key.removeprefix(PREFIX)
        if match := _LOW_RANK.match(name):
            parts.setdefault(match["module"], {})[match["part"]] = entry
        elif name == key or "lora_" in name:
            raise UserError(f"{path}: holds {key}, which is not merged here; only LoRA of linear layers is")
        elif ".original_module." not in name:  # PEFT keeps the base's rows beside those of a resized embedding
            # a bias of a layer that has an update too; an embedding that was resized, as PEFT names it then
            whole[plain_name(key)] = entry
    low_rank = {}
    for module, found in parts.items():
        parameter = _parameter_of_experts(module, config)
        low_rank[parameter or module] = _low_rank(module, found, config, path, experts=parameter is not None)
    with Reader() as reader:
        wrong = wrong_values((key, reader.read(entry)) for key, entry in entries.items())
    if wrong is not None:
        raise UserError(f"{path}: {wrong}; use an earlier checkpoint, or train longer")
    return Adapter(path, str(config.get("base_model_name_or_path") or ""), low_rank, whole)


def _parameter_of_experts(module: str, config: Mapping[str, Any]) -> str | None:
    """The parameter that PEFT has adapted where it names only a module of experts; None: it is a linear layer.

    PEFT wraps the module once for each parameter, those into the experts before those out of them. The outermost
    wrapper has the module's name, the others that of a `base_layer` each.
    """
    owner, inner = re.fullmatch(r"(.*?)((?:\.base_layer)*)", module).groups()  # type: ignore[union-attr]
    targets = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    own = {name for path, _, name in targets if owner == path or owner.endswith(f".{path}")}
    if not own:
        return None
    outwards = [name for name in EXPERT_WEIGHTS if name in own]
    return f"{owner}.{outwards[-1 - inner.count('.')]}"


def _low_rank(module: str, found: Mapping[str, Entry], config: Mapping[str, Any], path: Path, experts: bool) -> LowRank:
    a, b, magnitude = (found.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    if a is None or b is None or (magnitude is None) == bool(config.get("use_dora")):
        missing = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
        raise UserError(f"{path}: {module} lacks its {missing}, or has it without need; export the adapter again")
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    count = a.shape[0] // rank if experts else 1
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == count * rank > 0:
        raise UserError(f"{path}: {module} has A {a.shape} and B {b.shape} for rank {rank}; export the adapter again")
    return LowRank(
        a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude, count if experts else 0
    )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule (`peft.utils.other.get_pattern_key`): the first pattern that is the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def update_rows(weight: torch.Tensor, update: Values, first: int) -> torch.Tensor:
    """Rows of the merged matrix.

    Args:
        weight: fp32[n, in_features], rows `first` to `first + n` of the base's.
        update: what is added.
        first: number of the first row.

    Returns:
        fp32[n, in_features]: W + s B A, and of DoRA m (W + s B A) / |W + s B A|, norms by row (arXiv:2402.09353,
        equation 5).
    """
    rows = slice(first, first + weight.shape[0])
    merged = torch.addmm(weight, update.b[rows], update.a, alpha=update.scaling)
    if update.magnitude is not None:
        merged *= (update.magnitude[rows] / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged


@dataclass(frozen=True)
class Values:
    """A `LowRank` that has been read, in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None


def read_values(update: LowRank, reader: Reader) -> Values:
    """The tensors of an update, those of all experts together."""
    magnitude = None if update.magnitude is None else reader.read(update.magnitude).float().flatten()
    return Values(reader.read(update.a).float(), reader.read(update.b).float(), update.scaling, magnitude)


def expert_values(values: Values, experts: int, expert: int, rows: slice) -> Values:
    """Of those of all experts, what changes some rows of one's matrix."""
    a = values.a.view(experts, -1, values.a.shape[1])[expert]
    b = values.b.view(len(values.b), -1, experts)[rows, :, expert]
    return Values(a, b.contiguous(), values.scaling, None)
