"""If this fails, an error in a data file ends in a traceback or is silent, instead of naming file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_dist.config.sections import DataFormat, SourceConfig
from qlora_dist.data.source import read_source_rows, source_files
from qlora_dist.data.source_row import BadRow, MessagesRow, TextRow
from qlora_dist.errors import UserError

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def rows(path: object, default: DataFormat = "auto", **keys) -> list:
    return list(read_source_rows(SourceConfig(path=str(path), **keys), default))


def test_rows_with_their_places(write_rows):
    path = write_rows({"messages": HELLO, "id": 7}, {"messages": HELLO[:1]})
    assert rows(path) == [MessagesRow(f"{path}, line 1", HELLO), MessagesRow(f"{path}, line 2", HELLO[:1])]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \r\n{"text": "zwei \xc3\xa4"}')
    assert rows(path) == [TextRow(f"{path}, line 1", "one"), TextRow(f"{path}, line 4", "zwei ä")]


def test_format_chooses_the_field_where_rows_have_both(write_rows):
    path = write_rows({"text": "t", "messages": HELLO})
    place = f"{path}, line 1"
    assert rows(path, "auto") == rows(path, "messages") == [MessagesRow(place, HELLO)]
    assert rows(path, "text") == [TextRow(place, "t")]
    assert rows(path, "messages", format="text") == [TextRow(place, "t")], "the source's own wins"


def test_a_folder_gives_its_files_by_name(tmp_path, write_rows):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "deeper/c.jsonl"):
        write_rows({"text": name}, name=f"folder/{name}")
    (folder / "c.json").write_text('[{"text": "c"}]')
    (folder / "README.md").write_text("about")
    (folder / "d.jsonl").mkdir()
    assert rows(folder) == [
        TextRow(f"{folder}/a.jsonl, line 1", "a.jsonl"),
        TextRow(f"{folder}/b.jsonl, line 1", "b.jsonl"),
        TextRow(f"{folder}/c.json, row 1", "c"),
    ]
    assert source_files(SourceConfig(path=str(folder))) == [folder / name for name in ("a.jsonl", "b.jsonl", "c.json")]


def test_files_behind_a_source(write_rows):
    path = write_rows({"text": "a"})
    assert source_files(SourceConfig(path=path)) == [Path(path)]
    assert source_files(SourceConfig(path="owner/name")) == []


def test_a_tilde_is_the_home(tmp_path, write_rows, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_rows({"text": "a"}, name="home.jsonl")
    assert rows("~/home.jsonl") == [TextRow(f"{path}, line 1", "a")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON (Expecting ',' delimiter at character 13); write one complete JSON object"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON (Extra data at character 15); write one complete"),
        (b'{"text": "a', "not valid JSON (Unterminated string starting at character 10); write one"),
        (b"[" * 100_000, "not valid JSON (nested too deeply); write one"),
        (
            b'{"text": NaN}',
            "not valid JSON: `text` is NaN, which is not a number in JSON; write null there, or take the",
        ),
        (
            b'{"text": "a", "x": [{"y": -Infinity}]}',
            "not valid JSON: `x[0].y` is -Infinity, which is not a number in J",
        ),
        (b"NaN", "not valid JSON: NaN is not a number in JSON; write null there"),
        (b'{"a":' * 900 + b"NaN" + b"}" * 900, "not valid JSON: `a.a.a.a.a."),
        (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON (a number of more than 4300 digits); write one"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at position 14); save the file as UTF-8"),
        (b'["a"]', "a list, not an object; write one JSON object per line, or name a file of one array .json"),
        (b"3", "a number, not an object; write one"),
        (b"null", "null, not an object; write one"),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "the row has no `text` (the first row has it: FILE, line 1); add it or take the row out",
        ),
        (b'{"text": null}', "`text` is null; write a string"),
        (b'{"text": true}', "`text` is a boolean; write a string"),
        (b'{"text": ["a"]}', "`text` is a list; write a string"),
        (b'{"text": "\\ud83d"}', "`text` holds half of a surrogate pair; write the whole character"),
        (b'{"text": ""}', "`text` is empty; fill it or take the row out"),
        (b'{"text": " \\n"}', "`text` is empty; fill it or take the row out"),
    ],
)
def test_a_bad_line_is_passed_on_and_the_next_one_is_read(tmp_path, refusal, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "next"}')
    good, bad, after = rows(path)
    assert (good.text, after) == ("good", TextRow(f"{path}, line 4", "next"))
    assert isinstance(bad, BadRow) and bad.location == f"{path}, line 3"
    assert bad.reason.replace(str(path), "FILE").startswith(reason)
    assert refusal(bad.to_error()) == f"{path}, line 3: {bad.reason}"


def test_control_characters_are_tolerated_where_json_allows_them(write_rows):
    assert rows(write_rows({"text": "a\0b\x1b\u2028\x7f"}))[0].text == "a\0b\x1b\u2028\x7f"


def test_a_surrogate_in_a_field_that_is_not_used_does_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": "\\ud83d"}')
    assert rows(path) == [TextRow(f"{path}, line 1", "a")]


def test_rows_before_the_first_of_a_known_format(write_rows, refusal):
    path = write_rows({"version": 1}, {"text": "a"})
    bad, good = rows(path)
    assert bad.location == f"{path}, line 1"
    assert refusal(bad.to_error()).startswith(
        f"{path}, line 1: its fields (`version`) match no known format; rename them to the fields of "
        "messages (`messages`), sharegpt (`conversations`), alpaca (`instruction`, `output`), prompt-completion ("
    )
    assert good.text == "a"


def test_no_row_of_a_known_format(tmp_path, refusal):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"dialogue": [], "a\nb": 1, "\ud83d": 2} | {f"f{i}": i for i in range(20)}, {}]))
    read = read_source_rows(SourceConfig(path=str(path)), "auto")
    assert [next(read).location, next(read).location] == [f"{path}, row 1", f"{path}, row 2"]
    with pytest.raises(UserError) as error:
        next(read)
    assert refusal(error.value).startswith(
        f"{path}, row 1: its fields (`dialogue`, `a\\nb`, `\\ud83d`, `f0`, `f1`, `f2`, `f3`, `f4`, `f5`, `f6`, `f7`, "
        "`f8` and 11 more) match no known format; "
    )


def test_format_set_by_the_user_is_named(write_rows):
    path = write_rows({"text": "a"})
    remedy = "; add it or take the row out"
    assert rows(path, "messages")[0].reason == f"the row has no `messages` (data.format is messages){remedy}"
    assert rows(path, format="alpaca")[0].reason == (
        f"the row has no `instruction` (the source's format is alpaca){remedy}"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.jsonl", "nothing.jsonl: no such data file; give the path of a file or folder that is there"),
        ("nothing.json.GZ", "nothing.json.GZ: no such data file; "),
        ("./nothing", "./nothing: no such data file; "),
        ("../nothing", "../nothing: no such data file; "),
        ("/nothing/there", "/nothing/there: no such data file; "),
        ("~no-such-user/x", "~no-such-user/x: no such data file; "),
        ("a/b/c", "a/b/c: no such data file; "),
        ("a b", "a b: no such data file; "),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl: URLs are not read; give the path of a local copy"),
        ("hf://datasets/owner/name/a.jsonl", "hf://datasets/owner/name/a.jsonl: URLs are not read; give the data set"),
        ("x" * 5000 + "/", "xxx"),
        ("nul\0byte", "nul"),
        ("", "data: the path of a source is empty; give a file, a folder or a data set's name"),
        (" ", "data: the path of a source is empty; "),
        ("/dev/null", "/dev/null: neither a file nor a folder; give the path of one"),
    ],
)
def test_paths_that_do_not_exist(refusal, path, message):
    """They are not searched for on the hub."""
    for call in (lambda: rows(path), lambda: source_files(SourceConfig(path=path))):
        with pytest.raises(UserError) as error:
            call()
        assert refusal(error.value).startswith(message)


def test_ndjson_is_jsonl(write_rows):
    path = write_rows({"text": "a"}, name="a.ndjson")
    assert rows(path) == [TextRow(f"{path}, line 1", "a")]
    assert source_files(SourceConfig(path=str(Path(path).parent))) == [Path(path)]


def test_unreadable_files(tmp_path, write_rows, refusal):
    def message(path: object, **keys) -> str:
        with pytest.raises(UserError) as error:
            rows(path, **keys)
        return refusal(error.value).replace(str(tmp_path), "HERE")

    empty = tmp_path / "empty"
    empty.mkdir()
    known = ".jsonl, .json, .csv (each also with .gz) or .parquet"
    assert message(empty) == f"HERE/empty: the folder has no data file; put files ending in {known} there"
    for name, expected in (
        ("a.data", f"its name does not show the type of the file; rename it to end in {known}"),
        ("a.txt", 'plain text has no rows; write each document as {"text": ...} on a line of a .jsonl file'),
        ("a.tsv", "tab-separated files are not read; write it with commas, as .csv"),
        ("a.jsonl.ZST", "files compressed as .ZST are not read; decompress it, or compress it with gzip"),
        ("a.arrow", "a single Arrow file is not read; give the folder that `save_to_disk` wrote, or write Parquet"),
    ):
        (tmp_path / name).write_text("text")
        assert message(tmp_path / name) == f"HERE/{name}: {expected}"
    path = write_rows({"text": "a"})
    assert message(path, split="test") == "HERE/train.jsonl: has no splits; take split: test out"
    assert message(path, subset="x") == ("HERE/train.jsonl: only data sets on the hub have subsets; take subset: x out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n  \n"),
        ("a.json", ""),
        ("a.json", " \n "),
        ("a.json", " [ ] \n"),
        ("a.csv", ""),
        ("a.csv", "text\n\n"),
    ],
)
def test_no_rows(tmp_path: Path, refusal, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        rows(path, "text")
    assert refusal(error.value).startswith(f"{path}: no rows; ")
