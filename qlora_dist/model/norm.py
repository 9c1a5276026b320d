"""RMS norms that save only their input for backward, and compute in chunks that fit in a processor's cache.

transformers' norms cast their input to fp32. Autograd then saves the cast input and the normed fp32 values, each twice
as large as the input. Here autograd saves a factor per row and the input, which exists anyway for a layer's first norm.

A norm is replaced only if its outputs on probe inputs equal an `RMSNormKind`'s bit for bit. A norm with a further
argument, such as the gate of Mamba-2 and Qwen3-Next, keeps its class.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.torch import member_names, module_parameters, replace_parameters
from qlora_dist.model.row_chunks import rows_per_chunk

RMSNormKind = Literal["llama", "gemma"]
"""Llama's norm rounds and then scales by w. Gemma's norm scales by 1 + w and then rounds."""

_BLOCK = 2**17  # elements at a time


def fuse_rms_norms(model: PreTrainedModel) -> None:
    """Replace the classes of a model's RMS norms if their kind is known. Parameters and names stay."""
    fused: dict[tuple[Any, ...], type] = {}
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__:
            continue
        norm_class, settings = type(module), _settings(module)
        if settings not in fused:
            kind = _matching_kind(module)
            fused[settings] = (
                type(f"Fused{norm_class.__name__}", (_FusedNorm, norm_class), {"kind": kind}) if kind else norm_class
            )
        module.__class__ = fused[settings]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: RMSNormKind) -> torch.Tensor:
    """Return x[..., h] / sqrt(mean(x^2) + eps), scaled by the frozen weight[h]; differentiable in x.

    The result has x's type. Llama's kind gives the wider type of x and weight.
    """
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps, kind)
    return y


if TYPE_CHECKING:
    _Norm = nn.RMSNorm
else:  # a mixin without a base class calls the forward of the class that it is mixed into
    _Norm = object


class _FusedNorm(_Norm):
    kind: RMSNormKind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: [..., h]. The class's own forward runs if it is compiled, or if its weight is trained."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.requires_grad:
            return super().forward(x)
        return rms_norm(x, weight, _eps(self), self.kind)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: RMSNormKind) -> torch.Tensor:
        rows, ctx.kind = x.reshape(-1, x.shape[-1]), kind
        dtype = torch.promote_types(x.dtype, weight.dtype) if kind == "llama" else x.dtype
        y, factors = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(len(rows), 1, dtype=torch.float32)
        scale = _scale(weight, kind)
        for part, out, factor in _row_chunks(rows, y, factors):
            values = part.float()
            torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps, out=factor)
            normed = values * factor
            out.copy_((normed.to(x.dtype) if kind == "llama" else normed) * scale)
        ctx.save_for_backward(x, weight, factors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight, factors = ctx.saved_tensors
        rows, scale = x.reshape(-1, x.shape[-1]), _scale(weight, ctx.kind)
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for grad, part, factor, out in _row_chunks(grads[0].reshape(rows.shape), rows, factors, result):
            normed = part.float() * factor
            grad_normed = (grad * scale).float()
            # d/dx of x f, with f = 1 / sqrt(mean(x^2) + eps): f (g - n mean(g n)), n = x f
            projection = (grad_normed * normed).mean(-1, keepdim=True)
            out.copy_(grad_normed.addcmul_(normed, projection, value=-1).mul_(factor))
        return result.view(x.shape), None, None, None


def _scale(weight: torch.Tensor, kind: RMSNormKind) -> torch.Tensor:
    return weight if kind == "llama" else 1.0 + weight.float()


def _row_chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield chunks of the tensors' rows, with up to `_BLOCK` elements of the first tensor."""
    size = rows_per_chunk(tensors[0], _BLOCK)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _eps(module: Any) -> float:
    variance_epsilon = getattr(module, "variance_epsilon", None)
    eps: float = module.eps if variance_epsilon is None else variance_epsilon
    return eps


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return what determines a norm's result besides its weight's values. Equal modules are probed once."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    shapes = {name: None if p is None else tuple(p.shape) for name, p in module_parameters(module).items()}
    return type(module), tuple(sorted(own.items())), tuple(sorted(shapes.items()))


def _matching_kind(module: nn.Module) -> RMSNormKind | None:
    """Return the kind whose results equal the module's on probe inputs; None: keep the class."""
    names = member_names(module)
    weight = module_parameters(module).get("weight")
    if names != ["weight"] or weight is None or weight.dim() != 1 or not _takes_hidden_states_alone(module):
        return None
    if not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return None
    generator = torch.Generator().manual_seed(0)
    kinds: set[RMSNormKind] = set(get_args(RMSNormKind))
    for dtype in (torch.float32, torch.bfloat16):
        x, values = (torch.randn(*shape, weight.numel(), generator=generator).to(dtype) for shape in ((2, 3), ()))
        probe = copy.copy(module)
        replace_parameters(probe, {"weight": nn.Parameter(values, requires_grad=False)})
        with torch.no_grad():
            try:
                expected = probe(x)
            except Exception:  # the model's code may raise any kind; its class stays
                return None
            kinds = {kind for kind in kinds if torch.equal(rms_norm(x, values, _eps(module), kind), expected)}
    return next(iter(kinds)) if len(kinds) == 1 else None


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
