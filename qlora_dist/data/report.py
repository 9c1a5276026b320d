"""`qlora-dist preprocess`: the data of a run, tokenized into the cache, in figures and samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_dist.config import Config
from qlora_dist.data.prepare import Prepared, PreparedSource, cache_folder, prepare, remarks
from qlora_dist.data.tokenizer import load_tokenizer

Decode = Callable[[npt.NDArray[np.int32]], str]

_TRAINED_STYLE = "bold green"
_TRAINED_MARKS = "[[", "]]"


def preprocess(
    config: Config, console: Console, progress: Console, *, show: int = 0, as_json: bool = False, force: bool = False
) -> None:
    """Prepare the data and print what became of it.

    Args:
        config: of the run; of its model only the tokenizer is read.
        console: for the result.
        progress: for what is said meanwhile.
        show: so many sequences of each source.
        as_json: one object instead of a table.
        force: tokenize anew what is in the cache.

    Raises:
        UserError: naming file, line and remedy.
    """
    tokenizer = load_tokenizer(Path(config.model.base))
    prepared = prepare(config.data, tokenizer, progress, force)
    figures = [_figures(name, source, config) for name, source in _named(prepared)]
    if as_json:
        tree = {"cache": str(cache_folder(config.data)), "sources": figures}
        console.print(json.dumps(tree, indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(_table(figures, config.data.seq_len))
    for figure in figures:
        said = [f"{figure['path']}: {figure['folder']}", *(f"  skipped: {place}" for place in figure["bad_places"])]
        console.print("\n".join(said), markup=False, highlight=False, soft_wrap=True)

    for remark in remarks(prepared.train, prepared.eval):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)

    def decode(tokens: npt.NDArray[np.int32]) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for _, source in _named(prepared):
        for index in range(min(show, len(source.rows.sequences))):
            colourless = console.color_system is None or console.no_color  # NO_COLOR leaves a terminal bold alone
            console.print(_sample(source, index, decode, marks=colourless), soft_wrap=True)


def _named(prepared: Prepared) -> list[tuple[str, PreparedSource]]:
    held_out = [] if prepared.eval is None else [("eval", prepared.eval)]
    return [*(("train", source) for source in prepared.train), *held_out]


def _figures(name: str, source: PreparedSource, config: Config) -> dict[str, Any]:
    stats, rows, lengths = source.stats, source.rows, source.rows.sequences.lengths
    return {
        "set": name,
        "path": source.path,
        "weight": source.weight,
        "rows": stats.rows,
        "bad_rows": stats.bad_rows,
        "bad_places": stats.bad_places,
        "untrained_rows": stats.untrained_rows,
        "sequences": stats.sequences,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "longest": int(lengths.max()),
        "length_p50": float(np.percentile(lengths, 50)),
        "length_p95": float(np.percentile(lengths, 95)),
        "over_seq_len": float((lengths > config.data.seq_len).mean()),
        "rows_per_epoch": len(rows) * source.weight,
        # without packing it depends on which rows meet in a batch
        "padding": 1 - rows.utilization if rows.packed else None,
        "ignored_fields": stats.ignored,
        "key": source.folder.name,
        "folder": str(source.folder),
    }


def _table(figures: list[dict[str, Any]], seq_len: int) -> Table:
    """A column for each source: there are more figures than sources."""
    table = Table("", *(escape(f"{figure['set']}: {Path(figure['path']).name}") for figure in figures))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows": lambda f: f"{f['rows']:,}",
        "bad, skipped": lambda f: f"{f['bad_rows']:,}",
        "nothing to train, left out": lambda f: f"{f['untrained_rows']:,}",
        "sequences": lambda f: f"{f['sequences']:,}",
        "tokens": lambda f: f"{f['tokens']:,}",
        "trained": lambda f: f"{f['trained_tokens']:,} ({100 * f['trained_tokens'] / f['tokens']:.1f} %)",
        "length, median": lambda f: f"{f['length_p50']:,.0f}",
        "length, 95 % below": lambda f: f"{f['length_p95']:,.0f}",
        "longest": lambda f: f"{f['longest']:,}",
        f"longer than {seq_len:,}": lambda f: f"{100 * f['over_seq_len']:.1f} %",
        "rows of a batch, per epoch": lambda f: f"{f['rows_per_epoch']:,.0f}",
        "padding in them": lambda f: "depends on the batch" if f["padding"] is None else f"{100 * f['padding']:.1f} %",
        "cache key": lambda f: f["key"][:16],
    }
    for name, value in lines.items():
        table.add_row(name, *(Text(value(figure), justify="right") for figure in figures))
    return table


def _sample(source: PreparedSource, index: int, decode: Decode, marks: bool) -> Text:
    """A sequence as text, special tokens and all; what is trained is in colour, or between marks."""
    sequences = source.rows.sequences
    tokens, trained = sequences.tokens(index), sequences.trained(index)
    title = f"{source.path}, sequence {index + 1}: {len(tokens):,} tokens, {int(trained.sum()):,} trained"
    text = Text.assemble(("\n" + title + "\n", "bold"))
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    written = ""
    for start, end in pairwise(borders):
        # the whole beginning, since some tokenizers drop the space before the first word of a text
        upto = decode(tokens[:end])
        part, written = upto[len(written) :], upto
        if trained[start]:
            before, after = _TRAINED_MARKS if marks else ("", "")
            text.append(f"{before}{part}{after}", _TRAINED_STYLE)
        else:
            text.append(part)
    return text
