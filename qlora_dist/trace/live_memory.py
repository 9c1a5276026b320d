"""The bytes of all tensors that are alive, and their peak in each phase of a step.

Works on real tensors and on fake ones (`trace/trace_step.py`), and counts both alike: what every operation has made,
until it is gone. torch's own trackers do not serve: `MemTracker` (2.13) wants a hook on every parameter, frozen ones
refuse it;
`FSDPMemTracker` looks through all of FSDP2's units after every operation, and gathers a group of modules twice.

Not seen: what a kernel or a library takes for itself while it runs, and what an allocator keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
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
"""A phase, and of a layer's which layer: counted from 0."""


class LiveMemory(TorchDispatchMode):
    """Counts while it is entered; a step is to be entered for by itself.

    Attributes:
        live_bytes: now.
        peaks: the most at any time, by place; clear it to begin anew.
        place: where the step is; set it as it goes on (`register_phase_hooks`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peaks: dict[LayerPhase, int] = {}
        self.place: LayerPhase = ("embedding", 0)
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._track_storage(local.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See what an operation has made."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by here next
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self._track_storage(leaf.untyped_storage())
        return result

    def __enter__(self) -> LiveMemory:
        """Watch operations, and FSDP2 freeing and making room by resizing storages."""
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, nbytes: int) -> Any:
            result = resize(storage, nbytes)
            self._track_storage(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment]  # replaced until `__exit__`
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """No more."""
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
        if self.live_bytes > self.peaks.get(self.place, 0):
            self.peaks[self.place] = self.live_bytes


def by_phase(peaks: Mapping[LayerPhase, int]) -> dict[StepPhase, int]:
    """Of each phase the most."""
    found: dict[StepPhase, int] = {}
    for (phase, _), nbytes in peaks.items():
        found[phase] = max(found.get(phase, 0), nbytes)
    return found


def register_phase_hooks(
    model: LossModel, layers: Iterable[nn.Module], optimizer: PagedAdamW, memory: LiveMemory
) -> None:
    """Have a model say where a step is. After `parallelize`: what FSDP2 does for a unit belongs to the unit's place.

    Hooks that `prepend` run before FSDP2's. Recomputing calls the layer's `forward`, no hooks.

    Args:
        model: skeleton, sharded.
        layers: its decoder layers.
        optimizer: of its adapters.
        memory: whose place is set.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def embedding_or_head(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        memory.place = ("head" if args[0].is_floating_point() else "embedding", 0)

    model.register_forward_pre_hook(_phase_hook(memory, ("embedding", 0)), prepend=True)
    embedding.register_forward_pre_hook(embedding_or_head, prepend=True)
    head.register_forward_pre_hook(embedding_or_head, prepend=True)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_phase_hook(memory, ("layer_forward", index)), prepend=True)
        layer.register_forward_hook(_phase_gradient_hook(memory, ("layer_backward", index)), prepend=True)
    update = optimizer.step

    def step() -> None:
        memory.place = "optimizer", 0
        update()

    optimizer.step = step  # type: ignore[method-assign]  # marks the phase, then calls the method


def _phase_hook(memory: LiveMemory, place: LayerPhase) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        memory.place = place

    return hook


def _phase_gradient_hook(memory: LiveMemory, place: LayerPhase) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(_phase_hook(memory, place))

    return hook
