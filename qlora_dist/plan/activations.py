"""What a decoder layer needs for a micro-batch, per token: what it keeps for backward, and its peaks on the way.

Every number is read off the code that runs: transformers' layer, `model/attention.py`, `adapters/lora_matmul.py`.
Derivations: docs/planning.md. c is the number of bytes of the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_dist.plan.layers import Layer, Matrix
from qlora_dist.plan.run import Run

_FP32 = 4


@dataclass(frozen=True)
class LayerMemory:
    """Bytes for a rank's micro-batch."""

    kept: int
    """By the forward pass of a layer that is not checkpointed, or by recomputing one that is."""
    forward: int
    """On top of the layer's input, at the peak of a forward pass that keeps nothing."""
    backward: int
    """On top of `kept`, at the peak of backward: the gradient on its way, and what is dequantized among it."""
    forward_weight: int
    """Of `forward`, the dequantized weight."""
    backward_weight: int
    """Of `backward`, the dequantized weight."""


def layer_memory(run: Run, layer: Layer) -> LayerMemory:
    """Of one layer."""
    kept = run.tokens * kept_per_token(run, layer) + _scores_kept(run, layer)
    forward, forward_weight = max(_forward_peaks(run, layer))
    backward, backward_weight = max(_backward_peaks(run, layer))
    return LayerMemory(kept, forward, backward, forward_weight, backward_weight)


def kept_per_token(run: Run, layer: Layer) -> int:
    """Bytes that backward will need."""
    c, a, h = run.compute_bytes, layer.attention, layer.hidden
    # a norm computes in fp32 and keeps its input as such; one that is fp32 already is the checkpoint itself
    total = _norms_kept(run, layer)
    total += _inputs_kept(run, layer)
    q, k, v, o = a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim, a.heads * a.v_dim
    total += c * (q + k + v)  # rotated queries and keys; values
    if a.normed:
        total += _FP32 * (q + k)
    if not a.by_scores:
        total += _FP32 * a.heads  # logarithms of the sums
        if run.device == "cuda":
            total += c * o  # what SDPA returned; o_proj's input is a copy in another order of dimensions
    if a.latent is not None:
        q_rank, kv_rank = a.latent
        total += _FP32 * (q_rank + kv_rank)
    total += c * 3 * layer.intermediate  # gate, its activation, up
    if layer.experts_per_token:
        # gate and up in one tensor, the gate's activation; what the experts return, before it is weighted
        total += layer.experts_per_token * c * (3 * layer.expert_intermediate + layer.hidden)
        total += c * h if layer.intermediate else 0  # the shared experts' sum
    return total


def _norms_kept(run: Run, layer: Layer) -> int:
    if run.compute_bytes == _FP32:
        return _FP32 * layer.hidden * (layer.norms - 1)
    return _FP32 * layer.hidden * layer.norms


def _inputs_kept(run: Run, layer: Layer) -> int:
    """The inputs of adapters: one for each tensor that several projections take, or a dropped-out copy for each.

    Dropout keeps which elements it left out besides: a byte each on CUDA, on a CPU in the compute type.
    """
    c = run.compute_bytes
    adapted = [m for m in layer.matrices if m.adapted and not m.experts]
    total = sum(c * run.model.r for _ in adapted)
    if run.dropout:
        return total + sum((c + (1 if run.device == "cuda" else c)) * m.columns for m in adapted)
    shared = {_input_of(m): m.columns for m in adapted}
    return total + sum(c * columns for columns in shared.values())


def _input_of(matrix: Matrix) -> str:
    """Projections with an equal answer take the same tensor."""
    for name in (("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")):
        if matrix.name in name:
            return name[0]
    return matrix.name


def _scores_kept(run: Run, layer: Layer) -> int:
    """With a soft cap: its tangent, the probabilities in fp32 and in the compute type, and repeated keys and values."""
    a, c = layer.attention, run.compute_bytes
    if not a.by_scores:
        return 0
    scores = run.micro_batch * a.heads * run.seq_len**2
    repeated = 2 * c * run.tokens * a.heads * a.qk_dim if a.heads != a.kv_heads else 0
    return scores * (2 * c + _FP32) + repeated


def weight_bytes(run: Run, matrix: Matrix) -> int:
    """Of a matrix when it is dequantized; of experts, of one of them."""
    return run.compute_bytes * matrix.rows * matrix.parts * matrix.columns


def _being_dequantized(run: Run, matrix: Matrix) -> int:
    """With the absmax values, which are fp32 for the moment."""
    layout = run.model.layout(matrix)
    return weight_bytes(run, matrix) + (_FP32 * layout.blocks if layout.double_quant else 0)


def _forward_peaks(run: Run, layer: Layer) -> Iterator[tuple[int, int]]:
    """Of a layer that keeps nothing: bytes, and of these the dequantized weight."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    q, k, v = a.heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim
    by_name = {m.name: m for m in layer.matrices if not m.experts}
    yield t * (c * 4 * h + 2 * _FP32 * h), 0  # the norm after attention
    # rotating the queries, which are there four times
    yield t * c * (h + 4 * q + k + v), 0
    if "up_proj" in by_name:
        i, dropped = layer.intermediate, _dropped(run, by_name["up_proj"])
        weight = _being_dequantized(run, by_name["up_proj"])
        # residual, normed; the gate's activation; up's output
        yield t * (c * (2 * h + 2 * i) + dropped) + weight, weight
        yield t * c * (2 * h + 3 * i), 0
        weight = _being_dequantized(run, by_name["down_proj"])
        dropped = _dropped(run, by_name["down_proj"])
        yield t * (c * (3 * h + i) + dropped) + weight, weight
    if layer.experts_per_token:
        weight = max(_being_dequantized(run, m) for m in layer.matrices if m.experts)
        n = layer.experts_per_token
        yield t * c * (2 * h + 3 * n * h) + weight, weight
    if a.by_scores:
        yield run.micro_batch * a.heads * run.seq_len**2 * (2 * _FP32 + c), 0


def _dropped(run: Run, matrix: Matrix) -> int:
    return run.compute_bytes * matrix.columns if run.dropout and matrix.adapted else 0


def _backward_peaks(run: Run, layer: Layer) -> Iterator[tuple[int, int]]:
    """On top of all that is kept."""
    c, t, h, a = run.compute_bytes, run.tokens, layer.hidden, layer.attention
    down = next((m for m in layer.matrices if m.name == "down_proj" and not m.experts), None)
    if down is not None:
        weight = weight_bytes(run, down)
        factors = c * run.model.r * (down.rows + down.columns) if down.adapted else 0
        gradients = 2 if run.dropout and down.adapted else 1
        yield t * c * (h + gradients * layer.intermediate + run.model.r) + weight + factors, weight
        yield t * c * (h + 2 * layer.intermediate) + factors, 0
    if layer.experts_per_token:
        weight = max(weight_bytes(run, m) for m in layer.matrices if m.experts)
        n = layer.experts_per_token
        yield t * c * (h + 2 * n * h + n * layer.expert_intermediate) + weight, weight
    if a.by_scores:
        yield run.micro_batch * a.heads * run.seq_len**2 * (2 * _FP32 + c), 0
