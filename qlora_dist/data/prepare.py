"""From the configuration's sources to packed rows: through the cache, as if there were none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from qlora_dist.config import DataConfig, SourceConfig
from qlora_dist.data.cache import NOTE, prepared, remove
from qlora_dist.data.encode import Encoder
from qlora_dist.data.key import file_states, source_key
from qlora_dist.data.progress import RowProgress
from qlora_dist.data.revision import choose_revision, not_prepared, remember
from qlora_dist.data.rows import Rows, build_rows
from qlora_dist.data.sequences import Sequences
from qlora_dist.data.source import read_rows, source_files
from qlora_dist.data.tokenize import Stats, tokenize
from qlora_dist.data.tokenizer import padding_id
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEQUENCES = "sequences.arrow"
_STATS = "stats.json"


@dataclass(frozen=True)
class PreparedSource:
    """A source in tokens, whole, and in rows."""

    path: str
    """As the configuration names it."""
    weight: float
    stats: Stats
    """Of reading and tokenizing."""
    rows: Rows
    folder: Path
    """The cache entry."""


class Prepared(NamedTuple):
    """The data of a run."""

    train: list[PreparedSource]
    eval: PreparedSource | None
    """None: the configuration names no file for it."""


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console | None = None, force: bool = False
) -> Prepared:
    """Read, encode and pack the training and the held-out data; only what is not in the cache is read and encoded.

    Called by every process of a run, without any of them knowing of the others.

    Args:
        config: what and how.
        tokenizer: of the base model.
        console: for progress; none: silent.
        force: remove what is in the cache first.

    Raises:
        UserError: naming file, line and remedy.
    """
    console = console or Console(quiet=True)
    encoder = Encoder(tokenizer, config.mask, config.chat_template, config.multi_turn)
    fingerprint = encoder.fingerprint()  # of some tokenizers it takes a second

    def one(given: str | SourceConfig) -> PreparedSource:
        source = given if isinstance(given, SourceConfig) else SourceConfig(path=given)
        folder = _prepared_entry(source, config, encoder, fingerprint, console, force)
        return PreparedSource(
            path=source.path,
            weight=source.weight,
            stats=Stats(**json.loads((folder / _STATS).read_text(encoding="utf-8"))),
            rows=build_rows(Sequences.open(folder / _SEQUENCES), config, padding_id(tokenizer), source.path),
            folder=folder,
        )

    return Prepared([one(source) for source in config.train], None if config.eval is None else one(config.eval))


def cache_folder(config: DataConfig) -> Path:
    """Where the entries are."""
    return Path(config.cache).expanduser()


def _prepared_entry(
    source: SourceConfig, config: DataConfig, encoder: Encoder, fingerprint: str, console: Console, force: bool
) -> Path:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    cache = cache_folder(config)
    memory = "" if source_files(source) else source_key(source, config, fingerprint, cache, say)
    hub = choose_revision(source.path, cache, memory, say) if memory else None
    revision = None if hub is None else hub.revision

    def make(folder: Path) -> None:
        if hub is not None and not hub.reachable:
            raise not_prepared(source.path, "its rows are no longer in the cache")
        before = file_states(source_files(source))
        with RowProgress(console, source.path, folder / NOTE) as progress:
            stats = tokenize(
                read_rows(source, config.format, revision),
                encoder,
                folder / _SEQUENCES,
                workers=config.workers,
                on_bad_row=config.on_bad_row,
                max_bad_rows=config.max_bad_rows,
                name=source.path,
                progress=progress,
            )
        if file_states(source_files(source)) != before:
            raise UserError(f"{source.path}: was changed while it was read; start again when it is written")
        (folder / _STATS).write_text(json.dumps(asdict(stats), indent=2) + "\n", encoding="utf-8")

    entry = cache / "sequences" / source_key(source, config, fingerprint, cache, say, revision)
    if force and (hub is None or hub.reachable):
        remove(entry)
    prepared(entry, make, say)
    if hub is not None and hub.reachable:
        remember(cache, memory, source.path, hub.revision)
    return entry
