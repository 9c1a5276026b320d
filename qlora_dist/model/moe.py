"""The forward pass of sparse layers whose experts are in 4 bit.

transformers 5 keeps a projection of all experts in one three-dimensional parameter. Here a QuantizedExperts module
replaces the parameter, and these functions call it for one expert at a time. Everything else, such as the router, is
transformers' own code.
"""

from __future__ import annotations

import types
from typing import Protocol

import torch
from torch import nn

from qlora_dist.compat.transformers import apply_expert_gate, has_expert_gate
from qlora_dist.layers.experts import QuantizedExperts


class SparseExperts(Protocol):
    """Experts in 4 bit of a transformers class that `use_experts_implementation` decorates.

    A class has `gate_up_proj` and `_apply_gate` if `has_gate`, else `up_proj`. Its optional biases are
    `gate_up_proj_bias` or `up_proj_bias`, and `down_proj_bias`, [experts, out_features] each.
    """

    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool
    gate_up_proj: QuantizedExperts
    up_proj: QuantizedExperts
    down_proj: QuantizedExperts

    def act_fn(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return an expert's activation, of the shape of x."""

    def post_expert_norm(self, x: torch.Tensor, /) -> torch.Tensor:
        """Normalize the experts' outputs x: [n, h], if `has_post_expert_norm`."""


def is_moe_experts(module: nn.Module) -> bool:
    """Return whether `replace_experts_forward` can replace the forward pass of a module."""
    return has_expert_gate(module) or _is_llama4(module)


def replace_experts_forward(module: nn.Module) -> None:
    """Replace the forward pass of a module whose projections have become QuantizedExperts."""
    forward = llama4_experts_forward if _is_llama4(module) else experts_forward
    module.forward = types.MethodType(forward, module)


def experts_forward(
    self: SparseExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of the outputs of each token's experts, [tokens, h].

    Source: `transformers.integrations.moe.grouped_mm_experts_forward`. Its grouped matrix product is a loop over the
    experts in use here, so that only one expert is dequantized at a time.

    Args:
        self: experts whose attributes determine what an expert computes.
        hidden_states: [tokens, h].
        top_k_index: int64[tokens, k], the experts of each token; a number past the last expert means none.
        top_k_weights: [tokens, k].
    """
    tokens, k = top_k_index.shape
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=self.num_experts).tolist()
    up_proj = self.gate_up_proj if self.has_gate else self.up_proj
    up, down = up_proj.expert_forward(), self.down_proj.expert_forward()
    up_bias = getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", None)
    down_bias = getattr(self, "down_proj_bias", None)
    outputs = []
    for expert, x in enumerate(hidden_states[order // k].split(counts)):
        if expert >= self.num_experts:
            outputs.append(torch.zeros_like(x))
        elif len(x):
            x = up(x, expert)
            x = x if up_bias is None else x + up_bias[expert]
            x = apply_expert_gate(self, x) if self.has_gate else self.act_fn(x)
            x = down(x, expert)
            outputs.append(x if down_bias is None else x + down_bias[expert])
    output = torch.cat(outputs)
    if self.has_post_expert_norm:
        output = self.post_expert_norm(output)
    weighted = output * top_k_weights.flatten()[order].unsqueeze(1)
    by_token = torch.empty_like(weighted).index_copy(0, order, weighted).view(tokens, k, -1)
    return by_token.sum(dim=1).to(hidden_states.dtype)


def llama4_experts_forward(self: SparseExperts, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the outputs of Llama4TextExperts, each of which receives a weighted copy of every token.

    Input and output are [experts * tokens, h]. Most copies are rows of zeros, because the router did not choose the
    expert. They give zeros, so they are skipped.
    """
    gate_up_proj, down_proj = self.gate_up_proj.expert_forward(), self.down_proj.expert_forward()
    outputs = []
    for expert, x in enumerate(hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])):
        rows = x.detach().any(dim=1).nonzero().squeeze(1)
        gate, up = gate_up_proj(x[rows], expert).chunk(2, dim=-1)
        y = down_proj(up * self.act_fn(gate), expert)
        outputs.append(torch.zeros_like(x).index_copy(0, rows, y))
    return torch.cat(outputs)


def _is_llama4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"
