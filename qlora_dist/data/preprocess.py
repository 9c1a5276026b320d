"""`qlora-dist preprocess`: tokenize a run's data into the cache, and print statistics and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.data.prepare_datasets import (
    PreparedDatasets,
    PreparedSource,
    data_cache_folder,
    data_warnings,
    prepare_datasets,
)
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError

DecodeFn = Callable[[npt.NDArray[np.int32]], str]

_TRAINED_STYLE = "bold green"
_TRAINED_MARKS = "[[", "]]"


def preprocess_data(
    config: Config,
    console: Console,
    progress_console: Console,
    *,
    num_samples: int = 0,
    as_json: bool = False,
    rebuild_cache: bool = False,
) -> None:
    """Prepare the data and print statistics. Only the tokenizer of the model is read.

    The statistics are a table and `num_samples` sequences of each source as they are trained, or one JSON object.
    """
    base = Path(config.model.base)
    tokenizer = load_tokenizer(base, config.model.add_tokens)
    if (base / "config.json").is_file():
        check_seq_len(config.data.seq_len, _read(base / "config.json"), config.model.base)
    prepared = prepare_datasets(config.data, tokenizer, progress_console, rebuild_cache=rebuild_cache)
    figures = [_figures(name, source, config) for name, source in _named(prepared)]
    if as_json:
        tree = {"cache": str(data_cache_folder(config.data)), "sources": figures}
        console.print(json.dumps(tree, indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(_table(figures, config.data.seq_len))
    lines = []
    for figure, (_, source) in zip(figures, _named(prepared), strict=True):
        if per_answer := source.stats.describe_per_answer_rows():
            lines.append(f"{source.path}: {per_answer}")
        lines.append(f"{figure['path']}: {figure['folder']}")
        lines += [f"  skipped: {location}" for location in figure["bad_places"]]
    for line in (*lines, *data_warnings(prepared.train, prepared.eval)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def decode(tokens: npt.NDArray[np.int32]) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for _, source in _named(prepared):
        colourless = console.color_system is None or console.no_color  # With NO_COLOR, a terminal shows bold text only.
        for sample in _sample_texts(source, num_samples, decode, use_brackets=colourless):
            console.print(sample, soft_wrap=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); get the file again") from None
    return tree if isinstance(tree, dict) else {}


def _named(prepared: PreparedDatasets) -> list[tuple[str, PreparedSource]]:
    held_out = [] if prepared.eval is None else [("eval", prepared.eval)]
    return [*(("train", source) for source in prepared.train), *held_out]


def _figures(name: str, source: PreparedSource, config: Config) -> dict[str, Any]:
    stats, rows, lengths = source.stats, source.dataset, source.dataset.sequences.lengths
    truncation_stats = rows.truncation_stats
    return {
        "set": name,
        "path": source.path,
        "weight": source.weight,
        "rows": stats.rows,
        "bad_rows": stats.bad_rows,
        "bad_places": stats.bad_places,
        "untrained_rows": stats.untrained_rows,
        "per_answer_rows": stats.per_answer_rows,
        "per_answer_sequences": stats.per_answer_sequences,
        "sequences": stats.sequences,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "longest": int(lengths.max()),
        "length_p50": float(np.percentile(lengths, 50)),
        "length_p95": float(np.percentile(lengths, 95)),
        "over_seq_len": float((lengths > config.data.seq_len).mean()),
        "cut_sequences": truncation_stats.truncated + truncation_stats.split,
        "dropped_sequences": truncation_stats.dropped,
        "cut_answers": truncation_stats.cut_answers,
        "cut_trained_tokens": truncation_stats.cut_trained_tokens,
        "untrained_pieces": truncation_stats.untrained,
        "trained_sequences": truncation_stats.segments,
        "trained_within_seq_len": truncation_stats.trained_tokens,
        "rows_per_epoch": len(rows) * source.weight,
        # Without packing, it depends on which rows share a batch.
        "padding": 1 - rows.utilization if rows.is_packed else None,
        "ignored_fields": stats.ignored,
        "key": source.cache_entry.name,
        "folder": str(source.cache_entry),
    }


def _table(figures: list[dict[str, Any]], seq_len: int) -> Table:
    """Return a table with one column per source, because there are more figures than sources."""
    table = Table("", *(escape(f"{figure['set']}: {Path(figure['path']).name}") for figure in figures))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows": lambda f: f"{f['rows']:,}",
        "bad, skipped": lambda f: f"{f['bad_rows']:,}",
        "nothing to train, left out": lambda f: f"{f['untrained_rows']:,}",
        "trained answer by answer": lambda f: f"{f['per_answer_rows']:,}",
        "sequences": lambda f: f"{f['sequences']:,}",
        "tokens": lambda f: f"{f['tokens']:,}",
        "trained": lambda f: f"{f['trained_tokens']:,} ({100 * f['trained_tokens'] / f['tokens']:.1f} %)",
        "length, median": lambda f: f"{f['length_p50']:,.0f}",
        "length, 95 % below": lambda f: f"{f['length_p95']:,.0f}",
        "longest": lambda f: f"{f['longest']:,}",
        f"longer than {seq_len:,}": lambda f: f"{100 * f['over_seq_len']:.1f} %",
        "cut to that, or into pieces": lambda f: f"{f['cut_sequences']:,}",
        "dropped for their length": lambda f: f"{f['dropped_sequences']:,}",
        "whole answers lost": lambda f: f"{f['cut_answers']:,}",
        "trained tokens lost": lambda f: f"{f['cut_trained_tokens']:,}",
        "nothing to train after that": lambda f: f"{f['untrained_pieces']:,}",
        "sequences that are trained": lambda f: f"{f['trained_sequences']:,}",
        "rows of a batch, per epoch": lambda f: f"{f['rows_per_epoch']:,.0f}",
        "padding in them": lambda f: "depends on the batch" if f["padding"] is None else f"{100 * f['padding']:.1f} %",
        "cache key": lambda f: f["key"][:16],
    }
    for name, value in lines.items():
        table.add_row(name, *(Text(value(figure), justify="right") for figure in figures))
    return table


def _sample_texts(source: PreparedSource, count: int, decode: DecodeFn, *, use_brackets: bool) -> Iterator[Text]:
    """Yield the first sequences as text, truncated as in training, with trained tokens in colour or brackets."""
    sequences = source.dataset.sequences
    segments = source.dataset.segments  # in the order of the packed rows
    segments = segments.take(np.lexsort((segments.start, segments.sequence_index))[:count])
    for index, start, length in zip(
        *(column.tolist() for column in (segments.sequence_index, segments.start, segments.length)), strict=True
    ):
        whole = len(sequences.tokens(index))
        tokens = sequences.tokens(index)[start : start + length]
        trained = sequences.loss_mask(index)[start : start + length].copy()
        trained[0] = False
        extent = (
            f", tokens {start + 1:,} to {start + length:,} of {whole:,}" if length < whole else f": {whole:,} tokens"
        )
        title = f"{source.path}, sequence {index + 1}{extent}, {int(trained.sum()):,} trained"
        yield _mark_trained_tokens(title, tokens, trained, decode, use_brackets=use_brackets)


def _mark_trained_tokens(
    title: str, tokens: npt.NDArray[np.int32], trained: npt.NDArray[np.bool_], decode: DecodeFn, *, use_brackets: bool
) -> Text:
    text = Text.assemble(("\n" + title + "\n", "bold"))
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    written = ""
    for start, end in pairwise(borders):
        # Decode from the start, because some tokenizers drop the space before the first word of a text.
        decoded = decode(tokens[:end])
        part, written = decoded[len(written) :], decoded
        if trained[start]:
            before, after = _TRAINED_MARKS if use_brackets else ("", "")
            text.append(f"{before}{part}{after}", _TRAINED_STYLE)
        else:
            text.append(part)
    return text
