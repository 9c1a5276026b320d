"""If this fails, files of `datasets` or pandas are misread, or a damaged file ends in a traceback."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_dist.config.sections import SourceConfig
from qlora_dist.data import hub
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source import read_source_rows, source_files
from qlora_dist.data.source_row import BadRow, MessagesRow, TextRow
from qlora_dist.errors import UserError
from tests.helpers.published_tokenizers import make_tokenizer

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def rows(path: Path, **keys) -> list:
    return list(read_source_rows(SourceConfig(path=str(path), **keys), "auto"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.parquet"


def test_parquet(path):
    texts = [f"text {number}" for number in range(300)]  # several batches, several row groups
    pq.write_table(pa.table({"text": texts, "id": range(300)}), path, row_group_size=100)
    assert rows(path) == [TextRow(f"{path}, row {number + 1}", text) for number, text in enumerate(texts)]


def test_parquet_is_read_in_batches(path):
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(30_000)]}), path, row_group_size=30_000)
    before = pa.total_allocated_bytes()
    held = max(pa.total_allocated_bytes() - before for _ in read_source_rows(SourceConfig(path=str(path))))
    assert held < 10 << 20, "the file has 30 MB, in one row group"


def test_nulls_of_fields_that_other_messages_have_are_dropped(path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "name": "x"}, HELLO[1]]
    messages[1]["tool_calls"] = [{"function": {"name": "add", "arguments": '{"a": 1}'}}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "tools": None}]), path)
    assert rows(path) == [
        MessagesRow(f"{path}, row 1", [HELLO[0], {"role": "assistant", "name": "x", "tool_calls": [CALL]}, HELLO[1]])
    ]


@pytest.mark.parametrize("save", ["parquet", "disk"])
def test_values_that_datasets_keeps_as_json_are_decoded(tmp_path, save):
    """`datasets` stores objects as JSON text if the objects of a list have different fields."""
    calls = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": [{"type": "text", "text": "3"}]}]
    conversations = [[HELLO[0], *calls, HELLO[1]], HELLO]
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "info": {"x": datasets.Json()}})
    made = datasets.Dataset.from_list([{"messages": c, "info": {"x": None}} for c in conversations], features=features)
    target = tmp_path / "a.parquet"
    if save == "disk":
        made.save_to_disk(target)
    else:
        made.to_parquet(target)
    results = rows(target)
    calls[1]["content"] = "3"
    assert [row.messages for row in results] == [[HELLO[0], *calls, HELLO[1]], HELLO]


@pytest.mark.parametrize(
    ("keys", "kind"), [(["x", "x"], pa.string()), ([{"k": 1}, {"k": 2}], pa.struct({"k": pa.int64()}))]
)
def test_maps_that_are_not_objects_are_bad_rows(path, keys, kind):
    maps = pa.array([None, list(zip(keys, [1, 2], strict=True))], pa.map_(kind, pa.int64()))
    pq.write_table(pa.table({"text": ["a", "b"], "more": maps}), path)
    good, bad = rows(path)
    assert good.text == "a"
    assert isinstance(bad, BadRow) and bad.reason.startswith("cannot be read (")


def test_values_that_json_does_not_have(path):
    day = datetime.date(2026, 1, 31)
    table = pa.table({"text": pa.array([b"a", None], pa.binary()), "day": [day, day]})
    pq.write_table(table, path)
    assert [row.reason for row in rows(path)] == [
        "`text` is a value of the type bytes; write a string",
        "`text` is null; write a string",
    ]
    messages = [{"role": "user", "content": "a", "at": day, "more": {"at": day}}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), path)
    (bad,) = rows(path)
    assert bad.reason.startswith("message 1: `more` cannot be written as JSON (")


def test_a_row_whose_text_is_not_utf8(path):
    whole = pa.array([b"a", b"caf\xe9", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": whole}), path)
    first, bad, third = rows(path)
    assert (first.text, third.text) == ("a", "c")
    assert isinstance(bad, BadRow) and bad.location == f"{path}, row 2"
    assert bad.reason.startswith("cannot be read ('utf-8' codec can't decode byte 0xe9 in position 3")


def test_invalid_or_truncated_parquet(path, refusal):
    pq.write_table(pa.table({"text": ["a"] * 1000}), path)
    whole = path.read_bytes()
    misnamed = whole.replace(b"text", b"\x80ext")
    for content in (b"", b"PAR1", b"text\na\n", whole[:-20], whole[: len(whole) // 2], misnamed):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            rows(path)
        message = refusal(error.value)
        assert message.startswith(f"{path}: cannot be read after row 0 (")
        assert message.endswith("; it is damaged or has another type; get it again")


ADD = {"type": "object", "properties": {"a": {"type": "integer", "enum": [1, None]}}, "required": ["a"]}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool_call_row(name: str, arguments: dict, parameters: dict) -> dict:
    """Return a row with one function, which has arguments of its own."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}


CALLED = [
    tool_call_row("add", {"a": 1, "b": {"c": [1, None]}}, ADD),
    tool_call_row("weather", {"city": "Oslo"}, WEATHER),
]


@pytest.mark.parametrize("source", ["parquet", "disk", "hub"])
def test_arguments_that_other_rows_have_are_not_trained(tmp_path, monkeypatch, source):
    """Arrow gives every call the arguments of all calls, as nulls. The rows must equal the rows of JSONL."""
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in CALLED))
    table, target = pa.Table.from_pylist(CALLED), tmp_path / "made"
    assert json.dumps(table.to_pylist()).count(": null") > 4
    tokenizer = make_tokenizer("qwen3")
    encoder = RowEncoder(tokenizer, "assistant")
    expected = encoder.encode(rows(jsonl))
    assert "null" not in tokenizer.decode(expected[1].tokens)
    if source == "disk":
        datasets.Dataset(table).save_to_disk(target)
        results = rows(target)
    else:
        target.mkdir()
        pq.write_table(table, target / "train.parquet")
        results = rows(target / "train.parquet")
    if source == "hub":  # `datasets` streams from this folder. Only the query for the commit needs a network.
        monkeypatch.setattr(hub, "fetch_hub_revision", lambda name: None)
        results = list(parse_rows(hub.read_hub_dataset(str(target), None, "train"), "auto", ""))
    assert [(row.messages, row.tools) for row in results] == [(row.messages, row.tools) for row in rows(jsonl)]
    for one, other in zip(encoder.encode(results), expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()


def test_nulls_of_lists_and_maps_are_kept(path):
    kind = pa.struct({"a": pa.list_(pa.int64()), "m": pa.map_(pa.string(), pa.int64()), "n": pa.int64()})
    values = [{"a": [1, None], "m": [("x", 1), ("y", None)], "n": None}, None]
    pq.write_table(pa.table({"chat_template_kwargs": pa.array(values, kind), "messages": [HELLO] * 2}), path)
    assert [row.template_variables for row in rows(path)] == [{"a": [1, None], "m": {"x": 1, "y": None}}, None]


# --- save_to_disk -----------------------------------------------------------------------------------------------------


def test_a_saved_data_set(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": [str(n) for n in range(150)]}).save_to_disk(folder, num_shards=2)
    results = rows(folder)
    assert [row.text for row in results] == [str(n) for n in range(150)]
    assert (results[0].location, results[-1].location) == (
        f"{folder}/data-00000-of-00002.arrow, row 1",
        f"{folder}/data-00001-of-00002.arrow, row 75",
    )
    assert [path.name for path in source_files(SourceConfig(path=str(folder)))] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]


def test_rows_that_were_selected_before_saving(tmp_path):
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    made.save_to_disk(tmp_path / "saved")
    assert [row.text for row in rows(tmp_path / "saved")] == ["c", "a"]


def test_splits(tmp_path, refusal):
    folder = tmp_path / "saved"
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert rows(folder) == [TextRow(f"{folder}/train/data-00000-of-00001.arrow, row 1", "train")]
    assert [row.text for row in rows(folder, split="test")] == ["test"]
    for path, split, message in (
        (folder, "dev", "has no split 'dev'; set `split` to one of `train`, `test`"),
        (folder / "train", "dev", "was saved without splits; take split: dev out"),
    ):
        with pytest.raises(UserError) as error:
            rows(path, split=split)
        assert refusal(error.value) == f"{path}: {message}"


def test_a_saved_folder_that_is_damaged(tmp_path, refusal):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a" * 100]}).save_to_disk(folder)
    file, state = folder / "data-00000-of-00001.arrow", folder / "state.json"

    def message() -> str:
        with pytest.raises(UserError) as error:
            rows(folder)
        return refusal(error.value).replace(str(folder), "FOLDER")

    file.write_bytes(file.read_bytes()[:-150])
    assert message().startswith("FOLDER/data-00000-of-00001.arrow: cannot be read after row 0 (")
    file.write_bytes(b"")
    assert message().startswith("FOLDER/data-00000-of-00001.arrow: cannot be read after row 0 (")
    file.unlink()
    assert message() == "FOLDER/data-00000-of-00001.arrow: is missing; save the data set again"
    for content in ("", "[]", "{}", json.dumps({"_data_files": 3}), "[" * 100_000):
        state.write_text(content)
        assert message() == "FOLDER/state.json: was not written by `datasets`; save the data set again"
