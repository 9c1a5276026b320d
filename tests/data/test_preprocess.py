"""If this fails, a user sees wrong statistics of the data, or cannot see which tokens are trained."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.cli.main import main
from qlora_dist.config.schema import Config
from qlora_dist.data.prepare_datasets import _SEQUENCES
from qlora_dist.data.preprocess import preprocess_data
from qlora_dist.errors import UserError

SHORT = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat\non [red]"}]}
LONG = {"messages": SHORT["messages"] * 3}
NOTHING = {"messages": [{"role": "user", "content": "the"}]}


@pytest.fixture
def config(make_tokenizer, write_rows, tmp_path) -> Any:
    """Return `config(**data)`, with a model folder that holds only a tokenizer."""
    make_tokenizer("chatml").save_pretrained(tmp_path / "model")
    train = write_rows(SHORT, LONG, NOTHING, {"messages": []})
    held_out = write_rows({"text": "the dog sat"}, name="eval.jsonl")

    def make(**data: Any) -> Config:
        tree = {"train": [train], "eval": held_out, "seq_len": 24, "on_bad_row": "skip", "cache": str(tmp_path / "c")}
        return Config.model_validate({"model": {"base": str(tmp_path / "model")}, "data": tree | data})

    return make


def printed(config: Config, *, color: bool = False, **options: Any) -> str:
    out = io.StringIO()
    terminal = {"force_terminal": True, "color_system": "truecolor"} if color else {}
    preprocess_data(config, Console(file=out, width=120, **terminal), Console(quiet=True), **options)
    return out.getvalue()


def test_figures(config):
    tree = json.loads(printed(config(), as_json=True))
    train, held_out = tree["sources"]
    assert tree["cache"] == config().data.cache
    assert (train["set"], held_out["set"]) == ("train", "eval")
    assert (train["rows"], train["bad_rows"], train["untrained_rows"], train["sequences"]) == (4, 1, 1, 2)
    (place,) = train["bad_places"]
    assert "train.jsonl, line 4: `messages` is empty" in place
    assert train["tokens"] == train["longest"] + train["longest"] // 3 == 4 * train["longest"] // 3
    assert train["over_seq_len"] == 0.5
    assert train["rows_per_epoch"] == 2
    assert train["padding"] == pytest.approx(1 - (24 + train["longest"] / 3) / 48)
    assert (held_out["tokens"], held_out["trained_tokens"], held_out["length_p50"]) == (4, 3, 4.0)
    assert Path(train["folder"]).name == train["key"]
    assert (Path(train["folder"]) / _SEQUENCES).exists()


def test_weights_count_and_padding_of_unpacked_rows_is_unknown(config):
    data = config().data
    source = {"path": data.train[0], "weight": 0.5}
    train, _ = json.loads(printed(config(train=[source], packing="none"), as_json=True))["sources"]
    assert train["rows_per_epoch"] == 1
    assert train["padding"] is None


def test_the_table_and_the_samples(config):
    text = printed(config(), num_samples=1)
    assert "train: train.jsonl" in text
    assert "skipped: " in text
    # Trained text is marked without colours. Line feeds and special tokens are unchanged, and text is not markup.
    assert "<|im_start|>assistant\n[[sat\non [red]<|im_end|>]]\n" in text
    assert "the[[ dog sat<|eos|>]]" in text
    assert text.count("sequence 1: ") == 2
    assert "sequence 2: " not in text


def test_truncated_tokens_are_shown(config):
    """LONG has three answers, two of which are after the cut."""
    text = printed(config(), num_samples=9)
    whole = json.loads(printed(config(seq_len=100), as_json=True))["sources"][0]
    train, _ = json.loads(printed(config(), as_json=True))["sources"]
    assert (whole["cut_sequences"], whole["cut_answers"], whole["cut_trained_tokens"]) == (0, 0, 0)
    assert (train["cut_sequences"], train["cut_answers"], train["trained_sequences"]) == (1, 2, 2)
    lost = whole["trained_within_seq_len"] - train["trained_within_seq_len"]
    assert 0 < lost == train["cut_trained_tokens"]
    short, long = text.split("sequence 1")[1].split("sequence 2")
    assert long.startswith(f", tokens 1 to 24 of {train['longest']}, ")
    assert short.count("[[") == 1 and long.split("eval.jsonl")[0].count("[[") == 1
    assert "whole answers lost" in text and "cut to that, or into pieces" in text
    # Text that is not trained is not shown.
    text = printed(config(too_long="drop"), num_samples=9)
    assert "train.jsonl, sequence 1: " in text and "train.jsonl, sequence 2" not in text
    dropped, _ = json.loads(printed(config(too_long="drop"), as_json=True))["sources"]
    assert (dropped["dropped_sequences"], dropped["cut_answers"]) == (1, 3)


def test_rows_that_are_trained_answer_by_answer(config, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("chatml")
    end = "{{ '<|eos|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
    tokenizer.save_pretrained(tmp_path / "model")
    text = printed(config(), num_samples=9)
    assert "train.jsonl: 1 of 4 rows are trained as one sequence per answer, 3 in all, each with the prompt" in text
    train, _ = json.loads(printed(config(), as_json=True))["sources"]
    assert (train["per_answer_rows"], train["per_answer_sequences"], train["sequences"]) == (1, 3, 4)


def test_a_length_beyond_the_models_positions(config, tmp_path, refusal):
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 16}')
    with pytest.raises(UserError) as error:
        printed(config())
    assert refusal(error.value).startswith("data.seq_len: 24 is more than the 16 positions of ")


def test_samples_in_colour(config):
    text = printed(config(), color=True, num_samples=1)
    assert "\x1b[1;32msat\non [red]<|im_end|>\x1b[0m" in text.replace("\x1b[0m\n\x1b[1;32m", "\n")
    assert "[[" not in text


def test_samples_without_colour_in_a_terminal(config, monkeypatch):
    """Trained text was bold there, like the title, and had no other mark."""
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[" in printed(config(), color=True, num_samples=1)


def test_force_creates_the_entry_again(config):
    def inode() -> int:
        train, _ = json.loads(printed(config(), as_json=True, rebuild_cache=force))["sources"]
        return (Path(train["folder"]) / _SEQUENCES).stat().st_mtime_ns

    force = False
    first = inode()
    assert inode() == first
    force = True
    assert inode() != first


def test_the_verb(config, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config().model_dump_json())
    monkeypatch.setattr(sys, "argv", ["qlora-dist", "preprocess", str(path), "data.seq_len=1000", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    train, _ = json.loads(capsys.readouterr().out)["sources"]
    assert train["over_seq_len"] == 0.0
    monkeypatch.setattr(sys, "argv", ["qlora-dist", "preprocess", str(path), f"model.base={tmp_path / 'none'}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"qlora-dist: {tmp_path / 'none'}: no such folder; give the folder of a Hugging Face model\n"
    )
