"""Rows to a file of sequences: read in this process, encoded in several, written in the order of the rows."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.source_row import BadRow, CompletionRow, SourceRow, TextRow
from qlora_dist.data.template_limit import TEMPLATE_LIMITER
from qlora_dist.data.tokenized import FlatSequences, SequenceWriter
from qlora_dist.errors import UserError
from qlora_dist.runtime.system import usable_cpu_count

_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 2**20
"""A worker gets so many rows at a time, or as many as have so much text."""
_CHUNKS_AHEAD_PER_WORKER = 3
"""Chunks read ahead for each worker."""
_MAX_NAMED_BAD_ROWS = 5
"""Bad rows that are remembered."""

RowChunk = list[SourceRow | BadRow]


@dataclass(slots=True)
class TokenizeStats:
    """What became of a source's rows."""

    rows: int = 0
    """Read."""
    bad_rows: int = 0
    """Skipped because they cannot be used."""
    bad_places: list[str] = field(default_factory=list)
    """The first of these, each with its reason."""
    untrained_rows: int = 0
    """Left out because nothing in them is trained, however long a row of a batch is."""
    per_answer_rows: int = 0
    """Conversations that became one sequence per trained answer."""
    per_answer_sequences: int = 0
    """Sequences that these became."""
    sequences: int = 0
    """Written: one for each other row, and those of conversations that became several."""
    tokens: int = 0
    """In these."""
    trained_tokens: int = 0
    """Of these, predicted and trained; never a sequence's first."""
    largest_token: int = 0
    """The highest token number."""
    ignored: list[str] = field(default_factory=list)
    """Fields of the rows and their messages which neither the format nor the chat template reads."""
    sha256: str = ""
    """Over all tokens, which of them are trained, and the lengths: what the sequences are, wherever they came from."""

    def left_out(self) -> str:
        """For people: which rows are not trained; empty if all are."""
        parts = []
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} cannot be used and are skipped (the first: {self.bad_places[0]})")
        if self.untrained_rows:
            parts.append(f"{self.untrained_rows:,} have no token to train")
        return f"of {self.rows:,} rows {', '.join(parts)}" if parts else ""

    def per_answer(self) -> str:
        """Say which rows are trained answer by answer; empty if none are."""
        if not self.per_answer_rows:
            return ""
        return (
            f"{self.per_answer_rows:,} of {self.rows:,} rows are trained as one sequence per answer, "
            f"{self.per_answer_sequences:,} in all, each with the prompt that inference would see (data.multi_turn)"
        )


class _EncodedChunk(NamedTuple):
    """A chunk in tokens."""

    rows: int
    bad_rows: list[BadRow]
    untrained: int
    per_answer: int
    per_answer_sequences: int
    sequences: FlatSequences


def tokenize_to_file(
    rows: Iterable[SourceRow | BadRow],
    encoder: RowEncoder,
    output_path: Path,
    *,
    workers: int | Literal["auto"] = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_rows: int | str = 100,
    bad_rows_path: Path | None = None,
    source_name: str = "data",
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenizeStats:
    """Encode rows and write those with something to train. The file depends on the rows alone, not on `workers`.

    Args:
        rows: from `read_rows`; never more of them in memory than a few chunks for each worker.
        encoder: turns them into tokens.
        output_path: the file, for `Sequences.open`.
        workers: processes that encode; auto: the cores that this process may use.
        on_bad_row: stop at the first bad row, or skip it.
        max_bad_rows: how many may be skipped: a number, or a share of all rows such as 1%.
        bad_rows_path: a file for the places and reasons of all bad rows; none is written without one.
        source_name: of the source in a complaint.
        progress: called now and then with the number of rows done.

    Raises:
        UserError: a bad row, always the first one of the source; too many of them; no row with something to train;
            whatever `rows` raises, at its place among the rows.
        OSError: `output_path` cannot be written.
    """
    stats = TokenizeStats()
    digests = [hashlib.sha256() for _ in range(3)]
    with SequenceWriter(output_path) as writer, _BadRowFile(bad_rows_path) as rejects:
        for part in _encode_chunks(rows, encoder, workers):
            stats.rows += part.rows
            for bad in part.bad_rows:
                _count_bad_row(bad, stats, on_bad_row, max_bad_rows, source_name)
                rejects.append(bad)
            stats.untrained_rows += part.untrained
            stats.per_answer_rows += part.per_answer
            stats.per_answer_sequences += part.per_answer_sequences
            stats.sequences += len(part.sequences.lengths)
            stats.tokens += len(part.sequences.tokens)
            stats.trained_tokens += int(part.sequences.trained.sum())
            stats.largest_token = max(stats.largest_token, int(part.sequences.tokens.max(initial=0)))
            flat = part.sequences
            contents = (flat.tokens.tobytes(), flat.trained.tobytes(), flat.lengths.tobytes())
            for digest, content in zip(digests, contents, strict=True):
                digest.update(content)
            writer.append(part.sequences)
            progress(stats.rows)
        _check_bad_row_share(stats, max_bad_rows, source_name)
        if not stats.sequences:
            skipped = f" ({stats.bad_rows} of them could not be used)" if stats.bad_rows else ""
            raise UserError(
                f"{source_name}: none of the {stats.rows} rows has a token to train{skipped}; give rows with a non-empty "
                "`text`, or with messages of the role 'assistant'"
            )
    stats.sha256 = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    return stats


def _count_bad_row(bad: BadRow, stats: TokenizeStats, on_bad_row: str, max_bad_rows: int | str, name: str) -> None:
    if on_bad_row == "error":
        raise bad.error()
    stats.bad_rows += 1
    if len(stats.bad_places) < _MAX_NAMED_BAD_ROWS:
        stats.bad_places.append(str(bad.error()))
    if isinstance(max_bad_rows, int) and stats.bad_rows > max_bad_rows:
        raise _too_many_bad_rows_error(stats, max_bad_rows, name)


def _check_bad_row_share(stats: TokenizeStats, max_bad_rows: int | str, name: str) -> None:
    """Refuse a larger share of bad rows, which is known once all rows are read."""
    if isinstance(max_bad_rows, str) and stats.bad_rows > stats.rows * float(max_bad_rows.rstrip("%")) / 100:
        raise _too_many_bad_rows_error(stats, max_bad_rows, name)


def _too_many_bad_rows_error(stats: TokenizeStats, max_bad_rows: int | str, name: str) -> UserError:
    count = f"{stats.bad_rows:,} of {stats.rows:,}, " if isinstance(max_bad_rows, str) else ""
    return UserError(
        f"{name}: more than data.max_bad_rows: {max_bad_rows} of its rows cannot be used ({count}the first: "
        f"{stats.bad_places[0]}); mend them, or raise that number"
    )


class _BadRowFile:
    """The file of all bad rows, which is written if there are any."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def append(self, bad: BadRow) -> None:
        if self._path is not None:
            self._file = self._file or self._path.open("w", encoding="utf-8")
            self._file.write(f"{bad.error()}\n")

    def __enter__(self) -> _BadRowFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _encode_chunks(
    rows: Iterable[SourceRow | BadRow], encoder: RowEncoder, workers: int | Literal["auto"]
) -> Iterator[_EncodedChunk]:
    """Every chunk's tokens, in order; what `rows` raises comes after the chunks before it."""
    chunks = _chunks(rows)
    # more processes than chunks would only be started; and one has the work done sooner than it starts another. Other
    # ranks wait for what these do: they need not share the cores
    max_workers = usable_cpu_count() if workers == "auto" else workers
    first_chunks = list(islice(chunks, max_workers)) if max_workers > 1 else []
    chunks = chain(first_chunks, chunks)
    if len(first_chunks) < 2:
        for chunk in chunks:
            yield _encode(_raise_if_error(chunk), encoder)
        return
    with _worker_pool(len(first_chunks), encoder) as pool:
        pending: deque[Future[_EncodedChunk] | UserError] = deque()
        for chunk in chunks:
            pending.append(chunk if isinstance(chunk, UserError) else pool.submit(_encode_in_worker, chunk))
            if len(pending) > _CHUNKS_AHEAD_PER_WORKER * len(first_chunks):
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())


def _chunks(rows: Iterable[SourceRow | BadRow]) -> Iterator[RowChunk | UserError]:
    """Rows as they are handed to a worker; last of all the mistake that ended them, if one did."""
    chunk: RowChunk = []
    characters = 0
    try:
        for row in rows:
            chunk.append(row)
            characters += _num_characters(row)
            if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except UserError as error:
        yield from ([chunk] if chunk else [])
        yield error
        return
    if chunk:
        yield chunk


def _num_characters(row: SourceRow | BadRow) -> int:
    """About how much text it is."""
    if isinstance(row, BadRow):
        return 0
    if isinstance(row, TextRow):
        return len(row.text)
    if isinstance(row, CompletionRow):
        return len(row.prompt) + len(row.completion)
    return sum(len(message.get("content") or "") for message in row.messages)


def _raise_if_error(chunk: RowChunk | UserError) -> RowChunk:
    if isinstance(chunk, UserError):
        raise chunk
    return chunk


def _result(future: Future[_EncodedChunk] | UserError) -> _EncodedChunk:
    if isinstance(future, UserError):
        raise future
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes was killed, as happens when memory runs out; give data.workers a lower number"
        ) from None


def _encode(chunk: RowChunk, encoder: RowEncoder) -> _EncodedChunk:
    with TEMPLATE_LIMITER.enable_timer():
        results = iter(encoder.encode([row for row in chunk if not isinstance(row, BadRow)]))
    bad, kept = [], []
    untrained = per_answer = answers = 0
    for row in chunk:
        encoded = row if isinstance(row, BadRow) else next(results)
        if isinstance(encoded, BadRow):
            bad.append(encoded)
        elif isinstance(encoded, list):
            per_answer, answers = per_answer + 1, answers + len(encoded)
            kept += [(answer.tokens, answer.trained) for answer in encoded]
        elif encoded.trained[1:].any():  # nothing predicts the first
            kept.append((encoded.tokens, encoded.trained))
        else:
            untrained += 1
    return _EncodedChunk(len(chunk), bad, untrained, per_answer, answers, FlatSequences.of(kept))


# --- the workers ------------------------------------------------------------------------------------------------------
# Forked: they have transformers and the tokenizer at once, where a fresh process takes seconds to import them. Not safe
# after a fork would be using the parent's threads, torch's or the tokenizers library's: they use neither.

_ENCODER: RowEncoder


@contextlib.contextmanager
def _worker_pool(workers: int, encoder: RowEncoder) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _init_worker, (encoder,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _init_worker(encoder: RowEncoder) -> None:
    global _ENCODER
    _ENCODER = encoder
    gc.freeze()  # looking through all of the parent's objects for garbage would copy the pages they lie on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent answers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent would leave workers that wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: RowChunk) -> _EncodedChunk:
    return _encode(chunk, _ENCODER)
