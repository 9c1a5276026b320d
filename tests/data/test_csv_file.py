"""If this fails, a cell is read into the wrong column, or an error names the wrong line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.sections import SourceConfig
from qlora_dist.data import data_files, json_files
from qlora_dist.data.source import read_source_rows
from qlora_dist.data.source_row import BadRow, CompletionRow, TextRow
from qlora_dist.errors import UserError


def rows(path: Path) -> list:
    return list(read_source_rows(SourceConfig(path=str(path)), "auto"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.csv"


def test_places_are_the_lines_on_which_rows_start(path):
    path.write_bytes(
        b"\xef\xbb\xbfprompt,completion,id\r\n"  # Excel writes such a file.
        b'"a, ""b""\n\nc",d,1\r\n'
        b"\r\n"
        b"e,f,2\r\n"
        b"g,h\r\n"
        b"caf\xe9,h,4\r\n"
        b'"i"x,j,5\r\n'
        b"k,,6\r\n"
        b"l,m,7"
    )
    assert rows(path) == [
        CompletionRow(f"{path}, line 2", 'a, "b"\n\nc', "d"),
        CompletionRow(f"{path}, line 6", "e", "f"),
        BadRow(f"{path}, line 7", "the row has 2 cells, the header 3; put cells that hold commas in quotes"),
        BadRow(f"{path}, line 8", "not UTF-8 (byte 0xe9 at position 4); save the file as UTF-8"),
        BadRow(f"{path}, line 9", "not valid CSV (',' expected after '\"'); double the quotes within a quoted cell"),
        BadRow(f"{path}, line 10", "`completion` is empty; fill it or take the row out"),
        CompletionRow(f"{path}, line 11", "l", "m"),
    ]


def test_a_quote_that_is_never_closed(path):
    path.write_text('text\na\n"b\nc\n')
    good, bad = rows(path)
    assert good.text == "a"
    assert bad.location == f"{path}, line 3"
    assert bad.reason.startswith("not valid CSV (unexpected end of data); ")


def test_long_cells_are_read_and_those_too_long_are_bad(path, monkeypatch):
    path.write_text(f"text\n{'x' * 200_000}\n")  # Python's default limit is 131072.
    assert len(rows(path)[0].text) == 200_000
    monkeypatch.setattr(json_files, "MAX_ROW_SIZE", 100)
    monkeypatch.setattr(data_files, "MAX_ROW_SIZE", 100)
    path.write_text(f"text,id\n{'x' * 120},1\nb,2\n")
    bad, good = rows(path)
    assert bad == BadRow(f"{path}, line 2", f"the line is {json_files.ROW_TOO_LONG_REASON}")
    assert good.text == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,text\na,b\n", "FILE, line 1: the header names a column twice (`text`); rename one"),
        (b"\nt\xe9xt\na\n", "FILE, line 2: not UTF-8 (byte 0xe9 at position 2); save the file as UTF-8"),
    ],
)
def test_a_header_that_cannot_be_read(path, refusal, content, message):
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        rows(path)
    assert refusal(error.value).replace(str(path), "FILE") == message


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_what_python_writes_is_read_as_the_same(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text = io.StringIO()
    csv.writer(text).writerows([("text", "id"), *((f"{first}.", second) for first, second in pairs)])
    path.write_bytes(text.getvalue().encode())
    results = rows(path)
    assert [row.text for row in results] == [f"{first}." for first, _ in pairs]
    lines = text.getvalue().encode().split(b"\n")
    for row in results:
        assert isinstance(row, TextRow)
        number = int(row.location.rsplit(" ", 1)[1])
        start = row.text.split("\n")[0].replace('"', '""').encode()
        assert lines[number - 1].removeprefix(b'"').startswith(start), "the row starts on that line"
