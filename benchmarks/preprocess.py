"""Compare the rows preprocessed per second with the speed of tokenizing alone, in turns in one process.

    python benchmarks/preprocess.py --base my-model --data my-data.jsonl [--rows 20000] [--repeats 5] [--workers auto]

Tokenizing alone is transformers' `tokenizer(texts)` of rendered conversations, which uses all cores. Preprocessing also
reads, renders, masks and writes, from the file to the entry in an empty cache. The rows are copies of the data file
with questions and answers paired differently in each copy. It prints medians, and the ratio of each turn, because the
machine's speed may change between turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlora_dist.config.sections import DataConfig
from qlora_dist.data.prepare_datasets import prepare_datasets
from qlora_dist.data.tokenizer import load_tokenizer


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def write_data(source: Path, out: Path, count: int) -> list[list[dict[str, str]]]:
    """Write `count` conversations to a file, and return them."""
    conversations = [json.loads(line)["messages"] for line in source.open(encoding="utf-8")]
    rows = []
    for index in range(count):
        copy, number = divmod(index, len(conversations))
        question, answer = conversations[number], conversations[(number + 7919 * copy) % len(conversations)]
        rows.append([*question[:-1], {**answer[-1], "content": f"{answer[-1]['content']}\n{index}"}])
    out.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", default="auto")
    args = parser.parse_args()
    workers = args.workers if args.workers == "auto" else int(args.workers)
    tokenizer = load_tokenizer(args.base)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        texts = tokenizer.apply_chat_template(write_data(args.data, data, args.rows), tokenize=False)
        tokenizer_s, preprocess_s = [], []
        for repeat in range(args.repeats + 1):
            config = DataConfig(train=[str(data)], cache=f"{folder}/{repeat}", workers=workers)
            tokenizer_s.append(seconds(lambda: tokenizer(texts, add_special_tokens=False)))
            preprocess_s.append(seconds(partial(prepare_datasets, config, tokenizer)))
        del tokenizer_s[0], preprocess_s[0]  # the first turn warms up
        (source,), _ = prepare_datasets(config, tokenizer)
        warm = seconds(lambda: prepare_datasets(config, tokenizer))

    tokens, cores = source.stats.tokens, len(os.sched_getaffinity(0))
    print(f"{args.rows:,} rows, {tokens:,} tokens, {cores} cores, medians of {args.repeats}")
    for name, times in (("tokenizer(texts)", tokenizer_s), ("preprocess", preprocess_s)):
        median = statistics.median(times)
        print(f"{name:18}{median:8.2f} s  {args.rows / median:10,.0f} rows/s  {tokens / median:12,.0f} tokens/s")
    ratios = [t / p for t, p in zip(tokenizer_s, preprocess_s, strict=True)]
    print(f"preprocess / tokenizer: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"from the cache: {warm:.2f} s")


if __name__ == "__main__":
    main()
