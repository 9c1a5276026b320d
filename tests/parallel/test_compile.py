"""If this fails, a missing compiler is reported by torch in fifty lines, after the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.parallel.activation_checkpointing import check_compiler
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models


def test_a_missing_compiler_is_reported(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4), ["train.compile=true"])
    # not monkeypatch, which would restore torch's settings, which are proxies, by deleting them
    no_compiler = inductor.patch({"cpp.cxx": (None, "no-such-compiler")})
    with no_compiler, pytest.raises(UserError, match="has no C\\+\\+ compiler; install g"):
        set_up_run(config, read_rank_info({}))
    check_compiler(torch.device("cuda"))  # Triton needs no C++ compiler
