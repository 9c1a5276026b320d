"""A LoRA adapter's folder, ours or PEFT's own: which matrices it changes and what else it was trained with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft

from qlora_dist.adapters.check import check_kind
from qlora_dist.adapters.names import PREFIX, plain_name
from qlora_dist.errors import UserError
from qlora_dist.nf4.safetensors_file import Entry, read_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LOW_RANK = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # in the order in which PEFT wraps them


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix."""

    a: Entry
    """[r, in_features]; of experts [experts * r, in_features], an expert's rows together."""
    b: Entry
    """[out_features, r]; of experts [out_features, r * experts], an expert's columns `experts` apart."""
    rank: int
    alpha: float
    scaling: float
    """alpha / r, or alpha / sqrt(r) of rsLoRA."""
    magnitude: Entry | None
    """DoRA's, [out_features]; None: plain LoRA."""
    experts: int = 0
    """That have a pair of matrices each (`peft.tuners.lora.layer.ParamWrapper`); 0: a linear layer."""
    swapped: bool = False
    """Of experts whose inputs PEFT takes for their outputs (`lora_experts.is_swapped`)."""

    def parts(self) -> dict[str, Entry]:
        """The tensors, by the names that they have within a layer of PEFT's."""
        parts = {"lora_A": self.a, "lora_B": self.b}
        return parts if self.magnitude is None else {**parts, "lora_magnitude_vector": self.magnitude}


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes."""

    path: Path
    base: str
    """The folder that it was trained on, as its configuration names it; may be empty."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """By the name that the module, or the parameter of experts, has in transformers' class."""
    whole: dict[str, Entry] = field(default_factory=dict)
    """Trained whole (`modules_to_save`, biases), by the parameter's name."""

    def layers_as_parameters(self) -> list[str]:
        """The linear layers that the configuration names by their parameter `weight`."""
        parameters = sorted(self.config.get("target_parameters") or ())
        return [module for module in self.low_rank if _is_any_end(parameters, f"{module}.weight")]

    def peft_config(self) -> peft.LoraConfig:
        """What PEFT's layers need to know to compute with it."""
        return peft.LoraConfig(
            use_rslora=bool(self.config.get("use_rslora")),
            use_dora=bool(self.config.get("use_dora")),
            target_modules=[],
            task_type="CAUSAL_LM",
        )


def read_saved_adapter(path: Path) -> Adapter:
    """Read a folder's configuration and its file's header.

    Raises:
        UserError: it is no folder of a LoRA adapter, something is missing or of the wrong shape, or it has something
            that is not known here.
    """
    config = read_adapter_config(path)
    check_kind(config, path)
    entries = read_header(path / TENSORS)
    parts: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = key.removeprefix(PREFIX)
        if match := _LOW_RANK.match(name):
            parts.setdefault(match["module"], {})[match["part"]] = entry
        elif ".lora_embedding_" in name:
            raise UserError(
                f"{path}: has LoRA on an embedding ({name.partition('.lora_')[0]}), which is not known here; merge it "
                "with PEFT, or train the embedding whole (lora.modules_to_save)"
            )
        elif name == key or "lora_" in name:
            raise UserError(f"{path}: holds {key}, which is not known here; only LoRA of linear layers and experts is")
        elif ".original_module." not in name:  # PEFT keeps the base's rows beside those of a resized embedding
            # a bias of a layer that has an update too; an embedding that was resized, as PEFT names it then
            whole[plain_name(key)] = entry
    if not parts and not whole:
        raise UserError(f"{path / TENSORS}: holds no tensors of an adapter; export the adapter again")
    low_rank = {}
    for module, found in parts.items():
        parameter = _parameter_of_experts(module, config)
        low_rank[parameter or module] = _low_rank(parameter or module, found, config, path, parameter is not None)
    return Adapter(path, str(config.get("base_model_name_or_path") or ""), config, low_rank, whole)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        UserError: the folder is missing or is no adapter's, with what it is in its place.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of an adapter, such as runs/NAME/adapter")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: holds no {CONFIG}; {_hint(path)}")
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG}: cannot be read as JSON ({error}); export the adapter again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path / CONFIG}: holds no JSON object; export the adapter again")
    if not (path / TENSORS).is_file():
        if (path / "adapter_model.bin").exists():
            raise UserError(
                f"{path}: holds adapter_model.bin, which may run code on loading, and no {TENSORS}; load it with PEFT "
                "and save it again"
            )
        raise UserError(f"{path}: holds no {TENSORS}; copy the folder again, or export the adapter again")
    return content


def lacks(adapter: Adapter, module: str, base: Path) -> UserError:
    """The error about a matrix that an adapter changes and a model lacks."""
    if _ONE_EXPERT.search(module):
        return UserError(
            f"{adapter.path}: adapts {module}, one expert's layer as transformers 4 had it; load the adapter with PEFT "
            "(PeftModel.from_pretrained) and save it again (save_pretrained), which puts the experts together"
        )
    return UserError(f"{adapter.path}: adapts {module}, which {base} lacks; give the model that it was trained on")


def _hint(path: Path) -> str:
    """Where the adapter is that was meant, as far as that can be seen."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if path.parent.name == "checkpoints" or (path / "manifest.json").is_file():
        if (run / "adapter" / CONFIG).is_file():
            return f"a checkpoint is no adapter; give {run / 'adapter'}"
        return "a checkpoint is no adapter; finish the run, which writes one"
    if (path / "adapter" / CONFIG).is_file():
        return f"give {path / 'adapter'}"
    if (path / "checkpoints").is_dir():
        return "the run has written no adapter yet; finish it"
    if (path / "config.json").is_file():
        return "that is a model's folder; give that of an adapter, such as runs/NAME/adapter"
    return "give the folder of an adapter, such as runs/NAME/adapter"


def _parameter_of_experts(module: str, config: Mapping[str, Any]) -> str | None:
    """The parameter that PEFT has adapted where it names only a module of experts; None: it is a linear layer.

    PEFT wraps the module once for each parameter, those into the experts before those out of them. The outermost
    wrapper has the module's name, the others that of a `base_layer` each.
    """
    owner, inner = re.fullmatch(r"(.*?)((?:\.base_layer)*)", module).groups()  # type: ignore[union-attr]
    parameters = sorted(config.get("target_parameters") or ())
    if not inner and (_is_module(owner, config.get("target_modules")) or _is_any_end(parameters, f"{owner}.weight")):
        return None
    own = [name for name in _EXPERTS if _is_any_end(parameters, f"{owner}.{name}")]  # outwards
    return f"{owner}.{own[-1 - inner.count('.')]}" if inner.count(".") < len(own) else None


def _is_module(path: str, targets: str | Sequence[str] | None) -> bool:
    """Whether PEFT's `target_modules` name a module, which is a linear layer then."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return _is_any_end(targets or (), path)


def _is_any_end(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


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
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, rank, alpha, scaling, magnitude, count if experts else 0)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule (`peft.utils.other.get_pattern_key`): the first pattern that is the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
