"""What a decoder layer needs for a micro-batch, per token: what it keeps for backward, and its peaks on the way.

Every number is read off the code that runs: transformers' layer, `model/attention.py`, `model/norm.py` and
`adapters/lora_matmul.py`. Derivations: docs/planning.md. c is the number of bytes of the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_dist.plan.layer_spec import LayerSpec, LinearSpec
from qlora_dist.plan.run_spec import RunSpec

_FP32 = 4


@dataclass(frozen=True)
class ImplementationTraits:
    """What differs in the code of other trainers (`benchmarks/published.py`)."""

    copies_attention: bool = True
    """What attention returns is copied into another order of dimensions."""
    fused_norms: bool = True
    """Norms keep their input as it is, and a factor per row; else the input in fp32."""
    keeps_output: bool = False
    """A recomputed layer's output is there too."""


OWN_IMPLEMENTATION = ImplementationTraits()


@dataclass(frozen=True)
class LayerActivations:
    """Bytes for a rank's micro-batch."""

    kept: int
    """By the forward pass of a layer that is not checkpointed, or by recomputing one that is."""
    forward: int
    """On top of the layer's input, at the peak of a forward pass that keeps nothing."""
    backward: int
    """On top of `kept`, at the peak of backward: the gradient on its way, and what is dequantized among it."""
    forward_weight_bytes: int
    """Of `forward`, the dequantized weight."""
    backward_weight_bytes: int
    """Of `backward`, the dequantized weight."""
    last_weight_bytes: int
    """Of the last product of a forward pass, when all that is kept is there."""


def layer_activations(
    run: RunSpec, layer: LayerSpec, traits: ImplementationTraits = OWN_IMPLEMENTATION
) -> LayerActivations:
    """Of one layer."""
    kept = run.tokens * saved_bytes_per_token(run, layer, traits) + _saved_score_bytes(run, layer)
    forward, forward_weight = max(_forward_peaks(run, layer))
    backward, backward_weight = max(_backward_peaks(run, layer))
    last_weight = _dequantize_peak_bytes(run, layer.matrices[-1])
    return LayerActivations(kept, forward, backward, forward_weight, backward_weight, last_weight)


def saved_bytes_per_token(run: RunSpec, layer: LayerSpec, traits: ImplementationTraits = OWN_IMPLEMENTATION) -> int:
    """Bytes that backward will need."""
    c, a, h = run.compute_bytes, layer.attention, layer.hidden
    of_norm = c if traits.fused_norms else _FP32
    total = of_norm * h * layer.num_norms + (c * h if traits.keeps_output else 0)
    total += _FP32 * layer.num_norms if traits.fused_norms else 0
    total += _saved_lora_inputs(run, layer, copies_attention=run.device == "cuda" and traits.copies_attention)
    q, k, v, o = a.heads * a.qk_head_dim, a.kv_heads * a.qk_head_dim, a.kv_heads * a.v_head_dim, a.heads * a.v_head_dim
    if a.is_eager and a.heads != a.kv_heads:
        k, v = a.heads * a.qk_head_dim, o  # repeated for every head
    total += c * (q + k + v)  # rotated queries and keys; values
    if a.has_qk_norm:
        total += of_norm * (q + k)
    if not a.is_eager:
        total += _FP32 * a.heads  # logarithms of the sums
        total += c * o  # what SDPA returned
    if a.latent_ranks is not None:
        q_rank, kv_rank = a.latent_ranks
        # their norms; values are a part of a tensor that the keys' unrotated part is in too
        total += of_norm * (q_rank + kv_rank) + c * a.heads * (a.qk_head_dim - layer.rope_head_dim)
    total += c * 3 * layer.intermediate_size  # gate, its activation, up
    if layer.num_experts_per_tok:
        # gate and up in one tensor, the gate's activation; what the experts return, and that weighted
        total += layer.num_experts_per_tok * (
            c * (3 * layer.moe_intermediate_size + h) + _weighted_element_bytes(run, layer) * h
        )
        adapted = [m for m in layer.matrices if m.experts and m.has_lora]
        total += layer.num_experts_per_tok * c * sum(m.in_features + run.model.r for m in adapted)  # inputs, and `A x`
    return total


def _saved_by_mlp(run: RunSpec, layer: LayerSpec) -> int:
    """Return the bytes per token that backward needs of a dense MLP, or of shared experts."""
    matrices = tuple(m for m in layer.matrices if not m.experts and m.name in ("gate_proj", "up_proj", "down_proj"))
    of_adapters = _saved_lora_inputs(run, replace(layer, matrices=matrices), copies_attention=False)
    return run.compute_bytes * 3 * layer.intermediate_size + of_adapters


def _weighted_element_bytes(run: RunSpec, layer: LayerSpec) -> int:
    """Bytes of an element of what experts return, once it is weighted."""
    return _FP32 if layer.has_fp32_router_weights else run.compute_bytes


def _saved_lora_inputs(run: RunSpec, layer: LayerSpec, copies_attention: bool) -> int:
    """The inputs of adapters: one for each tensor that several projections take, or a dropped-out copy for each.

    That of o_proj is what SDPA returned, unless it is copied into another order of dimensions. Dropout keeps which
    elements it left out besides: a byte each on CUDA, on a CPU in the compute type.
    """
    c = run.compute_bytes
    adapted = [m for m in layer.matrices if m.has_lora and not m.experts]
    total = sum(c * run.model.r for _ in adapted)
    if run.dropout:
        return total + sum(_saved_lora_input(run, m) for m in adapted)
    shared = {_shared_input_name(m): m.in_features for m in adapted if m.name != "o_proj" or copies_attention}
    return total + sum(c * columns for columns in shared.values())


def _saved_lora_input(run: RunSpec, matrix: LinearSpec) -> int:
    """Per token, of one projection that shares its input with no other."""
    if not matrix.has_lora:
        return 0
    kept_mask = (1 if run.device == "cuda" else run.compute_bytes) if run.dropout else 0
    return (run.compute_bytes + kept_mask) * matrix.in_features


def _shared_input_name(matrix: LinearSpec) -> str:
    """Projections with an equal answer take the same tensor."""
    for name in (("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")):
        if matrix.name in name:
            return name[0]
    return matrix.name


def _score_elements(run: RunSpec, layer: LayerSpec) -> int:
    """Elements of the matrix of scores, if there is one."""
    return run.micro_batch * layer.attention.heads * run.seq_len**2 if layer.attention.is_eager else 0


def _saved_score_bytes(run: RunSpec, layer: LayerSpec) -> int:
    """With a soft cap, its tangent, and the probabilities, in fp32 both and the latter in the compute type too."""
    return _score_elements(run, layer) * (2 * _FP32 + run.compute_bytes)


def dequantized_weight_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    """Of a matrix when it is dequantized; of experts, of one of them."""
    return run.compute_bytes * matrix.rows * matrix.parts * matrix.in_features


def _dequantize_peak_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    """With the absmax values, which are fp32 for the moment."""
    layout = run.model.layout(matrix)
    return dequantized_weight_bytes(run, matrix) + (_FP32 * layout.num_blocks if layout.double_quant else 0)


def _forward_peaks(run: RunSpec, layer: LayerSpec) -> Iterator[tuple[int, int]]:
    """Of a layer that keeps nothing: bytes, and of these the dequantized weight."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    q, k, v = a.heads * a.qk_head_dim, a.kv_heads * a.qk_head_dim, a.kv_heads * a.v_head_dim
    by_name = {m.name: m for m in layer.matrices if not m.experts}
    yield t * (c * 4 * h + 2 * _FP32 * h), 0  # the norm after attention
    # rotating the queries, which are there four times
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
        # residual and normed input; what the experts return, in pieces and as one; that weighted, and in tokens' order
        yield t * h * (c * (2 + 2 * n) + 3 * n * _weighted_element_bytes(run, layer)), 0
        yield t * c * (2 * h + n * h) + weight, weight
    if a.is_eager:
        # scores, those divided by the cap, and the tangent
        yield _score_elements(run, layer) * 3 * _FP32 + t * c * (2 * h + 3 * q + k + v), 0


def _dropout_copy_bytes(run: RunSpec, matrix: LinearSpec) -> int:
    return run.compute_bytes * matrix.in_features if run.dropout and matrix.has_lora else 0


def _backward_peaks(run: RunSpec, layer: LayerSpec) -> Iterator[tuple[int, int]]:
    """On top of all that is kept."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    down = next((m for m in layer.matrices if m.name == "down_proj" and not m.experts), None)
    if down is not None:
        weight = dequantized_weight_bytes(run, down)
        factors = c * run.model.r * (down.rows + down.in_features) if down.has_lora else 0
        gradients = 2 if run.dropout and down.has_lora else 1
        yield t * c * (h + gradients * layer.intermediate_size + run.model.r) + weight + factors, weight
        # the gradients of the product, of the gate's activation and of up, when the product itself is gone
        product = _saved_lora_input(run, down)
        yield t * (c * (h + 3 * layer.intermediate_size) - product) + factors, 0
    if layer.num_experts_per_tok:
        weight = max(dequantized_weight_bytes(run, m) for m in layer.matrices if m.experts)
        n = layer.num_experts_per_tok
        # at the end of recomputing: the same, but for what is kept; shared experts have their turn after the others
        yield t * (h * (c * (3 + n) + 2 * n * _weighted_element_bytes(run, layer)) - _saved_by_mlp(run, layer)), 0
        yield t * c * h + weight, weight
    if a.is_eager:
        # the probabilities' gradient and the scores', both fp32, when the MLP has let go of what it kept
        of_mlp = c * (3 * layer.intermediate_size + h) + 2 * c * h + (_saved_lora_input(run, down) if down else 0)
        yield _score_elements(run, layer) * (2 * _FP32 - c) - t * (of_mlp - 2 * c * h), 0
