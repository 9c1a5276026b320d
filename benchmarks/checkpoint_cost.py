"""Measure the time that writing checkpoints costs the training loop, and a checkpoint's size.

    python benchmarks/checkpoint_cost.py --base my-model-nf4 --data my-data.jsonl [--steps 17]

Two ranks train as in `make quickstart`, with a checkpoint after every second step. A checkpoint is copied, hashed and
written during the next step, so every second step carries its whole cost. The figures are the time per trained token
between two rows of metrics.jsonl, with and without a checkpoint, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos import run_attempt  # beside this file

from qlora_dist.checkpoint.manifest import find_checkpoints
from qlora_dist.checkpoint.resharding import ShardSpec
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import RunDir, run_path


def configuration(args: argparse.Namespace, out: str) -> Config:
    return Config.model_validate(
        {
            "model": {"base": args.base},
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
            "data": {"train": [args.data], "seq_len": 512},
            "parallel": {"base": "world"},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "train": {
                "steps": args.steps,
                "global_batch": 4,
                "checkpointing": "none",
                "eval_every": 0,
                "save_every": 2,
                "device": "cpu",
            },
            "run": {"dir": out, "name": "run"},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="4-bit folder")
    parser.add_argument("--data", required=True, help="JSONL of conversations")
    parser.add_argument("--steps", type=int, default=17)
    args = parser.parse_args()

    log = RunDir.log

    def log_with_time(self: RunDir, row: dict[str, Any]) -> None:
        log(self, {**row, "at": time.perf_counter()})

    RunDir.log = log_with_time
    with tempfile.TemporaryDirectory() as out:
        config = configuration(args, out)
        if not run_attempt(config, 2, None, f"{out}/output.log"):
            print(Path(f"{out}/output.log").read_text(), file=sys.stderr)
            return 1
        path = run_path(config.run)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        newest = find_checkpoints(path / "checkpoints")[0]
        nbytes = sum(file.stat().st_size for file in newest.iterdir())
        cuts = json.loads((newest / "manifest.json").read_text())["cuts"].values()
        parameters = sum(ShardSpec(tuple(cut["shape"]), 0, 1).numel(0) for cut in cuts)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for before, row in itertools.pairwise(rows[2:]):  # without the first steps, which warm up
        seconds[before["step"] % 2 == 0].append((row["at"] - before["at"]) / row["tokens"])
    with_checkpoint, without = (statistics.median(seconds[saving]) for saving in (True, False))
    print(f"step with a checkpoint: {1e3 * with_checkpoint:.3f} ms a token, median of {len(seconds[True])}")
    print(f"step without:           {1e3 * without:.3f} ms a token, median of {len(seconds[False])}")
    print(f"ratio {with_checkpoint / without:.3f}")
    print(f"{nbytes:,} bytes for {parameters:,} parameters: {nbytes / (12 * parameters):.4f} of 12 bytes each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
