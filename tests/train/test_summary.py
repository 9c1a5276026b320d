"""If this fails, a run prints wrong lines about the data that it trains on, or none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.runtime import process_group
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.summary import describe_run
from tests.helpers import tiny_models


def test_each_source_has_a_line(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=None, train__epochs=2, data__seq_len=32)
    other = tiny_models.make_data(tmp_path / "other.jsonl", 10, seed=2, words=(1, 3))
    mixture = f"data.train=[{tmp_path / 'train.jsonl'}, {{path: {other}, weight: 0.5}}]"

    def describe(*overrides: str) -> str:
        setup = set_up_run(load_config(path, [mixture, *overrides]), read_rank_info({}))
        return "\n".join(describe_run(setup))

    packed = describe("data.too_long=split")
    first, second, held_out, last = packed.splitlines()[-4:]
    number = r"[\d,]+"
    assert re.search(
        rf"train.jsonl: 80 sequences, {number} split into {number} pieces.*packed into {number} rows", first
    )
    assert first.endswith("weight 1: each row 2.00 times")
    assert re.search(
        r"other.jsonl: 10 sequences.* packed into 10 rows, .* padding; weight 0.5: each row 1.00 times", second
    )
    assert held_out.startswith("held out: ")
    assert re.fullmatch(rf"{number} steps of 12 rows = 2.00 epochs of {number} rows; \d+.\d % padding", last)

    unpacked = describe("data.packing=none", "data.too_long=drop")
    assert re.search(
        r"train.jsonl: 80 sequences, \d+ longer than 32 tokens dropped, .*; .* trained; weight 1", unpacked
    )
    assert "packed" not in unpacked


def test_a_processor_that_emulates_bf16_gets_a_warning_with_the_remedy(
    tiny_llama_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4)
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu sse2 avx2\n")
    monkeypatch.setattr(process_group, "_CPUINFO", tmp_path / "cpuinfo")

    def warned(dtype: str) -> list[str]:
        setup = set_up_run(load_config(path, [f"model.compute_dtype={dtype}"]), read_rank_info({}))
        return [line for line in describe_run(setup) if line.endswith("set model.compute_dtype=fp32")]

    assert len(warned("bf16")) == 1
    assert warned("fp32") == []


def test_a_single_rank_and_a_single_row_are_singular(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    path = tiny_models.make_config(
        tmp_path, tiny_llama_nf4, train__steps=1, train__global_batch=1, optim__warmup_steps=0
    )
    one_row = tiny_models.make_data(tmp_path / "one.jsonl", 1)
    config = load_config(path, [f"data.train=[{one_row}]", "train.micro_batch=1"])
    lines = list(describe_run(set_up_run(config, read_rank_info({}))))
    assert "1 rank on cpu: base, adapters and optimizer states are whole on it" in lines
    assert lines[-1].startswith("1 step of 1 row = 1.00 epochs of 1 row; ")
    four = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
    ranks = read_rank_info(four | {"MASTER_PORT": "1", "GROUP_RANK": "0"})
    config = load_config(path, ["train.micro_batch=1", "train.global_batch=4", "parallel.base=node"])
    lines = list(describe_run(set_up_run(config, ranks)))
    assert (
        "4 ranks on cpu: the base is sharded over 2 ranks, in 2 copies, "
        "adapters and optimizer states are sharded over all 4"
    ) in lines
