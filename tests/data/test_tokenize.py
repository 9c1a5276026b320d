"""If this fails, rows are lost, reordered by the number of processes, or a bad row is silently skipped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data import tokenize as tokenize_module
from qlora_dist.data.row_encoder import EncodedSequence
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, SourceRow, TextRow
from qlora_dist.data.tokenize import BadRowPolicy, TokenizeStats, tokenize_to_file
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.errors import UserError


class Encoder:
    """Encoder of one token per character, which trains capital letters and refuses rows with a `!`."""

    def encode(self, rows: list[SourceRow]) -> list[EncodedSequence | BadRow]:
        return [self._encode(row) for row in rows]

    def _encode(self, row: SourceRow) -> EncodedSequence | BadRow:
        assert isinstance(row, TextRow)
        if "!" in row.text:
            return BadRow(row.location, "shouts; be quiet")
        if "?" in row.text:
            os.kill(os.getpid(), signal.SIGKILL)
        codes = np.array([ord(c) for c in row.text], dtype=np.int32)
        return EncodedSequence(codes, np.array([c.isupper() for c in row.text], dtype=np.bool_))


def rows_of(texts: list[str | None]) -> list[SourceRow | BadRow]:
    """Return the rows of these texts; None becomes a bad row."""
    return [
        BadRow(f"a.jsonl, line {line}", "is null; write a string")
        if text is None
        else TextRow(f"a.jsonl, line {line}", text)
        for line, text in enumerate(texts, start=1)
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "_CHUNK_ROWS", 3)


@given(texts=st.lists(st.none() | st.text("abAB!", max_size=8), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_row_is_written_skipped_or_left_out(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tokenize") / "a.arrow"
    bad = [text for text in texts if text is None or "!" in text]
    kept = [text for text in texts if text is not None and "!" not in text and any(c.isupper() for c in text[1:])]
    options = {"workers": 1, "bad_rows": BadRowPolicy("skip", 100)}
    if not kept:
        with pytest.raises(UserError, match=f"none of the {len(texts)} rows has a token to train"):
            tokenize_to_file(rows_of(texts), Encoder(), path, **options)
        return
    stats = tokenize_to_file(rows_of(texts), Encoder(), path, **options)
    sequences = TokenizedSequences.open(path)
    assert ["".join(map(chr, sequences.tokens(i))) for i in range(len(sequences))] == kept
    flags = [[place > 0 and c.isupper() for place, c in enumerate(text)] for text in kept]
    assert [sequences.loss_mask(i).tolist() for i in range(len(sequences))] == flags
    assert len(stats.bad_places) == min(len(bad), 5)
    stats.bad_places = []
    assert len(stats.sha256) == 64
    stats.sha256 = ""
    assert stats == TokenizeStats(
        rows=len(texts),
        bad_rows=len(bad),
        untrained_rows=len(texts) - len(bad) - len(kept),
        sequences=len(kept),
        tokens=sum(map(len, kept)),
        trained_tokens=sum(map(sum, flags)),
        largest_token=max(ord(c) for text in kept for c in text),
    )


def test_the_number_of_workers_changes_nothing(tmp_path, small_chunks):
    texts = [None if i % 31 == 30 else "aB!" if i % 17 == 16 else "a" * (i % 5) + "B" for i in range(200)]
    files, stats = [], []
    for workers in (1, 2, 3, "auto"):
        path = tmp_path / f"{workers}.arrow"
        stats.append(tokenize_to_file(rows_of(texts), Encoder(), path, workers=workers, bad_rows=BadRowPolicy("skip")))
        files.append(path.read_bytes())
    assert files == files[:1] * 4
    assert stats == stats[:1] * 4
    assert (
        stats[0]
        .describe_skipped_rows()
        .startswith("of 200 rows 17 cannot be used and are skipped (the first: a.jsonl, line 17: ")
    )
    assert stats[0].bad_places[:2] == [
        "a.jsonl, line 17: shouts; be quiet",
        "a.jsonl, line 31: is null; write a string",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_is_reported(tmp_path, small_chunks, refusal, workers):
    """A bad row of the reader is reported after one of the encoder if it is later in the file."""
    for texts in (["aB"] * 10 + ["aB!", "aB", None] + ["aB"] * 9, ["aB"] * 10 + ["aB!"] + [None] * 12):
        with pytest.raises(UserError) as error:
            tokenize_to_file(rows_of(texts), Encoder(), tmp_path / "a.arrow", workers=workers)
        assert refusal(error.value) == "a.jsonl, line 11: shouts; be quiet"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_file_is_raised_after_the_rows_before_it(tmp_path, small_chunks, refusal, workers):
    def truncated_rows(texts: list[str | None]) -> Iterator[SourceRow | BadRow]:
        yield from rows_of(texts)
        raise UserError("a.jsonl: is truncated; get it again")

    for texts, expected in (
        (["aB"] * 10, "a.jsonl: is truncated; get it again"),
        ([*["aB"] * 10, "aB!"], "a.jsonl, line 11: shouts; be quiet"),
    ):
        with pytest.raises(UserError) as error:
            tokenize_to_file(truncated_rows(texts), Encoder(), tmp_path / "a.arrow", workers=workers)
        assert refusal(error.value) == expected


def test_a_share_of_the_rows_may_be_skipped(tmp_path, refusal):
    options = {"workers": 1, "source_name": "a.jsonl"}
    texts = ["aB", "aB", None, "aB!"] * 10
    rejected = tmp_path / "bad.txt"
    stats = tokenize_to_file(
        rows_of(texts), Encoder(), tmp_path / "a", bad_rows=BadRowPolicy("skip", "50%", rejected), **options
    )
    assert (stats.bad_rows, len(stats.bad_places)) == (20, 5)
    assert rejected.read_text().splitlines()[-2:] == [
        "a.jsonl, line 39: is null; write a string",
        "a.jsonl, line 40: shouts; be quiet",
    ]
    with pytest.raises(UserError) as error:
        tokenize_to_file(rows_of(texts), Encoder(), tmp_path / "a", bad_rows=BadRowPolicy("skip", "49.9%"), **options)
    assert refusal(error.value) == (
        "a.jsonl: more than data.max_bad_rows: 49.9% of its rows cannot be used (20 of 40, the first: a.jsonl, line 3: "
        "is null; write a string); correct them, or raise that number"
    )
    tokenize_to_file(
        rows_of(["aB"]), Encoder(), tmp_path / "a", bad_rows=BadRowPolicy("skip", "0%", tmp_path / "none"), **options
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_not_too_many_are_skipped(tmp_path, small_chunks, refusal, workers):
    texts = ["aB", None, "aB!"] * 10
    options = {"workers": workers, "source_name": "a.jsonl"}
    assert (
        tokenize_to_file(
            rows_of(texts), Encoder(), tmp_path / "a.arrow", bad_rows=BadRowPolicy("skip", 20), **options
        ).bad_rows
        == 20
    )
    with pytest.raises(UserError) as error:
        tokenize_to_file(rows_of(texts), Encoder(), tmp_path / "a.arrow", bad_rows=BadRowPolicy("skip", 19), **options)
    assert refusal(error.value) == (
        "a.jsonl: more than data.max_bad_rows: 19 of its rows cannot be used (the first: a.jsonl, line 2: is null; "
        "write a string); correct them, or raise that number"
    )


def test_rows_are_not_read_far_ahead(tmp_path, small_chunks):
    """Otherwise, data larger than memory would fill it."""
    read = 0
    done = []

    def rows() -> Iterator[SourceRow | BadRow]:
        nonlocal read
        for row in rows_of(["aB"] * 300):
            read += 1
            yield row

    tokenize_to_file(
        rows(), Encoder(), tmp_path / "a.arrow", workers=2, progress=lambda rows: done.append((rows, read))
    )
    assert [rows for rows, _ in done] == list(range(3, 301, 3))
    # There are two workers, each with one chunk in progress and three read ahead.
    assert max(ahead - rows for rows, ahead in done) <= 3 * 2 * 4


def test_long_rows_are_in_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "_CHUNK_CHARACTERS", 10)
    seen = []
    tokenize_to_file(
        rows_of(["a" * 9 + "B", "aB", "aaaaaaaaB"] * 2), Encoder(), tmp_path / "a.arrow", progress=seen.append
    )
    assert seen == [1, 3, 4, 6]
    sizes = [
        tokenize_module._num_characters(row)
        for row in (
            CompletionRow("p", "ab", "cde"),
            MessagesRow("p", [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": None}]),
            BadRow("p", "r"),
        )
    ]
    assert sizes == [5, 4, 0]


def test_a_killed_worker_is_a_user_error(tmp_path, small_chunks, refusal):
    """The kernel kills a worker when memory runs out."""
    with pytest.raises(UserError) as error:
        tokenize_to_file(rows_of(["aB"] * 20 + ["a?"] * 20), Encoder(), tmp_path / "a.arrow", workers=2)
    assert "a process that tokenizes was killed" in refusal(error.value)


def test_workers_end_with_their_parent(tmp_path, small_chunks):
    """A killed run leaves no process that holds memory."""
    pids = tmp_path / "pids"
    pids.mkdir()

    class Hanging(Encoder):
        def encode(self, rows: list[SourceRow]) -> list[EncodedSequence | BadRow]:
            (pids / str(os.getpid())).touch()
            time.sleep(60)
            return []

    parent = os.fork()
    if not parent:
        tokenize_to_file(rows_of(["aB"] * 20), Hanging(), tmp_path / "a.arrow", workers=2)
        os._exit(0)
    end = time.monotonic() + 20
    while len(list(pids.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_environment_stays_as_it_was(tmp_path, small_chunks, monkeypatch):
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        tokenize_to_file(rows_of(["aB"] * 20), Encoder(), tmp_path / "a.arrow", workers=2)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_the_digest_depends_on_the_sequences_only(tmp_path):
    """A run may resume only on equal sequences, whatever the number of workers and skipped rows."""
    options = {"bad_rows": BadRowPolicy("skip", 100)}

    def digest(texts, workers=1):
        return tokenize_to_file(rows_of(texts), Encoder(), tmp_path / "a.arrow", workers=workers, **options).sha256

    many = ["aB" * (1 + number % 7) for number in range(700)]
    assert digest(many) == digest(many, workers=2) == digest([*many, None, "!"])
    assert len({digest(["aBaB", "aB"]), digest(["aB", "aBaB"]), digest(["aBa", "BaB"]), digest(["aBaB"])}) == 4
