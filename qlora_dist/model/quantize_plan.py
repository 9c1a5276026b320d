"""What is quantized in a folder, and how."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from qlora_dist.compat.torch import module_parameters
from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.model.buffers import check_meta_buffers
from qlora_dist.model.logit_scale import measure_logit_scale
from qlora_dist.model.meta_model import build_meta_model, causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import (
    SourceMatrix,
    common_layout,
    has_tied_embeddings,
    quantizable_parameters,
    source_matrices,
)
from qlora_dist.model.weight_sources import find_weight_sources
from qlora_dist.nf4.embedding import check_vocab_class
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES, NF4Layout, QuantType


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    device: str = "cpu"
    file_bytes: int = 5_000_000_000
    """Largest size of one of the files; a tensor that is larger has a file of its own."""
    min_share: float = 0.9
    """Refuse a model of whose parameters, outside unquantized embeddings and output head, a smaller part would be in
    4 bit."""
    embeddings: bool = False
    """The input embedding and the output head too."""


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' or a plain number.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--file-size {text}: is no size; write 5GB, 500MB or a number of bytes")
    return size


def parse_quantize_options(
    quant_type: str,
    block_size: int,
    double_quant: bool,
    device: str,
    file_size: str,
    min_share: float = 0.9,
    embeddings: bool = False,
) -> QuantizeOptions:
    """Options from the command line.

    Raises:
        UserError: one is out of range.
    """
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"--quant-type {quant_type}: choose nf4 or fp4")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use cpu or auto")
    if not 0 <= min_share <= 1:
        raise UserError(f"--min-share {min_share}: is no part of a whole; write a number from 0 to 1")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    file_bytes = parse_size(file_size)
    kind = cast(QuantType, quant_type)  # one of the two, as checked above
    return QuantizeOptions(kind, block_size, double_quant, device, file_bytes, min_share, embeddings)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a folder once it is quantized."""

    parameters: int
    quantized: int
    unquantized_embeddings: int
    """Of those embeddings, and of the output head if it is one, that are in as many bits as before."""
    left: dict[str, int]
    """Of tensors that stay as they were, by name without layer numbers."""
    unused: int = 0
    """Elements of tensors that transformers does not load, such as layers that predict further tokens. They are copied
    and not among the parameters."""

    @property
    def share(self) -> float:
        """The part of the parameters outside unquantized embeddings and output head that is in 4 bit."""
        return self.quantized / max(1, self.parameters - self.unquantized_embeddings)


@dataclass(frozen=True)
class QuantizePlan:
    """What becomes of each tensor of the folder."""

    weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]]
    """By tensor, the matrices in it that are quantized; none: it is copied."""
    skipped: list[str]
    """Linear layers outside the decoder's that stay as they were, by name in transformers' class."""
    counts: ParameterCounts
    unties_head: bool = False
    """config.json ties the output head to the input embedding, and the folder holds another one."""
    others_load: bool = True
    """Whether plain transformers loads the result: it knows neither experts nor embeddings in 4 bit, nor Falcon's."""


def make_quantize_plan(folder: ModelFolder, options: QuantizeOptions) -> QuantizePlan:
    """Decide on every tensor of a folder.

    Raises:
        UserError: the model cannot be used, or a weight is missing or damaged.
    """
    model = causal_lm_on_meta(folder, torch.bfloat16)
    measure_logit_scale(model)  # a model that cannot be trained is refused here, not after hours
    origins = find_weight_sources(model, folder.entries)
    weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]] = {name: [] for name in folder.entries}
    head_in_4_bit, others_load = False, True
    for target in quantizable_parameters(model, options.embeddings):
        if target.role != "layer":
            check_vocab_class(model.get_submodule(target.module))
            head_in_4_bit |= target.role == "head"
        plain = target.role == "layer" and not target.experts
        others_load &= plain and not isinstance(model.get_submodule(target.module), FalconLinear)
        parts = source_matrices(target, origins, folder)
        layout = common_layout(parts, target, folder, options.quant_type, options.block_size, options.double_quant)
        for matrix in parts:
            weights[matrix.key].append((matrix, layout))
    check_meta_buffers(
        build_meta_model(folder, _model_config(folder, options))
    )  # what training would refuse is refused here
    head = model.get_output_embeddings()
    outside, head_name = set(), ""
    for path, module in model.named_modules():
        if module is head:
            head_name = path
        if module is head or isinstance(module, nn.Embedding):
            names = [f"{path}.{name}" for name in module_parameters(module)]
            outside |= {key for name in names if name in origins for key in origins[name].keys}
    if has_tied_embeddings(model):  # a head that is stored beside an embedding which it equals
        for key in origins[f"{head_name}.weight"].keys if f"{head_name}.weight" in origins else ():
            weights.pop(key)
    outside = {key for key in outside if key in weights and not weights[key]}
    skipped = [] if head_in_4_bit else sorted({head_name, "lm_head"})
    used = {key for origin in origins.values() for key in origin.keys}
    published = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    ties, tied = (getattr(c.get_text_config(), "tie_word_embeddings", False) for c in (published, model.config))
    return QuantizePlan(weights, skipped, _count(folder, weights, outside, used), bool(ties and not tied), others_load)


def _model_config(folder: ModelFolder, options: QuantizeOptions) -> ModelConfig:
    return ModelConfig(
        base=str(folder.path),
        quant_type=options.quant_type,
        block_size=options.block_size,  # type: ignore[arg-type]  # `parse_quantize_options` has checked it, pydantic does again
        double_quant=options.double_quant,
        embeddings="4bit" if options.embeddings else "16bit",
    )


def _count(
    folder: ModelFolder, weights: dict[str, list[tuple[SourceMatrix, NF4Layout]]], outside: set[str], used: set[str]
) -> ParameterCounts:
    left: Counter[str] = Counter()
    for name, parts in weights.items():
        if not parts and name in used:
            left[re.sub(r"\.\d+(?=\.|$)", ".*", name)] += torch.Size(folder.entries[name].shape).numel()
    quantized = sum(layout.numel for parts in weights.values() for _, layout in parts)
    outside_layers = sum(torch.Size(folder.entries[name].shape).numel() for name in outside)
    unused = sum(torch.Size(folder.entries[name].shape).numel() for name in weights if name not in used)
    return ParameterCounts(quantized + sum(left.values()), quantized, outside_layers, dict(left), unused)
