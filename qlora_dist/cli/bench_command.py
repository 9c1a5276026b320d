"""`qlora-dist bench`: layouts of one configuration, each as jobs of its own, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_dist.bench.bench_layouts import Cell, layout_names, make_cells, model_sizes, rank_numbers
from qlora_dist.bench.bench_machine import machine_of
from qlora_dist.bench.bench_page import render
from qlora_dist.bench.bench_result import BenchResult, LeftOut
from qlora_dist.bench.bench_table import left_out_sentence, losses_sentence, markdown, show
from qlora_dist.bench.layout_figures import compare_losses, figures, losses_of
from qlora_dist.bench.local_bench_job import run_job
from qlora_dist.bench.plot_bench import draw_files
from qlora_dist.bench.slurm_bench_job import Where, check_cells, run_as_job
from qlora_dist.config.config_file import changed
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.report.run_files import RunFiles

WARM_UP = 1
"""Steps of each run in which memory is allocated and kernels are chosen."""
_QUICK_LENGTH = 128
_QUICK_STEPS = 3


@dataclass(frozen=True)
class Asked:
    """What the command line says besides the configuration."""

    compare: str = "single-paged,fsdp2,two-mesh,zero3"
    ranks: str = "1,2"
    repeats: int = 3
    steps: int = 2
    """Of each run, after the warm-up; the last one of a layout's first run is profiled."""
    quick: bool = False
    json: Path | None = None
    out: Path | None = None
    """None: a folder in `run.dir`."""
    command: str = ""
    where: Where | None = None
    """None: on this machine."""


def bench(config: Config, asked: Asked, console: Console) -> bool:
    """Run the layouts in turns, and show and write what they do.

    Args:
        config: of all of them.
        asked: what is compared, how often, and where it goes.
        console: for the table.

    Returns:
        Whether the losses agree.

    Raises:
        UserError: an unknown layout, a number of ranks that the batch cannot be divided by, nothing left to compare, or
            a run that has failed by a mistake of the user's or of the cluster's.
    """
    names, ranks = layout_names(asked.compare), rank_numbers(asked.ranks)
    out = asked.out or Path(config.run.dir) / f"bench-{config.run.name}"
    steps, repeats = (_QUICK_STEPS, 1) if asked.quick else (asked.steps, asked.repeats)
    common = common_config(config, out, steps, asked.quick)
    cells, left_out = make_cells(common, names, ranks, model_sizes(common))
    for layout, number, reason in left_out:
        console.print(left_out_sentence(layout, number, reason), markup=False, soft_wrap=True)
    if not cells:
        raise UserError("bench: nothing is left to compare; give other layouts with --compare, or numbers with --ranks")
    if asked.where is not None:
        check_cells([_job(cell, profile=True) for cell in cells], asked.where)
    _make(out)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    runs: dict[str, list[RunFiles]] = {cell.name: [] for cell in cells}
    for repeat in range(repeats):  # A B A B: a machine that gets slower does so for all
        for cell in cells:
            job = _job(cell, profile=repeat == 0)
            run = run_job(job, out) if asked.where is None else run_as_job(job, asked.where, console)
            runs[cell.name].append(run)
            speed = f"{run.steps[WARM_UP]['tokens_per_s']:,.0f} tokens/s, loss {losses_of(run)[-1]:.4f}"
            console.print(f"{cell.name}, {repeat + 1} of {repeats}: {speed}", markup=False, soft_wrap=True)
    reference = runs[cells[0].name][0]
    layouts = [figures(cell, runs[cell.name], WARM_UP, reference) for cell in cells]
    result = BenchResult(
        command=asked.command,
        machine=machine_of(reference, date),
        config=common.model_dump(mode="json"),
        losses=compare_losses(cells[0].name, common.model.compute_dtype, layouts),
        layouts=layouts,
        left_out=[LeftOut(layout=layout, ranks=number, reason=reason) for layout, number, reason in left_out],
    )
    show(result, console)
    for path in _write(result, out, asked.json):
        console.print(str(path), markup=False, soft_wrap=True)
    if not result.losses.agree:
        Console(stderr=True).print(f"qlora-dist: {losses_sentence(result)}", markup=False, soft_wrap=True)
    return result.losses.agree


def common_config(config: Config, out: Path, steps: int, quick: bool) -> Config:
    """What all layouts train: the configuration with so many steps, and nothing beside them.

    Without dropout: each rank draws its own, and the losses could not be compared.
    """
    total = WARM_UP + steps
    sections: dict[str, dict[str, Any]] = {
        "lora": {"dropout": 0.0},
        "data": {"eval": None},
        "optim": {"warmup_steps": min(config.optim.warmup_steps, total)},
        "train": {
            "steps": total,
            "epochs": None,
            "eval_every": 0,
            "save_every": 0,
            "max_time": None,
            "spike_factor": None,
            "on_spike": "warn",
        },
        "run": {"dir": str(out / "runs"), "overwrite": True, "report": False, "trackers": []},
    }
    if quick:
        sections["data"]["seq_len"] = min(config.data.seq_len, _QUICK_LENGTH)
    return changed(config, sections)


def _job(cell: Cell, profile: bool) -> Cell:
    config = changed(cell.config, {"run": {"name": cell.name, "profile": profile}})
    return Cell(cell.layout, cell.ranks, config, cell.overrides)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made ({error.strerror}); give another folder") from None


def _write(result: BenchResult, out: Path, json_file: Path | None) -> Sequence[Path]:
    text = result.model_dump_json(indent=2) + "\n"
    texts = {out / "bench.json": text, out / "bench.html": render(result), out / "bench.md": markdown(result)}
    if json_file is not None:
        texts[json_file] = text
    for path, content in texts.items():
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another file with --json") from None
    return [*texts, *draw_files(result, out)]
