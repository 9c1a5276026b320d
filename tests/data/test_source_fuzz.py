"""If this fails, some file ends a run in a traceback."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.config.sections import DataFormat, SourceConfig
from qlora_dist.data.row_formats import ROW_FORMATS
from qlora_dist.data.source import read_source_rows
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, SourceRow, TextRow
from qlora_dist.errors import UserError

FORMATS = typing.get_args(DataFormat)
FIELDS = sorted(
    {field for shape in ROW_FORMATS for field in shape.required_fields}
    | {"content", "from", "value", "weight", "train", "tool_calls", "function", "name", "arguments", "type", "tools"}
    | {"system", "history", "replies", "rank", "deleted", "review_result"}
)
WORDS = ["user", "assistant", "human", "gpt", "function_call", "prompter", "text", "system", "{}", "[]", "", "\ud83d"]
WORDS += ['{"name": "f"}', "\n\nHuman: a\n\nAssistant: b", "NaN", "[" * 2000]

settings.register_profile("fuzz", deadline=None, suppress_health_check=list(HealthCheck))

texts = st.sampled_from(WORDS) | st.text(st.characters(codec=None), max_size=8)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.integers(-(10**4000), 10**4000)
    | st.floats()
    | texts
    | st.just([])
    | st.just({})
)
names = st.sampled_from(FIELDS) | texts
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(names, v, max_size=5), max_leaves=20)
fields = st.dictionaries(names, values, max_size=6)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system", "prompter"]) | leaves,
        "content": texts | values,
        "from": st.sampled_from(WORDS) | leaves,
        "value": texts | values,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": values | fields})) | values,
        "train": st.booleans() | leaves,
        "weight": leaves,
    },
)
conversation = st.lists(message, max_size=3)
likely = st.one_of(
    *(
        st.fixed_dictionaries(
            dict.fromkeys(shape.required_fields, texts | leaves | conversation | values),
            optional={"tools": values, "system": texts, "history": values, "rank": leaves, "deleted": leaves},
        )
        for shape in ROW_FORMATS
    )
)
rows = st.lists(fields | likely | values, max_size=4)


def check(path: Path, format: DataFormat) -> None:
    """Read a file completely, and check that its rows, bad rows and at most one refusal are usable."""
    source = SourceConfig(path=str(path), format=format)
    try:
        for row in read_source_rows(source):
            assert row.location.startswith(str(path))
            if isinstance(row, BadRow):
                check_error_message(str(row.to_error()))
            else:
                check_row(row)
    except UserError as error:
        check_error_message(str(error))


def check_error_message(text: str) -> None:
    assert text.isprintable() and "; " in text and not text.endswith(".")
    assert len(text) < 2000


def check_row(row: SourceRow) -> None:
    if isinstance(row, TextRow):
        assert row.text.strip() and row.text.encode()
    elif isinstance(row, CompletionRow):
        assert row.completion.strip() and row.completion.encode() and row.prompt.encode() is not None
    else:
        assert isinstance(row, MessagesRow) and row.messages
        for message in row.messages:
            assert isinstance(message["role"], str)
            assert isinstance(message.get("content", ""), str)
            assert "content" in message or message["tool_calls"]
            assert isinstance(message.get("train", True), bool) and "weight" not in message
            if message["role"] == "assistant" and message.get("train") is not False:
                assert message.get("tool_calls") or message["content"].strip()
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["arguments"], dict)
        json.dumps([row.messages, row.tools], ensure_ascii=False).encode()


def as_jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_json(rows: list[Any]) -> bytes:
    return json.dumps(rows[0] if len(rows) == 1 else rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    table = [row for row in rows if isinstance(row, dict)]
    header = sorted({name for row in table for name in row})
    text = io.StringIO()
    csv.writer(text).writerows([header, *([json.dumps(row.get(name)) for name in header] for row in table)])
    return text.getvalue().encode("utf-8", errors="surrogatepass")


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv])
@settings(settings.get_profile("fuzz"), max_examples=60)
@given(rows, st.sampled_from(FORMATS))
def test_any_tree_in_any_format(write, rows, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{write.__name__.removeprefix('as_')}"
        path.write_bytes(write(rows))
        check(path, format)


@settings(settings.get_profile("fuzz"), max_examples=60)
@given(likely, st.sampled_from(FORMATS))
def test_any_row_of_a_format_that_parquet_can_hold(row, format):
    try:
        table = pa.Table.from_pylist([row, row])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowException:  # A struct without fields.
            return
        check(path, format)


SUFFIXES = ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"]
GOOD = as_jsonl([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(settings.get_profile("fuzz"), max_examples=60)
@given(st.binary(max_size=200) | st.text('[]{}",:\n\\u0dte-\0\ufeffé', max_size=60).map(str.encode), st.booleans())
def test_any_bytes(suffix, content, compressed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_bytes(gzip.compress(content) if compressed and suffix.endswith("gz") else content)
        check(path, "auto")


def valid_parquet() -> bytes:
    table = pa.Table.from_pylist([{"messages": [{"role": "user", "content": "hi"}], "tools": None, "id": 3}] * 5)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("suffix", "whole"),
    [("jsonl", GOOD), ("jsonl.gz", gzip.compress(GOOD)), ("parquet", valid_parquet())],
    ids=["jsonl", "gzip", "parquet"],
)
@settings(settings.get_profile("fuzz"), max_examples=50)
@given(data=st.data())
def test_a_good_file_cut_off_or_with_wrong_bytes(suffix, whole, data):
    end = data.draw(st.integers(0, len(whole)))
    content = bytearray(whole[:end] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_bytes(bytes(content))
        check(path, "auto")


def valid_arrow() -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist([{"messages": [{"role": "user", "content": "hi"}], "text": "a", "id": 3}] * 4)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@settings(settings.get_profile("fuzz"), max_examples=100)
@given(st.lists(st.tuples(st.integers(0, len(valid_arrow()) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_saved_data_set_with_wrong_bytes(changes):
    """Without `validate`, such files end the process, not only the test."""
    content = bytearray(valid_arrow())
    for position, byte in changes:
        content[position] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "dataset_info.json").write_text("{}")
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
        (path / "a.arrow").write_bytes(bytes(content))
        check(path, "auto")
