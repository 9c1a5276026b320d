"""Memory and traffic of a rank's step, traced by running the step on tensors without storage.

The trace checks a plan independently of the formulas. It runs `set_up_model`, `parallelize_fsdp2` and `train_step`
under torch's FakeTensorMode, on the only rank of a fake process group of any size. All allocations
(`trace/live_memory.py`) and all collectives (`parallel/mesh.py`) of that rank are counted.

Only enough layers are traced to see first, last and middle ones. The bytes of each phase, and the bytes sent, are
linear functions of the number of layers, so they are extrapolated. The peak is the largest value for the whole model.
The phase with the largest value depends on depth, so all phases are extrapolated, not the peak.

The trace differs from a GPU in these ways:
- The device is `cpu`, because without a GPU torch aborts the process in the backward of a fake CUDA tensor. There are
  no streams, so a buffer of another stream is never kept longer than its use.
- Attention runs the CUDA path of `model/attention.py` with torch's flash kernel for CPUs. The tensors are equal, except
  for temporaries of CUDA's backward: fp32[d] for each token and head, and keys and values in all heads.
  `model.attention: flex` is traced as `sdpa`.
- Rows are full and all their tokens are trained. A packed row is two sequences, or one with soft-capped scores.
- cuBLAS's workspace, NCCL's buffers, the CUDA context and memory that the allocator keeps are not counted.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_dist.compat.fake_tensors import FakeStore, FakeTensorMode
from qlora_dist.compat.torch import READ_SCALAR, TorchDispatchMode
from qlora_dist.config.schema import Config
from qlora_dist.cpu.cpu_attention import packed_causal_attention_cpu
from qlora_dist.data.collate import Batch
from qlora_dist.data.dataloader import gradient_accumulation
from qlora_dist.data.new_tokens import assume_new_tokens
from qlora_dist.errors import UserError
from qlora_dist.model.attention import AttentionOptions, has_cpu_kernel, sdpa_per_sequence, takes_sequence_starts
from qlora_dist.model.load_weights import materialize
from qlora_dist.model.meta_model import LossModel, get_decoder_layers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.row_chunks import whole_tensors
from qlora_dist.nf4.quantize import nested_code_table
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.adamw_kernels import state_code_tables
from qlora_dist.optim.adapter_shards import AdapterShards, adapter_shard_numels
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.loaded_model import shard_model
from qlora_dist.parallel.mesh import CommCounter
from qlora_dist.plan.phase_memory import StepPhase
from qlora_dist.plan.run_spec import check_equal_nodes
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.trace.fake_checkpoint import FakeCheckpoint, truncate_layers
from qlora_dist.trace.live_memory import LayerPhase, LiveMemory, register_phase_hooks
from qlora_dist.train.run_setup import set_up_model
from qlora_dist.train.train_step import StepContext, train_step

TracedDevice = Literal["cuda", "cpu"]
_CPU = torch.device("cpu")
_MAX_MICRO_BATCHES = 3  # the first, one in the middle, and the last, which communicates gradients
_UNLIMITED_BYTES = 2**62


@dataclass(frozen=True)
class StepTrace:
    """Memory and traffic of one rank in a step."""

    weights_bytes: int
    """Bytes of parameters and buffers, as a run measures them after loading."""
    moments_bytes: int
    """Bytes of optimizer state, all of it on the device."""
    phases: dict[StepPhase, int]
    """Live bytes at the peak of each phase."""
    traffic: dict[str, int]
    """Bytes received in a step by mesh dimension, as a run counts them."""

    @property
    def static_bytes(self) -> int:
        return self.weights_bytes + self.moments_bytes

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True, kw_only=True)
class PartialTrace:
    """A trace like `StepTrace` of the traced number of layers, with a peak for each layer."""

    num_layers: int
    weights_bytes: int
    moments_bytes: int
    peaks: dict[LayerPhase, int]
    traffic: dict[str, int]


def trace_step(
    config: Config, model_config: Mapping[str, Any], world_size: int, nodes: int = 1, device: TracedDevice = "cuda"
) -> StepTrace:
    """Trace a step of a run with as few layers as possible.

    The process must not be in a process group, or join one later, because torch caches meshes. A trace takes seconds
    for a model of any size. From some hundreds of ranks on, its time grows with their number.

    Args:
        config: configuration to trace, of whose `model.base` only the name is used.
        model_config: content of config.json.
        world_size: ranks of all nodes together.
        nodes: number of nodes, which have equally many ranks.
        device: kind of device whose path through attention is traced.

    Raises:
        UserError: a run would refuse the configuration, the base is paged or offloaded, or the model has experts.
    """
    few, many, edges = layer_counts_to_trace(config, model_config)
    count = model_config["num_hidden_layers"]
    traces = []
    for layers in (few, many) if many < count else (count,):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = FakeCheckpoint(Path(folder), truncate_layers(model_config, layers))
            traces.append(trace_checkpoint(config, checkpoint, world_size, nodes, device))
    if len(traces) == 1:
        edges = count, count
    return extrapolate_trace(traces[0], traces[-1], count, edges)


def layer_counts_to_trace(config: Config, model_config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int]]:
    """Return two numbers of layers from which the whole model can be extrapolated: 3 and 5 if all layers are equal.

    Returns:
        The two numbers, and the number of leading and of trailing layers whose peaks can be extrapolated one by one.
        Both truncated models contain these layers unchanged. They cover one period of the kinds of layers, leading
        layers of another kind, and trailing layers that are prefetched.
    """
    checkpointing, count = config.train.checkpointing, model_config["num_hidden_layers"]
    kinds = model_config.get("layer_types") or []
    if model_config["model_type"] == "gemma2":
        kinds = ["sliding_attention", "full_attention"] * (count // 2)
    period = math.lcm(
        next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1),
        checkpointing if isinstance(checkpointing, int) else 1,
        model_config.get("decoder_sparse_step") or 1,
    )
    first = model_config.get("first_k_dense_replace") or 0
    ahead = max(1, config.parallel.prefetch)
    few = first + max(2, period) + ahead
    few += (count - few) % period
    return few, few + period * -(-2 // period), (few - ahead, few - first - ahead)


def extrapolate_trace(few: PartialTrace, many: PartialTrace, num_layers: int, edges: tuple[int, int]) -> StepTrace:
    """Extrapolate two traces that differ only in their number of layers to a model of `num_layers` layers.

    Args:
        few: trace with fewer layers.
        many: trace with more layers; `few` itself if that has all layers.
        num_layers: layers of the model.
        edges: third result of `layer_counts_to_trace`.
    """

    def extrapolate(less: int, more: int) -> int:
        if few is many:
            return less
        return less + (more - less) * (num_layers - few.num_layers) // (many.num_layers - few.num_layers)

    phases: dict[StepPhase, int] = {}
    few_peaks, many_peaks = _peaks_by_edge_index(few, edges), _peaks_by_edge_index(many, edges)
    for phase, number in few_peaks.keys() & many_peaks.keys():
        nbytes = extrapolate(few_peaks[phase, number], many_peaks[phase, number])
        phases[phase] = max(phases.get(phase, 0), nbytes)
    return StepTrace(
        extrapolate(few.weights_bytes, many.weights_bytes),
        extrapolate(few.moments_bytes, many.moments_bytes),
        phases,
        {dim: extrapolate(few.traffic[dim], many.traffic[dim]) for dim in many.traffic},
    )


def _peaks_by_edge_index(traced: PartialTrace, edges: tuple[int, int]) -> dict[LayerPhase, int]:
    """Return the peaks with layers counted from the first (0, 1, ...) and from the last (-1, -2, ...)."""
    peaks = {}
    from_first, from_last = edges
    for (phase, index), nbytes in traced.peaks.items():
        if not phase.startswith("layer"):
            peaks[phase, 0] = nbytes
            continue
        for number in {index, index - traced.num_layers}:
            if -from_last <= number < from_first:
                peaks[phase, number] = nbytes
    return peaks


def trace_checkpoint(
    config: Config, folder: ModelFolder, world_size: int, nodes: int = 1, device: TracedDevice = "cuda"
) -> PartialTrace:
    """Trace a step of all layers of a model, whose folder need not hold weights."""
    _check_traceable(config, folder, world_size, nodes)
    ranks = RankInfo(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size // nodes, launcher="none")
    micro_batches = gradient_accumulation(config.train.global_batch, config.train.micro_batch, world_size)
    new_tokens = assume_new_tokens(config, folder.config["vocab_size"])
    model = set_up_model(config, folder, new_tokens=new_tokens)[1]
    nested_code_table(_CPU), state_code_tables(_CPU)  # cached at first use, so they must not become fake tensors
    with _fake_process_group(world_size):
        sharded = shard_model(model, config, ranks, _CPU)
        traffic, adapter_replicas = sharded.traffic, sharded.meshes.sizes.adapter_replicas
        if takes_sequence_starts(model):
            model.set_attn_implementation(_TRACED_ATTENTION[device, config.data.packing != "none"])
        optim = config.optim.model_copy(update={"resident_bytes": _UNLIMITED_BYTES})
        with whole_tensors(), FakeTensorMode(allow_non_fake_inputs=True), _ConstantValues(), _native_dropout(device):
            materialize(model, _CPU)
            moments = PagedOptimizerState(adapter_shard_numels(model), optim, config.paging, _CPU)
            shape = config.train.micro_batch, config.data.seq_len
            batches = [Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3))) for _ in range(micro_batches)]
            traced_batches = batches[:_MAX_MICRO_BATCHES]
            memory, weights_bytes = record_peaks(model, moments, traced_batches, adapter_replicas, config, traffic)
        moments.close()
    received: Counter[str] = Counter()
    for (collective, dim), nbytes in traffic.bytes.items():
        # parameters are gathered for each micro-batch, gradients communicated once
        received[dim] += nbytes * micro_batches // len(traced_batches) if collective == "all_gather" else nbytes
    untraced_batch_bytes = sum(tensor.nbytes for batch in batches[len(traced_batches) :] for tensor in batch)
    return PartialTrace(
        num_layers=len(get_decoder_layers(model)),
        weights_bytes=weights_bytes,
        moments_bytes=moments.resident_bytes,
        peaks={phase: peak + untraced_batch_bytes for phase, peak in memory.peaks.items()},
        traffic=dict(received),
    )


def record_peaks(
    model: LossModel,
    optimizer_state: PagedOptimizerState,
    micro_batches: Sequence[Batch],
    adapter_replicas: int,
    config: Config,
    traffic: CommCounter,
    steps: int = 1,
) -> tuple[LiveMemory, int]:
    """Run training steps on real or fake tensors, and record the last step's peaks.

    Args:
        model: sharded model with weights.
        optimizer_state: moments of the rank's shards, which exist before the first step, so that steps are equal.
        micro_batches: micro-batches of the rank.
        adapter_replicas: number of ranks that hold equal adapter shards.
        config: configuration to trace.
        traffic: counter of the model's collectives, which holds the last step's bytes afterwards.
        steps: number of steps.

    Returns:
        The memory with its peaks, and the bytes of parameters and buffers.
    """
    shards = AdapterShards(model)
    optimizer = PagedAdamW(shards.local, optimizer_state, config.optim)
    memory = LiveMemory()
    register_phase_hooks(model, get_decoder_layers(model), optimizer, memory)
    memory.track([*model.parameters(), *model.buffers()])
    weights_bytes = memory.live_bytes
    memory.track([optimizer_state.acquire(number) for number in range(len(optimizer_state.pages))])
    memory.track(tensor for batch in micro_batches for tensor in batch)
    context = StepContext(
        model=model,
        shards=shards,
        optimizer=optimizer,
        loss_scale=LossScale(config.model.compute_dtype),
        adapter_replicas=adapter_replicas,
        max_grad_norm=config.optim.max_grad_norm,
        traffic=traffic,
    )
    tokens = sum(batch.labels.numel() for batch in micro_batches)
    for _ in range(steps):
        traffic.take()
        memory.peaks.clear()
        with memory:
            train_step(context, micro_batches, tokens)
    return memory, weights_bytes


def _check_traceable(config: Config, folder: ModelFolder, world_size: int, nodes: int) -> None:
    experts = {"num_local_experts", "num_experts", "n_routed_experts"} & {k for k, v in folder.config.items() if v}
    if experts:
        raise UserError(
            f"{experts.pop()}: a trace has no values, and the routing of tokens to experts depends on them; plan a "
            "model with experts without --trace"
        )
    if config.parallel.base == "paged" or config.parallel.offload == "base":
        raise UserError(
            "parallel: a base that is paged or offloaded cannot be traced, as device and host are one in a trace; "
            "plan without --trace"
        )
    if config.model.keep_format:
        raise UserError("model.keep_format: a trace knows weights in 4 bit only; plan without --trace")
    check_equal_nodes(world_size, nodes)


@contextmanager
def _fake_process_group(world_size: int) -> Iterator[None]:
    """Create a process group whose collectives do nothing, with this process as rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _native_dropout(device: TracedDevice) -> Iterator[None]:
    """Save a dropout's mask as booleans, as CUDA does; a CPU saves factors in the compute type."""
    original = torch.nn.functional.dropout
    if device == "cuda":
        torch.nn.functional.dropout = lambda x, p=0.5, training=True, inplace=False: (  # type: ignore[assignment]
            torch.native_dropout(x, p, True)[0] if training and p else x
        )
    try:
        yield
    finally:
        torch.nn.functional.dropout = original


class _ConstantValues(TorchDispatchMode):
    """Results for operations that depend on values, which fake tensors lack: scalars are 1, no element is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is READ_SCALAR:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def _make_traced_attention(device: TracedDevice, *, packed: bool) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return an `attend` as in model/attention.py that does not read the boundaries, which have no values."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        sliding_window, softcap, s_aux = (kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux"))
        batch, _, length, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        options = AttentionOptions(scale=scale, dropout=dropout, window=sliding_window, softcap=softcap, s_aux=s_aux)
        if device == "cpu" and has_cpu_kernel(query, value, options):
            no_boundaries = query.new_empty(1, 1, batch, 0, dtype=torch.int32)
            return packed_causal_attention_cpu(query, key, value, no_boundaries, scale), None
        pieces = [(slice(0, batch), 0, length)]
        # where all scores are materialized, a row of one sequence costs most
        if packed and softcap is None and s_aux is None:
            middle = length // 2
            pieces = [(slice(i, i + 1), *ends) for i in range(batch) for ends in ((0, middle), (middle, length))]
        return sdpa_per_sequence(pieces, query, key, value, options), None

    return attend


_TRACED_ATTENTION = {
    (device, packed): f"qlora_traced_{device}_{'packed' if packed else 'plain'}"
    for device in get_args(TracedDevice)
    for packed in (True, False)
}
for (_device, _packed), _name in _TRACED_ATTENTION.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, _make_traced_attention(_device, packed=_packed))
