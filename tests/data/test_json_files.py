"""If this fails, a JSON file is misread at the end of a block, or a large file fills the memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.sections import SourceConfig
from qlora_dist.data import json_files
from qlora_dist.data.source import read_source_rows
from qlora_dist.data.source_row import BadRow, TextRow
from qlora_dist.errors import UserError


def rows(path: Path) -> list:
    return list(read_source_rows(SourceConfig(path=str(path)), "text"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.json"


def read_error(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        rows(path)
    return str(error.value).replace(str(path), "FILE")


# --- JSONL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [b'\n{"text": "next"}\n', b""])
def test_a_line_too_long_is_a_bad_row_and_not_kept_in_memory(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "' + b"x" * (50 << 20) + b'"}' + ending)
    tracemalloc.start()
    good, bad, *after = rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good.text == "good"
    assert bad == BadRow(
        f"{path}, line 2", "the line is longer than 16 MiB; cut it, or put each row in a line of its own"
    )
    assert after == [TextRow(f"{path}, line 3", "next")] * bool(ending)
    assert peak < 50 << 20, "the line has 50 MiB"


def test_the_longest_line_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_ROW_SIZE", 14)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "a"}\n{"text": "a"}')  # The first line has 15 bytes with its line feed.
    assert [type(row) for row in rows(path)] == [BadRow, TextRow, TextRow]


def test_memory_does_not_grow_with_the_file(tmp_path):
    content = json.dumps({"text": "x" * 1000})
    for name, whole in (("a.jsonl", (content + "\n") * 8000), ("a.json", f"[{','.join([content] * 8000)}]")):
        path = tmp_path / name
        path.write_text(whole)
        tracemalloc.start()
        assert sum(1 for _ in read_source_rows(SourceConfig(path=str(path)))) == 8000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 << 20, "the file has 8 MB"


# --- an array ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_an_array_is_the_same_with_any_block_size(tmp_path_factory, texts, piece, indent, ascii_only):
    path = tmp_path_factory.mktemp("array") / "a.json"
    content = json.dumps([{"text": text + "."} for text in texts], indent=indent, ensure_ascii=ascii_only)
    path.write_text("\ufeff \n" * indent + content if indent else content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_BLOCK_BYTES", piece if not indent else 100 + piece)
        assert rows(path) == [
            TextRow(f"{path}, row {number}", text + ".") for number, text in enumerate(texts, start=1)
        ]


def test_items_that_are_not_objects_are_bad_rows(path, monkeypatch):
    elements = [
        '{"text": "a"}', "123456", '"}]"', "null", "[1, 2]", '{"text": NaN}', f'{{"text": {"9" * 5000}}}', "[NaN]",
        '{"text": "b"}',
    ]  # fmt: skip
    path.write_text(f"[{', '.join(elements)}]")
    for piece in (1 << 20, 1, 7):
        monkeypatch.setattr(json_files, "_BLOCK_BYTES", piece if piece > 1 else 2)
        results = rows(path)
        assert [row.location for row in results] == [f"{path}, row {number}" for number in range(1, 10)]
        assert (results[0].text, results[8].text) == ("a", "b")
        assert [row.reason for row in results[1:8]] == [
            "a number, not an object; write one array of objects",
            "a string, not an object; write one array of objects",
            "null, not an object; write one array of objects",
            "a list, not an object; write one array of objects",
            "not valid JSON (`text` is NaN, which is not a number in JSON); correct it or take the row out",
            "not valid JSON (a number of more than 4300 digits); correct it or take the row out",
            "not valid JSON (`[0]` is NaN, which is not a number in JSON); correct it or take the row out",
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}', "FILE, row 1: neither a comma nor a bracket follows; write one complete array of objects"),
        ('[{"text": "a"} {"text": "b"}]', "FILE, row 1: neither a comma nor a bracket follows; "),
        ('[{"text": "a"},', "FILE, row 2: not valid JSON (Expecting value at character 1), or the file is truncated; "),
        ('[{"text": "a"}, ]', "FILE, row 2: not valid JSON (Expecting value at character 1), or the file is truncated"),
        ('[{"text": "a"}, {"te', "FILE, row 2: not valid JSON (Unterminated string starting at character 2), or the "),
        ('[{"text": "a"}, {"text": b}]', "FILE, row 2: not valid JSON (Expecting value at character 10), or the file"),
        ("[" * 100_000, "FILE, row 1: not valid JSON (nested too deeply), or the file is truncated; write one array"),
        ('[{"text": "a"}] x', "FILE: there is more text after the array of 1 rows; write one array of objects"),
        (b'[{"text": "caf\xe9"}]', "FILE: not UTF-8 (byte 0xe9 at position 15); save the file as UTF-8"),
        (b'[{"text": "caf\xc3', "FILE: not UTF-8 (byte 0xc3 at position 15); save the file as UTF-8"),
        ("3", "FILE: holds a number; write one array of objects"),
        ('"a"', "FILE: holds a string; write one array of objects"),
        ('{"text": "a"', "FILE: not valid JSON (Expecting ',' delimiter at character 13); write one array of objects"),
        ("nonsense", "FILE: not valid JSON (Expecting value at character 1); write one array of objects"),
    ],
)
def test_errors_of_the_whole_file(path, content, message):
    assert read_error(path, content).startswith(message)


def test_a_position_counts_from_the_file_s_beginning(path, monkeypatch):
    monkeypatch.setattr(json_files, "_BLOCK_BYTES", 4)
    assert "(byte 0xe9 at position 15)" in read_error(path, b'[{"text": "caf\xe9"}]')


def test_a_row_too_long_ends_an_array(path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_ROW_SIZE", 50)
    monkeypatch.setattr(json_files, "_BLOCK_BYTES", 8)
    content = f'[{{"text": "a"}}, {{"text": "{"x" * 500}"}}]'
    assert read_error(path, content).startswith("FILE, row 2: not valid JSON, or longer than ")


# --- one object, or JSONL under a wrong name --------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_a_row_or_holds_rows(path, indent):
    path.write_text(json.dumps({"text": "a", "more": {"text": "b"}}, indent=indent))
    assert rows(path) == [TextRow(f"{path}, row 1", "a")]
    path.write_text(json.dumps({"first": {"text": "a"}, "second": {"text": "b"}}, indent=indent))
    assert rows(path) == [TextRow(f"{path}, row 1", "a"), TextRow(f"{path}, row 2", "b")]


def test_lines_in_a_json_file_are_read_as_lines(path):
    path.write_text('\ufeff\n{"text": "a"}\n\n{"text": 1}\n{"text": "b"}')
    first, bad, second = rows(path)
    assert (first, second) == (TextRow(f"{path}, line 2", "a"), TextRow(f"{path}, line 5", "b"))
    assert bad.location == f"{path}, line 4"


# --- compressed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl.gz", '{"text": "a"}\n', "line 1"),
        ("a.JSON.GZ", '[{"text": "a"}]', "row 1"),
        ("a.json.gz", '{"text": "a"}\n{"text": "a"}\n', "line 1"),
        ("a.csv.gz", "text\na\n", "line 2"),
    ],
)
def test_gzip(tmp_path, name, content, place):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()))
    assert rows(path)[0] == TextRow(f"{path}, {place}", "a")


def test_gzip_truncated_or_damaged_or_missing(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "a"}\n' * 100_000)
    for content in (whole[:200], whole[:100] + b"x" * 50 + whole[150:], b'{"text": "a"}\n', whole + b"x"):
        message = read_error(path, content)
        assert message.startswith("FILE: not a gzip file, or damaged or truncated (")
        assert message.endswith("); get it again")
