"""Plan of which tensors of a folder are quantized, and how."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from qlora_dist.compat.torch import module_parameters
from qlora_dist.compat.transformers import load_model_config
from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.layers.embedding import check_vocab_class
from qlora_dist.model.adapter_check import find_adapter_problem
from qlora_dist.model.buffers import check_meta_buffers
from qlora_dist.model.logit_scale import measure_logit_scale
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_class import keep_language_model, whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import (
    SourceMatrix,
    WeightFormat,
    common_layout,
    has_tied_embeddings,
    quantizable_parameters,
    source_matrices,
)
from qlora_dist.model.weight_reads import find_weight_reads
from qlora_dist.model.weight_sources import find_weight_sources, target_names
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES, NF4Layout, QuantType


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of `quantize_folder`."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    device: str = "cpu"
    file_bytes: int = 5_000_000_000
    """Largest size of a file; a larger tensor gets its own file."""
    min_share: float = 0.9
    """Smallest accepted share of parameters in 4 bit, among those outside unquantized embeddings and output head."""
    embeddings: bool = False
    """Whether to quantize the input embedding and the output head too."""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as '5GB', '500MB' or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--file-size {text}: is no size; write 5GB, 500MB or a number of bytes")
    return size


def parse_quantize_options(
    quant_type: str,
    block_size: int,
    device: str,
    file_size: str,
    min_share: float = 0.9,
    *,
    double_quant: bool,
    embeddings: bool = False,
) -> QuantizeOptions:
    """Check the options of the command line."""
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"--quant-type {quant_type}: choose nf4 or fp4")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use cpu or auto")
    if not 0 <= min_share <= 1:
        raise UserError(f"--min-share {min_share}: is not a share; write a number from 0 to 1")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return QuantizeOptions(
        quant_type=cast(QuantType, quant_type),  # one of the two, as checked above
        block_size=block_size,
        double_quant=double_quant,
        device=device,
        file_bytes=parse_size(file_size),
        min_share=min_share,
        embeddings=embeddings,
    )


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of parameters in a quantized folder."""

    parameters: int
    quantized: int
    unquantized_embeddings: int
    """Parameters of embeddings and output head that stay unquantized."""
    unquantized: dict[str, int]
    """Parameters of each tensor that is not quantized, by name without layer numbers."""
    towers: int = 0
    """Parameters of a multimodal model outside its language model. They are copied and count nowhere else."""
    embeddings: frozenset[str] = frozenset()
    """Names in `unquantized` of embeddings and output head."""
    unused: int = 0
    """Elements of tensors that transformers does not load, such as layers that predict further tokens. They are copied
    and do not count as parameters."""

    @property
    def quantized_share(self) -> float:
        """Share of parameters in 4 bit, among those outside unquantized embeddings and output head."""
        return self.quantized / max(1, self.parameters - self.unquantized_embeddings)

    @property
    def largest_unquantized(self) -> list[str]:
        """Names of the three largest tensors that lower `quantized_share`."""
        others = Counter({name: count for name, count in self.unquantized.items() if name not in self.embeddings})
        return [name for name, _ in others.most_common(3)]


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """Treatment of each tensor of a folder."""

    weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]]
    """Matrices to quantize in each tensor, by the tensor's name; an empty list: the tensor is copied."""
    skip_modules: list[str]
    """Modules outside the decoder that stay unquantized, by name in transformers' class."""
    counts: ParameterCounts
    towers: tuple[str, ...]
    """Parts of a multimodal class besides its language model, whose tensors are copied."""
    unused: tuple[str, ...] = ()
    """The outermost modules whose tensors transformers does not load."""
    adapter_problem: str | None = None
    """Sentence with which `train` refuses the default `lora.targets`; None if it does not."""
    without_adapter: tuple[str, ...] = ()
    """Quantized layers whose weight the model's code reads itself, so that they get no adapter."""
    unties_head: bool = False
    """Whether the folder holds an output head that differs from the embedding to which config.json ties it."""
    loads_in_transformers: bool = True
    """Whether plain transformers loads the result. It loads neither experts nor embeddings in 4 bit, nor Falcon's
    layers."""


def make_quantize_plan(folder: ModelFolder, options: QuantizeOptions) -> QuantizePlan:
    """Decide on every tensor of a folder."""
    model = whole_model_on_meta(folder, torch.bfloat16)
    targets = target_names(model, folder.names)
    towers = keep_language_model(model, folder.path)
    measure_logit_scale(model)  # refuses a model that cannot be trained now, and not after hours
    sources = find_weight_sources(model, folder.names)
    weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]] = {name: [] for name in folder.names}
    weight_format = WeightFormat(
        quant_type=options.quant_type, block_size=options.block_size, double_quant=options.double_quant
    )
    head_in_4_bit, loads_in_transformers = False, True
    reads, without_adapter = find_weight_reads(model), set()
    for target in quantizable_parameters(model, embeddings=options.embeddings):
        if target.role != "layer":
            check_vocab_class(model.get_submodule(target.module))
            head_in_4_bit |= target.role == "head"
        elif target.module in reads:
            without_adapter.add(_without_numbers(target.module))
        plain = target.role == "layer" and not target.experts
        loads_in_transformers &= plain and not isinstance(model.get_submodule(target.module), FalconLinear)
        parts = source_matrices(target, sources, folder)
        layout = common_layout(parts, target, folder, weight_format)
        assert isinstance(layout, NF4Layout), "without keep_format"
        for matrix in parts:
            weights[matrix.key].append((matrix, layout))
    model_config = ModelConfig(
        base=str(folder.path),
        quant_type=options.quant_type,
        block_size=options.block_size,  # type: ignore[arg-type]  # pydantic checks it
        double_quant=options.double_quant,
        embeddings="4bit" if options.embeddings else "16bit",
    )
    trained_model = build_meta_model(folder, model_config)
    check_meta_buffers(trained_model)  # both refuse now what training would refuse
    head = model.get_output_embeddings()
    outside, head_name = set(), ""
    for path, module in model.named_modules():
        if module is head:
            head_name = path
        if module is head or isinstance(module, nn.Embedding):
            names = [f"{path}.{name}" for name in module_parameters(module)]
            outside |= {key for name in names if name in sources for key in sources[name].keys}
    if has_tied_embeddings(model):  # the folder may store a head that equals the embedding
        for key in sources[f"{head_name}.weight"].keys if f"{head_name}.weight" in sources else ():
            weights.pop(key)
    outside = {key for key in outside if key in weights and not weights[key]}
    used = {key for source in sources.values() for key in source.keys}
    in_towers = {key for key, name in targets.items() if key not in used and towers.holds(name)}
    buffers = {key for name, _ in model.named_buffers() if name in sources for key in sources[name].keys}
    published = load_model_config(folder.config_folder)
    ties, tied = (
        [getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())]
        for config in (published, model.config)
    )
    return QuantizePlan(
        weights=weights,
        skip_modules=sorted({*towers.paths, *(() if head_in_4_bit else (head_name, "lm_head"))}),
        counts=_count(
            folder, {name: parts for name, parts in weights.items() if name not in buffers}, outside, used, in_towers
        ),
        towers=towers.paths,
        unused=_outermost_unused(weights, used | in_towers),
        without_adapter=tuple(sorted(without_adapter)),
        adapter_problem=find_adapter_problem(trained_model, folder),
        unties_head=ties != tied,
        loads_in_transformers=loads_in_transformers,
    )


def _count(
    folder: ModelFolder,
    weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]],
    outside: set[str],
    used: set[str],
    in_towers: set[str],
) -> ParameterCounts:
    def numel(names: Iterable[str]) -> int:
        return sum(math.prod(folder.shape(name)) for name in names)

    unquantized: Counter[str] = Counter()
    for name, parts in weights.items():
        if not parts and name in used:
            unquantized[_without_numbers(name)] += math.prod(folder.shape(name))
    quantized = sum(layout.numel for parts in weights.values() for _, layout in parts)
    return ParameterCounts(
        parameters=quantized + sum(unquantized.values()),
        quantized=quantized,
        unquantized_embeddings=numel(outside),
        unquantized=dict(unquantized),
        towers=numel(in_towers),
        embeddings=frozenset(_without_numbers(name) for name in outside),
        unused=numel(weights.keys() - used - in_towers),
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _outermost_unused(names: Iterable[str], used: set[str]) -> tuple[str, ...]:
    """Return the shortest prefixes of unused names that no used name has, such as `mtp` or `model.layers.61`."""
    parents = {".".join(parts[:n]) for parts in (name.split(".") for name in used) for n in range(len(parts) + 1)}
    found: dict[str, None] = {}
    for parts in (name.split(".") for name in names if name not in used):
        prefixes = (".".join(parts[: n + 1]) for n in range(len(parts)))
        outermost = next(prefix for prefix in prefixes if prefix not in parents)
        found[re.sub(r"\.\d+(?=\.)", ".*", outermost)] = None  # in the order of the folder
    return tuple(found)
