"""The bytes of all live tensors, and their peak in each phase of a step.

Each operation's output counts from its creation until it is freed, for real tensors and for fake ones
(`trace/trace_step.py`). The trackers of torch 2.13 do not work here. `MemTracker` needs a hook on every parameter,
which frozen parameters refuse. `FSDPMemTracker` inspects all of FSDP2's units after every operation, and gathers a
group of modules twice.

Temporary memory inside a kernel or a library, and memory that an allocator keeps, are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qlora_dist.compat.torch import TorchDispatchMode, storage_key, tree_leaves
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.plan.phase_memory import StepPhase

if TYPE_CHECKING:
    from qlora_dist.model.meta_model import LossModel

LayerPhase = tuple[StepPhase, int]
"""A phase and, in the phases of a layer, the layer's index."""


class LiveMemory(TorchDispatchMode):
    """A counter of live bytes, which counts while it is entered. Enter it once per step.

    Attributes:
        live_bytes: current live bytes.
        peaks: peak of `live_bytes` by phase; clear it to restart.
        current_phase: current phase of the step, which `register_phase_hooks` updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peaks: dict[LayerPhase, int] = {}
        self.current_phase: LayerPhase = ("embedding", 0)
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that already exist."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._track_storage(local.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation is dispatched again with the local tensors
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self._track_storage(leaf.untyped_storage())
        return result

    def __enter__(self) -> LiveMemory:
        """Watch operations, and the resizing of storages by which FSDP2 frees and allocates them."""
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, nbytes: int) -> Any:
            result = resize(storage, nbytes)
            self._track_storage(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment]  # replaced until `__exit__`
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # the method itself again
        super().__exit__(*error)

    def _track_storage(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage_key(storage), storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            self._storages[key] = nbytes, weakref.ref(storage, lambda _: self._untrack_storage(key))
            self._add(nbytes)
        elif known[0] != nbytes:
            self._storages[key] = nbytes, known[1]
            self._add(nbytes - known[0])

    def _untrack_storage(self, key: int) -> None:
        self._add(-self._storages.pop(key)[0])

    def _add(self, nbytes: int) -> None:
        self.live_bytes += nbytes
        if self.live_bytes > self.peaks.get(self.current_phase, 0):
            self.peaks[self.current_phase] = self.live_bytes


def register_phase_hooks(
    model: LossModel, layers: Iterable[nn.Module], optimizer: PagedAdamW, memory: LiveMemory
) -> None:
    """Register hooks on a model that update the phase of a step.

    Call it after `parallelize_fsdp2`. The hooks use `prepend`, so that they run before FSDP2's and its work for a unit
    counts for the unit's phase. Recomputation calls a layer's `forward` without hooks.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def embedding_or_head(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        memory.current_phase = ("head" if args[0].is_floating_point() else "embedding", 0)

    model.register_forward_pre_hook(_phase_hook(memory, ("embedding", 0)), prepend=True)
    embedding.register_forward_pre_hook(embedding_or_head, prepend=True)
    head.register_forward_pre_hook(embedding_or_head, prepend=True)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_phase_hook(memory, ("layer_forward", index)), prepend=True)
        layer.register_forward_hook(_phase_gradient_hook(memory, ("layer_backward", index)), prepend=True)
    update = optimizer.step

    def step() -> None:
        memory.current_phase = "optimizer", 0
        update()

    optimizer.step = step  # type: ignore[method-assign]  # marks the phase, then calls the method


def _phase_hook(memory: LiveMemory, phase: LayerPhase) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        memory.current_phase = phase

    return hook


def _phase_gradient_hook(memory: LiveMemory, phase: LayerPhase) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(_phase_hook(memory, phase))

    return hook
