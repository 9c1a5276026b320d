"""`train --dry-run`: every check that needs no weights, and a result."""

from __future__ import annotations

import sys

import torch
from rich.console import Console

from qlora_dist.config.config_file import dump_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_action import dry_run_note
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.prediction import RunPrediction, predict_run
from qlora_dist.train.run_setup import RunSetup, set_up_run
from qlora_dist.train.summary import describe_run


def dry_run(config: Config, resume: str = "auto") -> None:
    """Check a run and print its complete configuration. The lines of `train` go to standard error.

    Raises:
        UserError: `train` would refuse the run on this machine. The run's name is checked last.
    """
    ranks = read_rank_info()
    console = Console(stderr=True, quiet=ranks.rank != 0, highlight=False, soft_wrap=True)
    setup = set_up_run(config, ranks, console)
    if ranks.rank != 0:
        return
    note = dry_run_note(config, resume)
    sys.stdout.write(dump_config(config))
    sys.stdout.flush()
    prediction = predict_run(setup)
    plan = prediction if isinstance(prediction, str) else prediction.describe()
    for line in [*describe_run(setup), plan, *([note] if note else []), _dry_run_result(setup, prediction)]:
        console.print(line, markup=False)


def _dry_run_result(setup: RunSetup, prediction: RunPrediction | str) -> str:
    if setup.device.type == "cuda" and isinstance(prediction, RunPrediction):
        card_bytes = torch.cuda.mem_get_info(setup.device)[1]
        if not prediction.memory.fits(card_bytes):
            return (
                "ok, but by its plan the run may not fit this GPU; `qlora-dist plan --search` finds settings that do. "
                "No weights were read"
            )
    return "ok: configuration, model folder and data are fine; no weights were read"
