"""If this fails, every rank takes a third longer to start, or bitsandbytes' fallbacks are broken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora_dist.compat.bitsandbytes import _lazy_compile

CODE = """
import sys
import torch
compile = torch.compile
import qlora_dist.train.run_training
print(torch.compile is compile, "bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.slow
def test_the_compiler_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "True True False\n"


def test_a_function_is_compiled_when_it_is_called() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if torch.compiler.is_compiling() else x

    later = _lazy_compile(double, backend="eager", dynamic=False)
    assert later.__name__ == "double"
    assert later(torch.ones(2)).tolist() == [2, 2]
    assert later(torch.ones(2)).tolist() == [2, 2]
