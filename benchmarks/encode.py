"""Compare the speed of encoding rows with the bare tokenizer on rendered texts, in turns.

    python benchmarks/encode.py --data train.jsonl --tokenizer FOLDER [--rows 4096] [--mask assistant]
        [--template NAME]

`--data` is JSONL with `messages`, `prompt` and `completion`, or `text`. Bare is `tokenizer(texts)` of transformers, in
batches of the same size. The figures are medians over the turns of wall time and processor time. On a shared machine
processor time is more reliable. The parts are rendering with its spans, and tokenizing with the flags. There is one
process, whose tokenizer uses all cores unless TOKENIZERS_PARALLELISM is false.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from qlora_dist.data.row_encoder import EncodedSequence, RowEncoder
from qlora_dist.data.source_row import BadRow, CompletionRow, MessagesRow, SourceRow, TextRow


def read(path: str, rows: int) -> list[SourceRow]:
    source_rows: list[SourceRow] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()[:rows], start=1):
        tree, place = json.loads(line), f"{path}, line {number}"
        if "messages" in tree:
            source_rows.append(MessagesRow(place, tree["messages"], tree.get("tools")))
        elif "completion" in tree:
            source_rows.append(CompletionRow(place, tree["prompt"], tree["completion"]))
        else:
            source_rows.append(TextRow(place, tree["text"]))
    return source_rows


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--mask", default="assistant", choices=("assistant", "last", "all"))
    parser.add_argument("--template")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    encoder = RowEncoder(tokenizer, args.mask, args.template)
    rows = read(args.data, args.rows)
    batches = [rows[start : start + args.batch] for start in range(0, len(rows), args.batch)]
    encoded = [item for batch in batches for item in encoder.encode(batch)]
    good = [row for row, item in zip(rows, encoded, strict=True) if isinstance(item, EncodedSequence)]
    if len(good) < len(rows):
        bad = next(item for item in encoded if isinstance(item, BadRow))
        Console().print(f"{len(rows) - len(good)} rows are left out, the first because: {bad.location}: {bad.reason}")
    batches = [good[start : start + args.batch] for start in range(0, len(good), args.batch)]
    rendered = [[encoder._write(row) for row in batch] for batch in batches]
    texts = [[item.text for item in batch] for batch in rendered]
    tokens = sum(len(item.tokens) for item in encoded if isinstance(item, EncodedSequence))
    trained = sum(int(item.trained.sum()) for item in encoded if isinstance(item, EncodedSequence))

    variants: dict[str, Callable[[], Any]] = {
        "bare": lambda: [tokenizer(batch, add_special_tokens=False) for batch in texts],
        "encode": lambda: [encoder.encode(batch) for batch in batches],
        "of it rendering": lambda: [encoder._write(row) for batch in batches for row in batch],
        "of it tokens and flags": lambda: [
            encoder._text_encoder.encode(batch, not isinstance(good[0], MessagesRow)) for batch in rendered
        ],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, function in variants.items():
            times[name].append(timed(function))
    medians = {name: [statistics.median(column) for column in zip(*t, strict=True)] for name, t in times.items()}

    table = Table("", "us/row", "us/row of processor", "tokens/s", "of bare", "of bare, processor")
    for name, (wall, processor) in medians.items():
        speed = [medians["bare"][0] / wall, medians["bare"][1] / processor]
        per_row = [1e6 * seconds / len(good) for seconds in (wall, processor)]
        table.add_row(
            name, *(f"{value:.0f}" for value in per_row), f"{tokens / wall:,.0f}", *map("{:.2f}".format, speed)
        )
    console = Console()
    console.print(f"{len(good)} rows, {tokens} tokens, {trained} trained, mask {args.mask}")
    console.print(table)


if __name__ == "__main__":
    main()
