"""Tokenization of a source: rows are read in this process, encoded in several, and written in their order."""

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
from typing import Any, Literal, NamedTuple, TextIO

import numpy.typing as npt

from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.source_row import BadRow, CompletionRow, SourceRow, TextRow
from qlora_dist.data.template_limit import TEMPLATE_LIMITER
from qlora_dist.data.tokenized import FlatSequences, SequenceWriter
from qlora_dist.errors import UserError
from qlora_dist.runtime.system import usable_cpu_count

_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 2**20
"""Most rows and characters that a worker gets at a time."""
_CHUNKS_AHEAD_PER_WORKER = 3
"""Chunks that are read ahead per worker."""
_MAX_NAMED_BAD_ROWS = 5
"""Bad rows that the statistics name."""

RowChunk = list[SourceRow | BadRow]


@dataclass(slots=True, kw_only=True)
class TokenizeStats:
    """Counts of a source's rows and sequences."""

    rows: int = 0
    bad_rows: int = 0
    """Rows that were skipped because they cannot be used."""
    bad_places: list[str] = field(default_factory=list)
    """Locations of the first bad rows, each with its reason."""
    untrained_rows: int = 0
    """Rows that were dropped because no token in them is trained, at any `seq_len`."""
    per_answer_rows: int = 0
    """Conversations that became one sequence per trained answer."""
    per_answer_sequences: int = 0
    sequences: int = 0
    """Sequences that were written: one per remaining row, or one per answer."""
    tokens: int = 0
    trained_tokens: int = 0
    """The first token of a sequence is never trained."""
    largest_token: int = 0
    ignored: list[str] = field(default_factory=list)
    """Fields of rows and messages that neither the format nor the chat template reads."""
    sha256: str = ""
    """Hash of all tokens, loss masks and lengths, which identifies the sequences independently of their source."""

    def describe_skipped_rows(self) -> str:
        parts = []
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} cannot be used and are skipped (the first: {self.bad_places[0]})")
        if self.untrained_rows:
            parts.append(f"{self.untrained_rows:,} have no token to train")
        return f"of {self.rows:,} rows {', '.join(parts)}" if parts else ""

    def describe_per_answer_rows(self) -> str:
        if not self.per_answer_rows:
            return ""
        return (
            f"{self.per_answer_rows:,} of {self.rows:,} rows are trained as one sequence per answer, "
            f"{self.per_answer_sequences:,} in all, each with the prompt that inference would see (data.multi_turn)"
        )


class BadRowPolicy(NamedTuple):
    """Handling of rows that cannot be used."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Whether to stop at the first bad row, or to skip it."""
    max_bad_rows: int | str = 100
    """Most bad rows that may be skipped: a number, or a share of all rows such as 1%."""
    path: Path | None = None
    """File for the locations and reasons of all bad rows; None if it is not written."""


_STOP_AT_BAD_ROW = BadRowPolicy()


class _EncodedChunk(NamedTuple):
    rows: int
    bad_rows: list[BadRow]
    untrained_rows: int
    per_answer_rows: int
    per_answer_sequences: int
    sequences: FlatSequences


def tokenize_to_file(
    rows: Iterable[SourceRow | BadRow],
    encoder: RowEncoder,
    output_path: Path,
    *,
    workers: int | Literal["auto"] = "auto",
    bad_rows: BadRowPolicy = _STOP_AT_BAD_ROW,
    source_name: str = "data",
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenizeStats:
    """Encode rows and write those with a trained token. The file depends only on the rows, not on `workers`.

    At most a few chunks of `rows` per worker are in memory. `progress` gets the number of finished rows from time to
    time.

    Raises:
        UserError: a bad row (always the first of the source), too many bad rows, or no row with a trained token. An
            error of `rows` is raised after the rows before it.
        OSError: `output_path` cannot be written.
    """
    stats = TokenizeStats()
    digests = [hashlib.sha256() for _ in range(3)]
    with SequenceWriter(output_path) as writer, _BadRowFile(bad_rows.path) as bad_row_file:
        for chunk in _encode_chunks(rows, encoder, workers):
            stats.rows += chunk.rows
            for bad in chunk.bad_rows:
                _count_bad_row(bad, stats, bad_rows, source_name)
                bad_row_file.append(bad)
            stats.untrained_rows += chunk.untrained_rows
            stats.per_answer_rows += chunk.per_answer_rows
            stats.per_answer_sequences += chunk.per_answer_sequences
            sequences = chunk.sequences
            stats.sequences += len(sequences.lengths)
            stats.tokens += len(sequences.tokens)
            stats.trained_tokens += int(sequences.loss_mask.sum())
            stats.largest_token = max(stats.largest_token, int(sequences.tokens.max(initial=0)))
            columns: tuple[npt.NDArray[Any], ...] = (sequences.tokens, sequences.loss_mask, sequences.lengths)
            for digest, column in zip(digests, columns, strict=True):
                digest.update(column.tobytes())
            writer.append(sequences)
            progress(stats.rows)
        most = bad_rows.max_bad_rows
        if isinstance(most, str) and stats.bad_rows > stats.rows * float(most.rstrip("%")) / 100:
            raise _too_many_bad_rows_error(stats, most, source_name)
        if not stats.sequences:
            skipped = f" ({stats.bad_rows} of them could not be used)" if stats.bad_rows else ""
            raise UserError(
                f"{source_name}: none of the {stats.rows} rows has a token to train{skipped}; give rows with a "
                "non-empty `text`, or with messages of the role 'assistant'"
            )
    stats.sha256 = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    return stats


def _count_bad_row(bad: BadRow, stats: TokenizeStats, policy: BadRowPolicy, name: str) -> None:
    if policy.on_bad_row == "error":
        raise bad.to_error()
    stats.bad_rows += 1
    if len(stats.bad_places) < _MAX_NAMED_BAD_ROWS:
        stats.bad_places.append(str(bad.to_error()))
    if isinstance(policy.max_bad_rows, int) and stats.bad_rows > policy.max_bad_rows:
        raise _too_many_bad_rows_error(stats, policy.max_bad_rows, name)


def _too_many_bad_rows_error(stats: TokenizeStats, max_bad_rows: int | str, name: str) -> UserError:
    count = f"{stats.bad_rows:,} of {stats.rows:,}, " if isinstance(max_bad_rows, str) else ""
    return UserError(
        f"{name}: more than data.max_bad_rows: {max_bad_rows} of its rows cannot be used ({count}the first: "
        f"{stats.bad_places[0]}); correct them, or raise that number"
    )


class _BadRowFile:
    """File of all bad rows, which is created with the first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def append(self, bad: BadRow) -> None:
        if self._path is not None:
            self._file = self._file or self._path.open("w", encoding="utf-8")
            self._file.write(f"{bad.to_error()}\n")

    def __enter__(self) -> _BadRowFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _encode_chunks(
    rows: Iterable[SourceRow | BadRow], encoder: RowEncoder, workers: int | Literal["auto"]
) -> Iterator[_EncodedChunk]:
    chunks = _chunks(rows)
    # More processes than chunks would be idle. For a single chunk, starting a process takes longer than the work.
    # All cores are used, because the other ranks only wait for the result.
    max_workers = usable_cpu_count() if workers == "auto" else workers
    first_chunks = list(islice(chunks, max_workers)) if max_workers > 1 else []
    chunks = chain(first_chunks, chunks)
    if len(first_chunks) < 2:
        for chunk in chunks:
            if isinstance(chunk, UserError):
                raise chunk
            yield _encode(chunk, encoder)
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
    """Yield rows in chunks for the workers, and at last the error that ended them, if any."""
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
    if isinstance(row, BadRow):
        return 0
    if isinstance(row, TextRow):
        return len(row.text)
    if isinstance(row, CompletionRow):
        return len(row.prompt) + len(row.completion)
    return sum(len(message.get("content") or "") for message in row.messages)


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
            kept += [(answer.tokens, answer.loss_mask) for answer in encoded]
        elif encoded.loss_mask[1:].any():  # Nothing predicts the first token.
            kept.append((encoded.tokens, encoded.loss_mask))
        else:
            untrained += 1
    return _EncodedChunk(len(chunk), bad, untrained, per_answer, answers, FlatSequences.from_pairs(kept))


# --- the workers ------------------------------------------------------------------------------------------------------
# The workers are forked, because a new process would import transformers for seconds. Using the parent's threads (of
# torch or the tokenizers library) would be unsafe after a fork, but the workers do not use them.

_WORKER_ENCODER: RowEncoder


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
    global _WORKER_ENCODER
    _WORKER_ENCODER = encoder
    gc.freeze()  # Collecting garbage among the parent's objects would copy their memory pages.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The terminal sends it to all processes. The parent handles it.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process dies, because a worker would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: RowChunk) -> _EncodedChunk:
    return _encode(chunk, _WORKER_ENCODER)
