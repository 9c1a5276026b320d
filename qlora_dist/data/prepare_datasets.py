"""Preparation of the configured data: from sources to packed rows, by way of the cache."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data.cache import PROGRESS_FILE, get_or_create_entry, remove_entry
from qlora_dist.data.cache_key import source_cache_key, source_file_stats
from qlora_dist.data.collate import PackedDataset, build_packed_dataset
from qlora_dist.data.hub import record_prepared_revision, resolve_hub_revision, unprepared_dataset_error
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.row_fields import UnreadFields
from qlora_dist.data.source import read_source_rows, source_files
from qlora_dist.data.tokenize import BadRowPolicy, TokenizeStats, tokenize_to_file
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.data.tokenizer import choose_pad_token_id
from qlora_dist.errors import UserError
from qlora_dist.runtime.system import user_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEQUENCES = "sequences.arrow"
_STATS = "stats.json"
_MAX_LISTED_FIELDS = 12
"""Ignored fields that a message lists at most."""
BAD_ROWS_FILE = "bad-rows.txt"
"""Name of the file in a cache entry that lists every bad row with its reason."""


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """Source that has been tokenized and packed."""

    path: str
    """Path or name in the configuration."""
    weight: float
    stats: TokenizeStats
    dataset: PackedDataset
    cache_entry: Path


class PreparedDatasets(NamedTuple):
    """Training data of a run, and its held-out data if any are configured."""

    train: list[PreparedSource]
    eval: PreparedSource | None


def prepare_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console | None = None,
    *,
    rebuild_cache: bool = False,
) -> PreparedDatasets:
    """Read, tokenize and pack the training and the held-out data; read and tokenize only what is not in the cache.

    Every process of a run calls it, independently of the others. `console` shows progress; without one, it is silent.
    """
    console = console or Console(quiet=True)
    encoder = RowEncoder(tokenizer, config.mask, config.chat_template, config.multi_turn)
    fingerprint = encoder.fingerprint()  # once for all sources, because some tokenizers need a second

    def prepare_source(path_or_source: str | SourceConfig) -> PreparedSource:
        source = path_or_source if isinstance(path_or_source, SourceConfig) else SourceConfig(path=path_or_source)
        folder = _prepare_entry(source, config, encoder, fingerprint, console, rebuild_cache=rebuild_cache)
        stats, sequences = _read_entry(folder)
        return PreparedSource(
            path=source.path,
            weight=source.weight,
            stats=stats,
            dataset=build_packed_dataset(
                sequences, config, choose_pad_token_id(tokenizer, stats.largest_token), source.path
            ),
            cache_entry=folder,
        )

    return PreparedDatasets(
        [prepare_source(source) for source in config.train],
        None if config.eval is None else prepare_source(config.eval),
    )


def data_warnings(train: Sequence[PreparedSource], eval_source: PreparedSource | None) -> list[str]:
    """Return a line per source about fields that are ignored and about the file that lists all bad rows."""
    lines = []
    for source in (*train, *([] if eval_source is None else [eval_source])):
        ignored = source.stats.ignored
        if ignored:
            more = f" and {len(ignored) - _MAX_LISTED_FIELDS} more" if len(ignored) > _MAX_LISTED_FIELDS else ""
            lines.append(f"{source.path}: fields that are ignored: {', '.join(ignored[:_MAX_LISTED_FIELDS])}{more}")
        if source.stats.bad_rows > len(source.stats.bad_places):
            lines.append(f"{source.path}: all bad rows and their reasons: {source.cache_entry / BAD_ROWS_FILE}")
    same = [source for source in train if eval_source is not None and source.stats.sha256 == eval_source.stats.sha256]
    if eval_source is not None and same:
        lines.append(
            f"{eval_source.path}: data.eval holds the rows of {same[0].path}, which are trained, so its loss cannot "
            "show overfitting"
        )
    return lines


def data_cache_folder(config: DataConfig) -> Path:
    if config.cache == DataConfig.model_fields["cache"].default:
        return user_cache_dir()  # It is the same folder, unless XDG_CACHE_HOME names another.
    try:
        return Path(config.cache).expanduser()
    except RuntimeError:
        raise UserError(f"data.cache: {config.cache}: there is no such home folder; give an absolute path") from None


def _prepare_entry(
    source: SourceConfig,
    config: DataConfig,
    encoder: RowEncoder,
    fingerprint: str,
    console: Console,
    *,
    rebuild_cache: bool,
) -> Path:
    def log(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    cache = data_cache_folder(config)
    hub_cache_key = "" if source_files(source) else source_cache_key(source, config, fingerprint, cache, log)
    hub = resolve_hub_revision(source.path, cache, hub_cache_key, log) if hub_cache_key else None
    revision = None if hub is None else hub.revision

    def create(folder: Path) -> None:
        if hub is not None and not hub.is_hub_reachable:
            raise unprepared_dataset_error(source.path, "its rows are no longer in the cache")
        stats_before = source_file_stats(source_files(source))
        unread_fields = UnreadFields()
        with RowProgress(console, source.path, folder / PROGRESS_FILE) as progress:
            stats = tokenize_to_file(
                read_source_rows(source, config.format, unread_fields, revision),
                encoder,
                folder / _SEQUENCES,
                workers=config.workers,
                bad_rows=BadRowPolicy(config.on_bad_row, config.max_bad_rows, folder / BAD_ROWS_FILE),
                source_name=source.path,
                progress=progress,
            )
        if source_file_stats(source_files(source)) != stats_before:
            raise UserError(f"{source.path}: changed while it was read; start again when it is written")
        stats.ignored = unread_fields.ignored_by(encoder.chat_template)
        (folder / _STATS).write_text(json.dumps(asdict(stats), indent=2) + "\n", encoding="utf-8")

    entry = cache / "sequences" / source_cache_key(source, config, fingerprint, cache, log, revision)
    if rebuild_cache and (hub is None or hub.is_hub_reachable):
        remove_entry(entry)
    get_or_create_entry(entry, create, log, _read_entry)
    if hub is not None and hub.is_hub_reachable:
        record_prepared_revision(cache, hub_cache_key, source.path, hub.revision)
    return entry


def _read_entry(folder: Path) -> tuple[TokenizeStats, TokenizedSequences]:
    """Open the files of an entry.

    Raises:
        ValueError: `tokenize_to_file` did not write them, or they do not belong together. pyarrow's errors are of this
            type.
    """
    stats = TypeAdapter(TokenizeStats).validate_json((folder / _STATS).read_bytes(), strict=True)
    sequences = TokenizedSequences.open(folder / _SEQUENCES)
    counts = len(sequences), int(sequences.lengths.sum()), int(sequences.loss_token_counts.sum())
    if counts != (stats.sequences, stats.tokens, stats.trained_tokens):
        raise ValueError(f"{_STATS} has other counts than {_SEQUENCES}")
    return stats, sequences


_LINE_INTERVAL_S = 10.0
_NOTE_INTERVAL_S = 2.0


class RowProgress:
    """Progress display that counts rows without a known total, and keeps a file up to date for waiting processes."""

    def __init__(self, console: Console, name: str, progress_path: Path) -> None:
        self._console, self._name, self._note = console, name, progress_path
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(f"tokenizing {name}", total=None, done="")
        self._start = self._last_line_s = self._last_note_s = time.monotonic()

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        done = f"{rows:,} rows, {rows / (now - self._start):,.0f} rows/s"
        self._bar.update(self._task, done=done)
        if now - self._last_note_s > _NOTE_INTERVAL_S:
            self._last_note_s = now
            with contextlib.suppress(OSError):
                self._note.write_text(done, encoding="utf-8")
        if not self._console.is_terminal and now - self._last_line_s > _LINE_INTERVAL_S:
            self._last_line_s = now
            self._console.print(f"tokenizing {self._name}: {done}", markup=False, highlight=False)

    def __enter__(self) -> RowProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
