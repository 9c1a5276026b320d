"""Initial values of buffers that no file holds, such as rotary frequencies, from transformers' own classes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_dist.compat.torch import module_buffers
from qlora_dist.compat.transformers import init_module, mark_initialized
from qlora_dist.errors import UserError


def init_buffers(model: PreTrainedModel) -> None:
    """Initialize the buffers that are not saved; they have memory already.

    A class may set a module's buffers while it initializes a module around it, so those are initialized too. As in
    transformers, the innermost model that a module is part of sets its values. Parameters keep their values. A value
    that no class sets stays NaN, so that `check_buffers_initialized` finds it.
    """
    for parameter in model.parameters():
        mark_initialized(parameter)
    paths: set[str] = set()
    with torch.no_grad():
        for name, buffer in model.named_non_persistent_buffers():
            if buffer.is_floating_point():
                buffer.fill_(float("nan"))
            parts = name.split(".")[:-1]
            paths |= {".".join(parts[:length]) for length in range(len(parts) + 1)}
        for path in sorted(paths, key=lambda path: (-path.count("."), not path, path)):
            init_module(_innermost_model(model, path), model.get_submodule(path))


def _innermost_model(model: PreTrainedModel, path: str) -> PreTrainedModel:
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        if isinstance(module := model.get_submodule(".".join(parts[:length])), PreTrainedModel):
            return module
    return model


def check_buffers_initialized(model: PreTrainedModel) -> None:
    """Check that all buffers that are not saved have values."""
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UserError(
                f"model_type {model.config.model_type}: no class of transformers sets its buffer {name}; give "
                "another model"
            )


def check_meta_buffers(model: PreTrainedModel) -> None:
    """Check that all buffers of a model on meta would be initialized. They get memory on the CPU."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, last = name.rpartition(".")
        module_buffers(model.get_submodule(path))[last] = torch.empty_like(buffer, device="cpu")
    init_buffers(model)
    check_buffers_initialized(model)
