"""What a rank holds and sends in a step, by running the step itself on tensors that have no memory.

The second way to a plan, independent of the formulas: the run's own `set_up_model`, `parallelize_fsdp2` and `train_step`,
under torch's FakeTensorMode, on one rank of a process group in which nobody else is. Every allocation that a rank of
8 or 1,024 would make passes by (`trace/live_memory.py`), every collective is counted (`parallel/comm_counter.py`).

Only so many layers are traced as it takes to see first, last and middle ones; every place of the step is a linear
function of the number of layers, and so are bytes sent. The peak is the largest of the places' values for the whole
model: which one is largest changes with depth, so that none but all of them can be extrapolated.

What is not what a GPU would do:
- Device `cpu`: torch aborts the process in backward of a fake CUDA tensor where there is no GPU. Streams are not there,
  so a buffer of another stream is never kept longer than its use.
- Attention is what `model/attention.py` does on CUDA, with torch's flash kernel for CPUs: the same tensors, but what
  CUDA's backward takes for itself is missing (for each token and head fp32[d], and keys and values in all heads).
  `model.attention: flex` is traced as `sdpa`.
- Rows are full, all of their positions are trained, and a packed row is two sequences, or one with soft-capped scores.
- cuBLAS's workspace, NCCL's buffers, the CUDA context and what the allocator keeps are not seen.
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
from qlora_dist.errors import UserError
from qlora_dist.model.attention import has_cpu_kernel, sdpa_per_sequence, takes_sequence_starts
from qlora_dist.model.load_weights import materialize
from qlora_dist.model.meta_model import LossModel, get_decoder_layers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.row_chunks import whole_tensors
from qlora_dist.nf4.code_tables import nested_code_table
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.adamw_kernels import state_code_tables
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.parallel.fsdp2 import parallelize_fsdp2
from qlora_dist.parallel.mesh import build_meshes, mesh_sizes
from qlora_dist.plan.phase_memory import StepPhase
from qlora_dist.plan.run_spec import check_equal_nodes
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.trace.fake_checkpoint import FakeCheckpoint, truncate_layers
from qlora_dist.trace.live_memory import LayerPhase, LiveMemory, register_phase_hooks
from qlora_dist.train.run_setup import set_up_model
from qlora_dist.train.train_step import AdapterShards, adapter_shard_numels, train_step

TracedDevice = Literal["cuda", "cpu"]
_CPU = torch.device("cpu")
_MAX_MICRO_BATCHES = 3  # the first, one in the middle, and the last, which communicates gradients
_UNLIMITED_BYTES = 2**62  # bytes


@dataclass(frozen=True)
class StepTrace:
    """Of one rank, in a step."""

    weights_bytes: int
    """Parameters and buffers, what a run compares with its share after loading."""
    moments_bytes: int
    """Of the optimizer; all of them on the device."""
    phases: dict[StepPhase, int]
    """All bytes that are alive at the peak of each phase."""
    traffic: dict[str, int]
    """Bytes received in a step, by mesh dimension, as a run counts them."""

    @property
    def static_bytes(self) -> int:
        """Between steps."""
        return self.weights_bytes + self.moments_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.phases.values())


@dataclass(frozen=True)
class PartialTrace:
    """As `StepTrace`, of a model as it was traced, by places instead of phases."""

    layers: int
    weights_bytes: int
    moments_bytes: int
    peaks: dict[LayerPhase, int]
    traffic: dict[str, int]


def trace_step(
    config: Config, model_config: Mapping[str, Any], world_size: int, nodes: int = 1, device: TracedDevice = "cuda"
) -> StepTrace:
    """Trace a step of a run, by as few layers as it takes.

    The process must be in no process group, nor come into one later: torch keeps meshes. It takes seconds, whatever the
    size of the model; from some hundreds of ranks on, the more the more there are.

    Args:
        config: of the run; of `model.base` only the name is used.
        model_config: config.json.
        world_size: ranks of all nodes together.
        nodes: of equally many ranks.
        device: whose way through attention is traced.

    Raises:
        UserError: what a run would say of the configuration; or a base that is paged or offloaded, or experts.
    """
    few, more, edges = layer_counts_to_trace(config, model_config)
    count = model_config["num_hidden_layers"]
    traced = []
    for layers in (few, more) if more < count else (count,):
        with tempfile.TemporaryDirectory() as folder:
            blueprint = FakeCheckpoint(Path(folder), truncate_layers(model_config, layers))
            traced.append(trace_checkpoint(config, blueprint, world_size, nodes, device))
    if len(traced) == 1:
        edges = count, count
    return extrapolate_trace(traced[0], traced[-1], count, edges)


def layer_counts_to_trace(config: Config, model_config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int]]:
    """Two numbers of layers that lie on one line with the model's: 3 and 5 where all layers are alike.

    Returns:
        The two, and how many layers are places of their own, from the first on and from the last on: those of which
        both models have one that is like the whole model's. That is one of each kind that repeats, of the first ones
        also those that are of another kind, and before the last there are those whose gathering is told ahead.
    """
    checkpointing, count = config.train.checkpointing, model_config["num_hidden_layers"]
    kinds = model_config.get("layer_types") or []
    if model_config["model_type"] == "gemma2":
        kinds = ["sliding_attention", "full_attention"] * (count // 2)
    repeat = math.lcm(
        next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1),
        checkpointing if isinstance(checkpointing, int) else 1,
        model_config.get("decoder_sparse_step") or 1,
    )
    first = model_config.get("first_k_dense_replace") or 0
    ahead = max(1, config.parallel.prefetch)
    few = first + max(2, repeat) + ahead
    few += (count - few) % repeat
    return few, few + repeat * -(-2 // repeat), (few - ahead, few - first - ahead)


def extrapolate_trace(few: PartialTrace, many: PartialTrace, num_layers: int, edges: tuple[int, int]) -> StepTrace:
    """A model of `num_layers` layers, from two that are alike but for their number.

    Args:
        few: of the two.
        many: of the two; the same: nothing is left to be extrapolated.
        num_layers: of the model.
        edges: of `layer_counts_to_trace`.
    """

    def line(one: int, other: int) -> int:
        return one if few is many else one + (other - one) * (num_layers - few.layers) // (many.layers - few.layers)

    phases: dict[StepPhase, int] = {}
    few_peaks, many_peaks = _peaks_by_edge_index(few, edges), _peaks_by_edge_index(many, edges)
    for phase, number in few_peaks.keys() & many_peaks.keys():
        nbytes = line(few_peaks[phase, number], many_peaks[phase, number])
        phases[phase] = max(phases.get(phase, 0), nbytes)
    return StepTrace(
        line(few.weights_bytes, many.weights_bytes),
        line(few.moments_bytes, many.moments_bytes),
        phases,
        {dim: line(few.traffic[dim], many.traffic[dim]) for dim in many.traffic},
    )


def _peaks_by_edge_index(traced: PartialTrace, edges: tuple[int, int]) -> dict[LayerPhase, int]:
    """Places of layers, counted from the first (0, 1, ...) and from the last (-1, -2, ...)."""
    peaks = {}
    from_first, from_last = edges
    for (phase, index), nbytes in traced.peaks.items():
        if not phase.startswith("layer"):
            peaks[phase, 0] = nbytes
            continue
        for number in {index, index - traced.layers}:
            if -from_last <= number < from_first:
                peaks[phase, number] = nbytes
    return peaks


def trace_checkpoint(
    config: Config, folder: ModelFolder, world_size: int, nodes: int = 1, device: TracedDevice = "cuda"
) -> PartialTrace:
    """Trace a step of all layers of a model.

    Args:
        config: of the run.
        folder: of the model, with weights or without.
        world_size: ranks of all nodes together.
        nodes: of equally many ranks.
        device: whose way through attention is traced.

    Raises:
        UserError: as `trace_step`.
    """
    _check_traceable(config, folder, world_size, nodes)
    sizes = mesh_sizes(config.parallel, RankInfo(0, world_size, 0, world_size // nodes, "none"))
    micro_batches = gradient_accumulation(config.train.global_batch, config.train.micro_batch, world_size)
    model = set_up_model(config, folder)[1]
    nested_code_table(_CPU), state_code_tables(_CPU)  # made at first use and kept: not as fake ones
    with _fake_process_group(world_size):
        traffic = parallelize_fsdp2(model, build_meshes(sizes, "cpu"), config)
        if takes_sequence_starts(model):
            model.set_attn_implementation(_TRACED_ATTENTION[device, config.data.packing != "none"])
        optim = config.optim.model_copy(update={"resident_bytes": _UNLIMITED_BYTES})
        with whole_tensors(), FakeTensorMode(allow_non_fake_inputs=True), _ConstantValues(), _native_dropout(device):
            materialize(model, _CPU)
            moments = PagedOptimizerState(adapter_shard_numels(model), optim, config.paging, _CPU)
            shape = config.train.micro_batch, config.data.seq_len
            batches = [Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3))) for _ in range(micro_batches)]
            traced_batches = batches[:_MAX_MICRO_BATCHES]
            memory, weights_bytes = record_peaks(
                model, moments, traced_batches, sizes.adapter_replicas, config, traffic
            )
        moments.close()
    received: Counter[str] = Counter()
    for (collective, dim), nbytes in traffic.bytes.items():
        # parameters are gathered for each micro-batch, gradients communicated once
        received[dim] += nbytes * micro_batches // len(traced_batches) if collective == "all_gather" else nbytes
    untraced_batch_bytes = sum(tensor.nbytes for batch in batches[len(traced_batches) :] for tensor in batch)
    places = {place: peak + untraced_batch_bytes for place, peak in memory.peaks.items()}
    return PartialTrace(len(get_decoder_layers(model)), weights_bytes, moments.resident_bytes, places, dict(received))


def record_peaks(
    model: LossModel,
    optimizer_state: PagedOptimizerState,
    micro_batches: Sequence[Batch],
    adapter_replicas: int,
    config: Config,
    traffic: CommCounter,
    steps: int = 1,
) -> tuple[LiveMemory, int]:
    """Do training steps, of which the last is counted; on real tensors or on fake ones.

    Args:
        model: sharded and filled.
        optimizer_state: of the rank's shards.
        micro_batches: the rank's micro-batches.
        adapter_replicas: ranks that hold equal adapter shards.
        config: of the run.
        traffic: of the model; afterwards it holds the last step's bytes.
        steps: their number. Moments are there from the start, so that one is like the next.

    Returns:
        The memory with its peaks, and the bytes of parameters and buffers.
    """
    shards = AdapterShards(model)
    optimizer = PagedAdamW(shards.local, optimizer_state, config.optim)
    memory = LiveMemory()
    register_phase_hooks(model, get_decoder_layers(model), optimizer, memory)
    memory.track([*model.parameters(), *model.buffers()])
    weights_bytes = memory.live_bytes
    memory.track([optimizer_state.use(number) for number in range(len(optimizer_state.pages))])
    memory.track(tensor for batch in micro_batches for tensor in batch)
    scale, tokens = LossScale(config.model.compute_dtype), sum(batch.labels.numel() for batch in micro_batches)
    for _ in range(steps):
        traffic.take()
        memory.peaks.clear()
        with memory:
            train_step(
                model,
                micro_batches,
                tokens,
                shards,
                adapter_replicas,
                optimizer,
                scale,
                config.optim.max_grad_norm,
                traffic,
            )
    return memory, weights_bytes


def _check_traceable(config: Config, folder: ModelFolder, world_size: int, nodes: int) -> None:
    experts = {"num_local_experts", "num_experts", "n_routed_experts"} & {k for k, v in folder.config.items() if v}
    if experts:
        raise UserError(
            f"{experts.pop()}: which expert gets which token depends on values, which a trace has none of; plan a "
            "model with experts without --trace"
        )
    if config.parallel.base == "paged" or config.parallel.offload == "base":
        raise UserError(
            "parallel: a base that is paged or offloaded cannot be traced, as device and host are one in a trace; "
            "plan without --trace"
        )
    check_equal_nodes(world_size, nodes)


@contextmanager
def _fake_process_group(world_size: int) -> Iterator[None]:
    """A process group whose collectives do nothing; this is rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _native_dropout(device: TracedDevice) -> Iterator[None]:
    """On CUDA what is left out is kept as booleans; on a CPU as factors in the compute type."""
    plain = torch.nn.functional.dropout
    if device == "cuda":
        torch.nn.functional.dropout = lambda x, p=0.5, training=True, inplace=False: (  # type: ignore[assignment]
            torch.native_dropout(x, p, True)[0] if training and p else x
        )
    try:
        yield
    finally:
        torch.nn.functional.dropout = plain


class _ConstantValues(TorchDispatchMode):
    """Answers what depends on values, which fake tensors have none of: a number is 1, and nothing is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is READ_SCALAR:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def _make_traced_attention(device: TracedDevice, packed: bool) -> Callable[..., tuple[torch.Tensor, None]]:
    """`attend` of model/attention.py, its arguments and its result, where boundaries have no values."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        batch, _, length, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        if device == "cpu" and has_cpu_kernel(query, value, dropout, sliding_window, softcap, s_aux):
            no_boundaries = query.new_empty(1, 1, batch, 0, dtype=torch.int32)
            return packed_causal_attention_cpu(query, key, value, no_boundaries, scale), None
        pieces = [(slice(0, batch), 0, length)]
        # where the whole matrix of scores is there, a row of one sequence costs most
        if packed and softcap is None and s_aux is None:
            middle = length // 2
            pieces = [(slice(i, i + 1), *ends) for i in range(batch) for ends in ((0, middle), (middle, length))]
        return sdpa_per_sequence(pieces, query, key, value, dropout, scale, sliding_window, softcap, s_aux), None

    return attend


_TRACED_ATTENTION = {
    (device, packed): f"qlora_traced_{device}_{'packed' if packed else 'plain'}"
    for device in get_args(TracedDevice)
    for packed in (True, False)
}
for (_device, _packed), _name in _TRACED_ATTENTION.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, _make_traced_attention(_device, _packed))
