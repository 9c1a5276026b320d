"""Private names of torch 2.13, except FSDP2's (`fsdp.py`) and fake tensors' (`fake_tensors.py`).

A constant `..._PRIVATE_NAMES` lists what a file needs. tests/compat/test_private_names.py looks each name up in the
installed library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

TORCH_PRIVATE_NAMES = (
    "torch._foreach_copy_",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._fused_adamw_",
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.exc.InvalidCxxCompiler",
    "torch.UntypedStorage._cdata",
    "torch.autograd.Variable._execution_engine",
    "torch.nn.Module._apply",
    "torch.nn.Module._buffers",
    "torch.nn.Module._modules",
    "torch.nn.Module._parameters",
    "torch.ops.aten._local_scalar_dense",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
)

foreach_copy_ = torch._foreach_copy_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
fused_adamw_ = torch._fused_adamw_

flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
READ_SCALAR = torch.ops.aten._local_scalar_dense.default
"""Operator behind `Tensor.item()`."""


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return the address of a storage's C++ object, which identifies storages on meta too."""
    key: int = storage._cdata
    return key


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Have a function called at the end of the backward pass that is running."""
    Variable._execution_engine.queue_callback(callback)


def module_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters: the dictionary itself, so that changes to it change the module."""
    return module._parameters


def module_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return a module's own buffers: the dictionary itself, so that changes to it change the module."""
    return module._buffers


def member_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, buffers and modules, with those that are None."""
    return [*module._parameters, *module._buffers, *module._modules]


def replace_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a module other parameters. A module of which it is a shallow copy keeps its own."""
    module._parameters = dict(parameters)


def map_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every parameter and buffer of a module and its submodules by a function's result."""
    module._apply(function)


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
