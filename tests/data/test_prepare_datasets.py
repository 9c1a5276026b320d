"""If this fails, a run trains on other data than the configuration describes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data.prepare_datasets import PreparedDatasets, data_warnings, prepare_datasets
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.errors import UserError

ANSWERED = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]}


@pytest.fixture
def prepare_data(tmp_path):
    """Return `prepare_data(tokenizer, train=[...], ...)`, which uses a cache of this test."""

    def call(tokenizer, **data) -> PreparedDatasets:
        return prepare_datasets(DataConfig(cache=str(tmp_path / "cache"), **data), tokenizer)

    return call


def decode_row(tokenizer, rows, index: int) -> tuple[str, list[str]]:
    """Return the text of a row and its targets."""
    input_ids, labels, _ = rows.batch([index])
    return tokenizer.decode(input_ids[0]), [tokenizer.decode([t]) for t in labels[0].tolist() if t >= 0]


def test_two_files_and_evaluation(make_tokenizer, write_rows, prepare_data):
    tokenizer = make_tokenizer("chatml", pad_token="<|bos|>")
    train = [write_rows(ANSWERED, ANSWERED, name="a.jsonl"), write_rows(ANSWERED, name="b.jsonl")]
    held_out = write_rows({"text": "the dog"}, name="eval.jsonl")  # Each data set has a format of its own.
    mixture = [train[0], SourceConfig(path=train[1], weight=0.5)]
    prepared = prepare_data(tokenizer, train=mixture, eval=held_out, seq_len=30)

    turn = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat on<|im_end|>\n"
    first, second = prepared.train
    assert len(first.dataset) == len(second.dataset) == 1
    assert decode_row(tokenizer, first.dataset, 0) == (turn * 2 + "<|bos|>" * 2, ["sat", " on", "<|im_end|>"] * 2)
    assert decode_row(tokenizer, second.dataset, 0) == (turn + "<|bos|>" * 16, ["sat", " on", "<|im_end|>"])
    assert prepared.eval is not None
    assert decode_row(tokenizer, prepared.eval.dataset, 0) == ("the dog<|eos|>" + "<|bos|>" * 27, [" dog", "<|eos|>"])
    assert [source.dataset.name for source in prepared.train] == [source.path for source in prepared.train] == train
    assert [source.weight for source in prepared.train] == [1.0, 0.5]
    assert [source.dataset.truncation_stats.trained_tokens for source in prepared.train] == [6, 3]
    assert prepared.eval.stats.tokens == prepared.eval.dataset.truncation_stats.tokens == 3


def test_packing_mask_and_format_are_applied(make_tokenizer, write_rows, prepare_data):
    tokenizer = make_tokenizer("chatml")
    path = write_rows({**ANSWERED, "text": "the cat"}, {**ANSWERED, "text": "the dog"})
    (one_each,), held_out = prepare_data(tokenizer, train=[path], packing="none", mask="all", seq_len=30)
    assert (len(one_each.dataset), held_out) == (2, None)
    assert one_each.dataset.row_loss_tokens.tolist() == [13, 13]
    (text,), _ = prepare_data(tokenizer, train=[path], format="text", seq_len=6)
    assert decode_row(tokenizer, text.dataset, 0)[0] == "the cat<|eos|>the dog<|eos|>"


def test_cached_tokens_are_reused(make_tokenizer, write_rows, prepare_data, monkeypatch):
    """Another length, weight or packing needs no new tokens."""
    tokenizer = make_tokenizer("chatml")
    path = write_rows(ANSWERED, {"messages": ANSWERED["messages"] * 3})
    (first,), _ = prepare_data(tokenizer, train=[path], seq_len=30)
    monkeypatch.setattr(RowEncoder, "encode", None)
    source = SourceConfig(path=path, weight=2.0)
    (second,), _ = prepare_data(tokenizer, train=[source], seq_len=14, packing="none", workers=3)
    assert second.cache_entry == first.cache_entry
    assert second.stats == first.stats
    assert second.dataset.truncation_stats.truncated == 1
    assert first.dataset.truncation_stats.truncated == 1


def change_tokens(entry: Path) -> None:
    """Write other tokens into a valid file, and restore its times."""
    path = entry / "sequences.arrow"
    before, whole = path.stat(), bytearray(path.read_bytes())
    tokens = TokenizedSequences.open(path).tokens(0)
    at = whole.index(tokens.tobytes())
    whole[at : at + 4] = tokens[1:2].tobytes()
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def clear_stats(entry: Path) -> None:
    path = entry / "stats.json"
    path.write_text("{" + " " * (path.stat().st_size - 1))


def overwrite_files(files: dict[str, bytes]) -> Callable[[Path], None]:
    """Return a damage that replaces files and their sizes, and removes the checksums."""

    def damage(entry: Path) -> None:
        (entry / "sums.json").unlink()
        for name, content in files.items():
            (entry / name).write_bytes(content)
        sizes = {path.name: path.stat().st_size for path in entry.iterdir() if path.name != "entry.json"}
        (entry / "entry.json").write_text(json.dumps(sizes))

    return damage


def arrow_with_other_columns() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"tokens": ["a"], "trained": [1.5], "trained_length": [[]]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


DAMAGES = {
    "other tokens": change_tokens,
    "blank stats": clear_stats,
    "no files": lambda entry: (entry / "entry.json").write_text("{}"),
    "a list": lambda entry: (entry / "entry.json").write_text("[]"),
    "no arrow": overwrite_files({"sequences.arrow": b"evil"}),
    "other columns": overwrite_files({"sequences.arrow": arrow_with_other_columns()}),
    "foreign stats": overwrite_files({"stats.json": b'{"sequences": "many", "sha256": []}'}),
    "nested stats": overwrite_files({"stats.json": b"[" * 200_000}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_not_trained(make_tokenizer, write_rows, tmp_path, damage):
    """Otherwise, the run would train on wrong tokens, or fail in the embedding."""
    tokenizer, output = make_tokenizer("chatml"), StringIO()
    config = DataConfig(cache=str(tmp_path / "cache"), train=[write_rows({"text": "the cat sat on the mat the dog"})])
    (first,), _ = prepare_datasets(config, tokenizer)
    tokens = first.dataset.sequences.tokens(0).tolist()
    DAMAGES[damage](first.cache_entry)
    (again,), _ = prepare_datasets(config, tokenizer, Console(file=output, width=1000))
    assert again.dataset.sequences.tokens(0).tolist() == tokens
    assert again.stats == first.stats
    assert f"{first.cache_entry}: is damaged (" in output.getvalue()


def test_digests_of_another_kind_are_created_again(make_tokenizer, write_rows, prepare_data, tmp_path):
    tokenizer, path = make_tokenizer("chatml"), write_rows({"text": "the cat"})
    (first,), _ = prepare_data(tokenizer, train=[path])
    (entry,) = (entry for entry in (tmp_path / "cache" / "digests").iterdir() if entry.is_dir())
    overwrite_files({"digests.json": b"[[], {}]"})(entry)
    (again,), _ = prepare_data(tokenizer, train=[path])
    assert again.cache_entry == first.cache_entry


def test_a_file_that_changes_while_it_is_read_is_refused(
    make_tokenizer, write_rows, prepare_data, refusal, monkeypatch
):
    """Otherwise, the entry of the old content would hold rows of the new content."""
    path = write_rows(ANSWERED)
    encode = RowEncoder.encode

    def write_and_encode(self, rows):
        with Path(path).open("a") as file:
            file.write("\n")
        return encode(self, rows)

    monkeypatch.setattr(RowEncoder, "encode", write_and_encode)
    with pytest.raises(UserError) as error:
        prepare_data(make_tokenizer("chatml"), train=[path])
    assert refusal(error.value).startswith(f"{path}: changed while it was read")


@pytest.mark.parametrize(
    ("special_tokens", "expected"),
    [({"pad_token": "<|bos|>"}, 0), ({"pad_token": "<|im_end|>"}, 3), ({}, 1), ({"eos_token": None}, 0)],
)
def test_padding_id(make_tokenizer, write_rows, prepare_data, special_tokens, expected):
    path = write_rows({"text": "the cat sat"})
    (source,), _ = prepare_data(make_tokenizer("none", **special_tokens), train=[path], seq_len=9)
    assert source.dataset.batch([0]).input_ids[0, -1] == source.dataset.pad_token_id == expected


def test_evaluation_without_a_trained_token_is_named(make_tokenizer, write_rows, prepare_data, refusal):
    train = write_rows({"text": "the cat"})
    held_out = write_rows({"messages": ANSWERED["messages"][:1]}, name="eval.jsonl")
    with pytest.raises(UserError) as error:
        prepare_data(make_tokenizer("chatml"), train=[train], eval=held_out)
    assert refusal(error.value).startswith(f"{held_out}: none of the 1 rows")


def test_a_padding_token_beyond_the_embedding_is_not_used(make_tokenizer, write_rows, prepare_data):
    """With Llama 2's `[PAD]`, a step would fail with an IndexError, or on a GPU with a device assertion."""
    tokenizer = make_tokenizer("none")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    (source,), _ = prepare_data(tokenizer, train=[write_rows({"text": "the cat sat"})], seq_len=9)
    assert source.dataset.pad_token_id == tokenizer.eos_token_id
    assert int(source.dataset.batch([0]).input_ids.max()) < size


def test_data_warnings(make_tokenizer, write_rows, prepare_data):
    """There is one line each for ignored fields, for unlisted bad rows, and for held-out rows that are trained."""
    named = {"messages": [ANSWERED["messages"][0] | {"name": "Ada"}, ANSWERED["messages"][1]], "id": 1}
    train = write_rows(named, *[{"messages": []}] * 7, name="a.jsonl")
    held_out = write_rows(named | {"split": "test"}, name="eval.jsonl")
    tokenizer = make_tokenizer("chatml")
    prepared = prepare_data(tokenizer, train=train, eval=held_out, on_bad_row="skip")
    cached = prepare_data(tokenizer, train=train, eval=held_out, on_bad_row="skip")
    assert data_warnings(*cached) == data_warnings(*prepared)
    rejected = prepared.train[0].cache_entry / "bad-rows.txt"
    assert data_warnings(*prepared) == [
        f"{train}: fields that are ignored: `id`, `name` of messages",
        f"{train}: all bad rows and their reasons: {rejected}",
        f"{held_out}: fields that are ignored: `id`, `split`, `name` of messages",
        f"{held_out}: data.eval holds the rows of {train}, which are trained, so its loss cannot show overfitting",
    ]
    lines = rejected.read_text().splitlines()
    assert len(lines) == 7 and lines[6] == f"{train}, line 8: `messages` is empty; add a message or take the row out"
    assert data_warnings(*prepare_data(tokenizer, train=write_rows(ANSWERED, name="b.jsonl"))) == []
