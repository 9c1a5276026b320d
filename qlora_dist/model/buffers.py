"""Buffers that no file holds, such as rotary frequencies: transformers' own first values are theirs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_dist.compat.torch import module_buffers
from qlora_dist.compat.transformers import init_module, mark_initialized
from qlora_dist.errors import UserError


def init_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that are not saved their values; they have memory already.

    A class may set the buffers of a module where it initializes one around it, so those are asked too. As in
    transformers, a module's values are set by the innermost model that it is part of. Parameters keep what they hold.
    A value that no class sets stays NaN, for `check_buffers_initialized`.
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
    """See whether all buffers that are not saved have got their values.

    Raises:
        UserError: one has not.
    """
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UserError(
                f"model_type {model.config.model_type}: the values of its buffer {name} are not known here; give "
                "another model"
            )


def check_meta_buffers(model: PreTrainedModel) -> None:
    """See the same of a model on meta, whose buffers get memory on the CPU.

    Raises:
        UserError: one would not get its values.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, last = name.rpartition(".")
        module_buffers(model.get_submodule(path))[last] = torch.empty_like(buffer, device="cpu")
    init_buffers(model)
    check_buffers_initialized(model)
