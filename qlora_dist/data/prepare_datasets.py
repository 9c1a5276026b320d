"""From the configuration's sources to packed rows: through the cache, as if there were none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import TypeAdapter
from rich.console import Console

from qlora_dist.config.sections import DataConfig, SourceConfig
from qlora_dist.data.cache import PROGRESS_FILE, get_or_create_entry, remove_entry
from qlora_dist.data.cache_key import source_cache_key, source_file_stats
from qlora_dist.data.collate import PackedDataset, build_packed_dataset
from qlora_dist.data.hub_revision import record_prepared_revision, resolve_hub_revision, unprepared_dataset_error
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.row_fields import UnreadFields
from qlora_dist.data.source import read_source_rows, source_files
from qlora_dist.data.tokenize import TokenizeStats, tokenize_to_file
from qlora_dist.data.tokenize_progress import RowProgress
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.data.tokenizer import choose_pad_token_id
from qlora_dist.errors import UserError
from qlora_dist.runtime.system import user_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEQUENCES = "sequences.arrow"
_STATS = "stats.json"
_MAX_LISTED_FIELDS = 12
"""Ignored fields that are named in a line."""
BAD_ROWS_FILE = "bad-rows.txt"
"""The file in a cache entry that names every bad row with its reason."""


@dataclass(frozen=True)
class PreparedSource:
    """A source in tokens, whole, and in rows."""

    path: str
    """As the configuration names it."""
    weight: float
    stats: TokenizeStats
    """Of reading and tokenizing."""
    rows: PackedDataset
    folder: Path
    """The cache entry."""


class PreparedDatasets(NamedTuple):
    """The data of a run."""

    train: list[PreparedSource]
    eval: PreparedSource | None
    """None: the configuration names no file for it."""


def prepare_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console | None = None, rebuild_cache: bool = False
) -> PreparedDatasets:
    """Read, encode and pack the training and the held-out data; only what is not in the cache is read and encoded.

    Called by every process of a run, without any of them knowing of the others.

    Args:
        config: what and how.
        tokenizer: of the base model.
        console: for progress; none: silent.
        rebuild_cache: remove what is in the cache first.

    Raises:
        UserError: naming file, line and remedy.
    """
    console = console or Console(quiet=True)
    encoder = RowEncoder(tokenizer, config.mask, config.chat_template, config.multi_turn)
    fingerprint = encoder.fingerprint()  # of some tokenizers it takes a second

    def prepare_source(path_or_source: str | SourceConfig) -> PreparedSource:
        source = path_or_source if isinstance(path_or_source, SourceConfig) else SourceConfig(path=path_or_source)
        folder = _prepare_entry(source, config, encoder, fingerprint, console, rebuild_cache)
        stats, sequences = _read_entry(folder)
        return PreparedSource(
            path=source.path,
            weight=source.weight,
            stats=stats,
            rows=build_packed_dataset(
                sequences, config, choose_pad_token_id(tokenizer, stats.largest_token), source.path
            ),
            folder=folder,
        )

    return PreparedDatasets(
        [prepare_source(source) for source in config.train],
        None if config.eval is None else prepare_source(config.eval),
    )


def data_warnings(train: Sequence[PreparedSource], eval_source: PreparedSource | None) -> list[str]:
    """Say for people which fields are not read, and where to find all bad rows, in a line for each source."""
    lines = []
    for source in (*train, *([] if eval_source is None else [eval_source])):
        ignored = source.stats.ignored
        if ignored:
            more = f" and {len(ignored) - _MAX_LISTED_FIELDS} more" if len(ignored) > _MAX_LISTED_FIELDS else ""
            lines.append(f"{source.path}: not read: {', '.join(ignored[:_MAX_LISTED_FIELDS])}{more}")
        if source.stats.bad_rows > len(source.stats.bad_places):
            lines.append(f"{source.path}: all bad rows and what is wrong with them: {source.folder / BAD_ROWS_FILE}")
    same = [source for source in train if eval_source is not None and source.stats.sha256 == eval_source.stats.sha256]
    if eval_source is not None and same:
        lines.append(
            f"{eval_source.path}: data.eval holds the rows of {same[0].path}, which are trained, so that its loss does "
            "not show overfitting"
        )
    return lines


def data_cache_folder(config: DataConfig) -> Path:
    """Where the entries are.

    Raises:
        UserError: in the home of a user who has none.
    """
    if config.cache == DataConfig.model_fields["cache"].default:
        return user_cache_dir()  # the same folder, unless XDG_CACHE_HOME names another
    try:
        return Path(config.cache).expanduser()
    except RuntimeError:
        raise UserError(f"data.cache: {config.cache}: there is no such home folder; give a whole path") from None


def _prepare_entry(
    source: SourceConfig, config: DataConfig, encoder: RowEncoder, fingerprint: str, console: Console, force: bool
) -> Path:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    cache = data_cache_folder(config)
    hub_cache_key = "" if source_files(source) else source_cache_key(source, config, fingerprint, cache, say)
    hub = resolve_hub_revision(source.path, cache, hub_cache_key, say) if hub_cache_key else None
    revision = None if hub is None else hub.revision

    def make(folder: Path) -> None:
        if hub is not None and not hub.is_hub_reachable:
            raise unprepared_dataset_error(source.path, "its rows are no longer in the cache")
        stats_before = source_file_stats(source_files(source))
        names = UnreadFields()
        with RowProgress(console, source.path, folder / PROGRESS_FILE) as progress:
            stats = tokenize_to_file(
                read_source_rows(source, config.format, names, revision),
                encoder,
                folder / _SEQUENCES,
                workers=config.workers,
                on_bad_row=config.on_bad_row,
                max_bad_rows=config.max_bad_rows,
                bad_rows_path=folder / BAD_ROWS_FILE,
                source_name=source.path,
                progress=progress,
            )
        if source_file_stats(source_files(source)) != stats_before:
            raise UserError(f"{source.path}: was changed while it was read; start again when it is written")
        stats.ignored = names.ignored(encoder.template)
        (folder / _STATS).write_text(json.dumps(asdict(stats), indent=2) + "\n", encoding="utf-8")

    entry = cache / "sequences" / source_cache_key(source, config, fingerprint, cache, say, revision)
    if force and (hub is None or hub.is_hub_reachable):
        remove_entry(entry)
    get_or_create_entry(entry, make, say, _read_entry)
    if hub is not None and hub.is_hub_reachable:
        record_prepared_revision(cache, hub_cache_key, source.path, hub.revision)
    return entry


def _read_entry(folder: Path) -> tuple[TokenizeStats, TokenizedSequences]:
    """Open the files of an entry.

    Raises:
        ValueError: they are not what `tokenize_to_file` writes, or not of each other. pyarrow's errors are of this type.
    """
    stats = TypeAdapter(TokenizeStats).validate_json((folder / _STATS).read_bytes(), strict=True)
    sequences = TokenizedSequences.open(folder / _SEQUENCES)
    counts = len(sequences), int(sequences.lengths.sum()), int(sequences.loss_token_counts.sum())
    if counts != (stats.sequences, stats.tokens, stats.trained_tokens):
        raise ValueError(f"{_STATS} counts other sequences or tokens than {_SEQUENCES} holds")
    return stats, sequences
