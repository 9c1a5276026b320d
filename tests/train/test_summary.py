"""If this fails, a run does not say, or says wrongly, what it is going to train on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from qlora_dist.config_file import load_config
from qlora_dist.launch.environment import ranks_from_environment
from qlora_dist.train.console import RunConsole
from qlora_dist.train.setup import set_up
from qlora_dist.train.summary import announce


def test_what_became_of_each_source(tiny_llama_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.make_config(tmp_path, tiny_llama_nf4, train__steps=None, train__epochs=2, data__seq_len=32)
    other = tiny.make_data(tmp_path / "other.jsonl", 10, seed=2, words=(1, 3))
    mixture = f"data.train=[{tmp_path / 'train.jsonl'}, {{path: {other}, weight: 0.5}}]"

    def announced(*overrides: str) -> str:
        setup = set_up(load_config(path, [mixture, *overrides]), ranks_from_environment({}))
        announce(setup, RunConsole(0))
        return capsys.readouterr().out

    packed = announced("data.too_long=split")
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

    unpacked = announced("data.packing=none", "data.too_long=drop")
    assert re.search(r"train.jsonl: 80 sequences, \d+ longer than 32 tokens dropped; .* trained; weight 1", unpacked)
    assert "packed" not in unpacked
