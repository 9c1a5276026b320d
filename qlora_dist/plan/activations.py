"""Activation memory of a decoder layer: the bytes it saves for backward, and the peaks of both passes.

Every number is read off the code that runs: transformers' layer, `model/attention.py`, `model/norm.py` and
`adapters/lora_matmul.py`. docs/planning.md derives the formulas. `c` is the element size of the compute type in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_dist.plan.kept_format import BYTES_16_BIT
from qlora_dist.plan.layer_spec import LayerSpec, LinearSpec
from qlora_dist.plan.run_spec import RunSpec

FP32_BYTES = 4


@dataclass(frozen=True)
class ImplementationTraits:
    """Traits in which the code of other trainers differs (`benchmarks/published.py`)."""

    copies_attention: bool = True
    """True if attention's output is copied into another order of dimensions."""
    fused_norms: bool = True
    """True if a norm saves its input and a factor per row; false if it saves the input in fp32."""
    keeps_output: bool = False
    """True if a recomputed layer's output is allocated too."""


OWN_IMPLEMENTATION = ImplementationTraits()


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Bytes that a layer allocates for a rank's micro-batch."""

    saved_bytes: int
    """Bytes that forward saves for backward, where the layer is not checkpointed or is being recomputed."""
    forward_peak_bytes: int
    """Bytes on top of the layer's input, at the peak of a forward pass that saves nothing."""
    backward_peak_bytes: int
    """Bytes on top of `saved_bytes` at the peak of backward: gradients and a dequantized weight."""
    forward_weight_bytes: int
    """Bytes of the dequantized weight within `forward_peak_bytes`."""
    backward_weight_bytes: int
    """Bytes of the dequantized weight within `backward_peak_bytes`."""
    last_weight_bytes: int
    """Bytes of the dequantized weight in the last product of forward, when all saved tensors exist."""


def layer_activations(
    run: RunSpec, layer: LayerSpec, traits: ImplementationTraits = OWN_IMPLEMENTATION
) -> LayerActivations:
    forward, forward_weight = max(_forward_peaks(run, layer))
    backward, backward_weight = max(_backward_peaks(run, layer))
    # eager attention saves the soft cap's tanh and the probabilities in fp32, and the latter in the compute type too
    score_bytes = _score_elements(run, layer) * (2 * FP32_BYTES + run.compute_bytes)
    return LayerActivations(
        saved_bytes=run.tokens * saved_bytes_per_token(run, layer, traits) + score_bytes,
        forward_peak_bytes=forward,
        backward_peak_bytes=backward,
        forward_weight_bytes=forward_weight,
        backward_weight_bytes=backward_weight,
        last_weight_bytes=_dequantize_peak_bytes(run, layer.matrices[-1]),
    )


def saved_bytes_per_token(run: RunSpec, layer: LayerSpec, traits: ImplementationTraits = OWN_IMPLEMENTATION) -> int:
    """Return the bytes per token that forward saves for backward."""
    c, a, h = run.compute_bytes, layer.attention, layer.hidden
    norm_element_bytes = c if traits.fused_norms else FP32_BYTES
    total = norm_element_bytes * h * layer.num_norms + (c * h if traits.keeps_output else 0)
    total += FP32_BYTES * layer.num_norms if traits.fused_norms else 0
    total += _saved_lora_inputs(run, layer, copies_attention=run.device == "cuda" and traits.copies_attention)
    q, k, v, o = a.heads * a.qk_head_dim, a.kv_heads * a.qk_head_dim, a.kv_heads * a.v_head_dim, a.heads * a.v_head_dim
    if a.is_eager and a.heads != a.kv_heads:
        k, v = a.heads * a.qk_head_dim, o  # repeated for every head
    total += c * (q + k + v)  # rotated queries and keys; values
    if a.has_qk_norm:
        total += norm_element_bytes * (q + k)
    if not a.is_eager:
        total += FP32_BYTES * a.heads  # log-sum-exp
        total += c * o  # SDPA's output
    if a.latent_ranks is not None:
        q_rank, kv_rank = a.latent_ranks
        # inputs of their norms; values are a view of a tensor that also holds the unrotated part of the keys
        total += norm_element_bytes * (q_rank + kv_rank) + c * a.heads * (a.qk_head_dim - layer.rope_head_dim)
    total += c * 3 * layer.intermediate_size  # gate, its activation, up
    if layer.num_experts_per_tok:
        # gate and up in one tensor, the gate's activation, the experts' outputs, and the weighted outputs
        total += layer.num_experts_per_tok * (
            c * (3 * layer.moe_intermediate_size + h) + _weighted_element_bytes(run, layer) * h
        )
        adapted = [m for m in layer.matrices if m.experts and m.has_lora]
        total += layer.num_experts_per_tok * c * sum(m.in_features + run.model.r for m in adapted)  # inputs, and `A x`
    return total


def _saved_by_mlp(run: RunSpec, layer: LayerSpec) -> int:
    """Return the bytes per token that a dense MLP, or shared experts, save for backward."""
    matrices = tuple(m for m in layer.matrices if not m.experts and m.name in ("gate_proj", "up_proj", "down_proj"))
    lora_inputs = _saved_lora_inputs(run, replace(layer, matrices=matrices), copies_attention=False)
    return run.compute_bytes * 3 * layer.intermediate_size + lora_inputs


def _weighted_element_bytes(run: RunSpec, layer: LayerSpec) -> int:
    """Return the element size of the experts' outputs after the router has weighted them."""
    return FP32_BYTES if layer.has_fp32_router_weights else run.compute_bytes


def _saved_lora_inputs(run: RunSpec, layer: LayerSpec, *, copies_attention: bool) -> int:
    """Return the bytes per token of the adapters' inputs.

    Projections with a common input share it; with dropout each has its own copy. The input of o_proj is SDPA's output,
    unless that is copied into another order of dimensions. Dropout also saves its mask: one byte per element on CUDA,
    the compute type on a CPU.
    """
    c = run.compute_bytes
    adapted = [m for m in layer.matrices if m.has_lora and not m.experts]
    total = sum(c * run.model.r for _ in adapted)
    if run.dropout:
        return total + sum(_saved_lora_input(run, m) for m in adapted)
    shared = {_shared_input_name(m): m.in_features for m in adapted if m.name != "o_proj" or copies_attention}
    return total + sum(c * columns for columns in shared.values())


def _saved_lora_input(run: RunSpec, matrix: LinearSpec) -> int:
    """Return the bytes per token that one projection saves of an input that it shares with no other."""
    if not matrix.has_lora:
        return 0
    mask_bytes = (1 if run.device == "cuda" else run.compute_bytes) if run.dropout else 0
    return (run.compute_bytes + mask_bytes) * matrix.in_features


def _shared_input_name(matrix: LinearSpec) -> str:
    """Return a name that is equal for projections that take the same tensor."""
    for names in (("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")):
        if matrix.name in names:
            return names[0]
    return matrix.name


def _score_elements(run: RunSpec, layer: LayerSpec) -> int:
    """Return the elements of the attention scores; 0 where the kernel never materializes them."""
    return run.micro_batch * layer.attention.heads * run.seq_len**2 if layer.attention.is_eager else 0


def dequantized_weight_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    """Return the bytes of a dequantized matrix; for experts, the bytes of one expert."""
    return run.compute_bytes * matrix.rows * matrix.parts * matrix.in_features


def _dequantize_peak_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    """Return the bytes that dequantizing a matrix allocates.

    Beside the weight these are the temporary fp32 absmax values, or for a published format its values in 16 bit.
    """
    if run.model.keep_format:
        rounded_bytes = BYTES_16_BIT * matrix.rows * matrix.in_features
        return dequantized_weight_bytes(run, matrix) + (rounded_bytes if run.compute_bytes > BYTES_16_BIT else 0)
    layout = run.model.layout(matrix)
    return dequantized_weight_bytes(run, matrix) + (FP32_BYTES * layout.num_blocks if layout.double_quant else 0)


def _forward_peaks(run: RunSpec, layer: LayerSpec) -> Iterator[tuple[int, int]]:
    """Yield the bytes at each candidate for the peak of forward, and the dequantized weight's share of them."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    q, k, v = a.heads * a.qk_head_dim, a.kv_heads * a.qk_head_dim, a.kv_heads * a.v_head_dim
    by_name = {m.name: m for m in layer.matrices if not m.experts}
    yield t * (c * 4 * h + 2 * FP32_BYTES * h), 0  # the norm after attention
    # rotating the queries, of which four copies exist
    yield t * c * (h + 4 * q + k + v), 0
    if "up_proj" in by_name:
        i, dropped = layer.intermediate_size, _dropout_copy_bytes(run, by_name["up_proj"])
        weight = _dequantize_peak_bytes(run, by_name["up_proj"])
        # residual, normed; the gate's activation; up's output
        yield t * (c * (2 * h + 2 * i) + dropped) + weight, weight
        yield t * c * (2 * h + 3 * i), 0
        weight = _dequantize_peak_bytes(run, by_name["down_proj"])
        dropped = _dropout_copy_bytes(run, by_name["down_proj"])
        yield t * (c * (3 * h + i) + dropped) + weight, weight
    if layer.num_experts_per_tok:
        weight = max(_dequantize_peak_bytes(run, m) for m in layer.matrices if m.experts)
        n = layer.num_experts_per_tok
        # residual, normed input, the experts' outputs one by one and concatenated, weighted, and in tokens' order
        yield t * h * (c * (2 + 2 * n) + 3 * n * _weighted_element_bytes(run, layer)), 0
        yield t * c * (2 * h + n * h) + weight, weight
    if a.is_eager:
        # scores, scores divided by the cap, and their tanh
        yield _score_elements(run, layer) * 3 * FP32_BYTES + t * c * (2 * h + 3 * q + k + v), 0


def _dropout_copy_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    return run.compute_bytes * matrix.in_features if run.dropout and matrix.has_lora else 0


def _backward_peaks(run: RunSpec, layer: LayerSpec) -> Iterator[tuple[int, int]]:
    """Yield the bytes on top of the saved ones at each candidate for the peak of backward, and the weight's share."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    down = next((m for m in layer.matrices if m.name == "down_proj" and not m.experts), None)
    if down is not None:
        weight = dequantized_weight_bytes(run, down)
        factors = c * run.model.r * (down.rows + down.in_features) if down.has_lora else 0
        gradients = 2 if run.dropout and down.has_lora else 1
        yield t * c * (h + gradients * layer.intermediate_size + run.model.r) + weight + factors, weight
        # the gradients of the product, of the gate's activation and of up, once the product itself is freed
        product = _saved_lora_input(run, down)
        yield t * (c * (h + 3 * layer.intermediate_size) - product) + factors, 0
    if layer.num_experts_per_tok:
        weight = max(dequantized_weight_bytes(run, m) for m in layer.matrices if m.experts)
        n = layer.num_experts_per_tok
        # at the end of recomputing; shared experts run after the routed ones, so the MLP has saved nothing yet
        yield t * (h * (c * (3 + n) + 2 * n * _weighted_element_bytes(run, layer)) - _saved_by_mlp(run, layer)), 0
        yield t * c * h + weight, weight
    if a.is_eager:
        # the gradients of probabilities and scores, both fp32, once the MLP has freed its saved tensors
        mlp_bytes = c * (3 * layer.intermediate_size + h) + 2 * c * h + (_saved_lora_input(run, down) if down else 0)
        yield _score_elements(run, layer) * (2 * FP32_BYTES - c) - t * (mlp_bytes - 2 * c * h), 0
