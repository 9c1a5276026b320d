"""Command `qlora-dist bench`: compare layouts of one configuration. Jobs of the layouts run in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_dist.bench.bench_job import SlurmPlacement, check_slurm_cases, run_local_job, run_slurm_job
from qlora_dist.bench.bench_layouts import (
    BenchCase,
    count_model_bytes,
    make_bench_cases,
    parse_layout_names,
    parse_rank_counts,
)
from qlora_dist.bench.bench_page import render_bench_page, save_bench_plots
from qlora_dist.bench.bench_result import BenchResult
from qlora_dist.bench.bench_table import (
    bench_markdown,
    loss_comparison_message,
    print_bench_table,
    skipped_layout_message,
)
from qlora_dist.bench.compare_losses import compare_losses, step_losses
from qlora_dist.bench.layout_figures import bench_machine_of_run, summarize_layout
from qlora_dist.config.config_file import apply_changes
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.report.run_files import RunFiles

WARM_UP_STEPS = 1
"""Warm-up steps of each run, in which memory is allocated and kernels are chosen."""
_QUICK_LENGTH = 128
_QUICK_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Options of the command line, apart from the configuration."""

    compare: str = "single-paged,fsdp2,two-mesh,zero3"
    ranks: str = "1,2"
    repeats: int = 3
    steps: int = 2
    """Steps of each run after the warm-up. The last step of a layout's first run is profiled."""
    quick: bool = False
    json: Path | None = None
    out: Path | None = None
    """Folder for results; None: a folder in `run.dir`."""
    command: str = ""
    placement: SlurmPlacement | None = None
    """SLURM cluster of the jobs; None: this machine."""


def run_bench(config: Config, args: BenchArgs, console: Console) -> bool:
    """Run the layouts in turns, then print and write the results. Return whether the losses agree."""
    names, ranks = parse_layout_names(args.compare), parse_rank_counts(args.ranks)
    out = args.out or Path(config.run.dir) / f"bench-{config.run.name}"
    steps, repeats = (_QUICK_STEPS, 1) if args.quick else (args.steps, args.repeats)
    common = bench_config(config, out, steps, quick=args.quick)
    cases, skipped = make_bench_cases(common, names, ranks, count_model_bytes(common))
    for layout in skipped:
        console.print(skipped_layout_message(layout), markup=False, soft_wrap=True)
    if not cases:
        raise UserError("bench: nothing is left to compare; give other layouts with --compare, or numbers with --ranks")
    if args.placement is not None:
        check_slurm_cases([_named_case(case, profile=True) for case in cases], args.placement)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made ({error.strerror}); give another folder") from None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    runs: dict[str, list[RunFiles]] = {case.name: [] for case in cases}
    for repeat in range(repeats):  # A B A B, so that a machine that gets slower affects all layouts
        for case in cases:
            job = _named_case(case, profile=repeat == 0)
            run = run_local_job(job, out) if args.placement is None else run_slurm_job(job, args.placement, console)
            runs[case.name].append(run)
            speed = f"{run.steps[WARM_UP_STEPS]['tokens_per_s']:,.0f} tokens/s, loss {step_losses(run)[-1]:.4f}"
            console.print(f"{case.name}, {repeat + 1} of {repeats}: {speed}", markup=False, soft_wrap=True)
    reference = runs[cases[0].name][0]
    layouts = [summarize_layout(case, runs[case.name], WARM_UP_STEPS, reference) for case in cases]
    result = BenchResult(
        command=args.command,
        machine=bench_machine_of_run(reference, date),
        config=common.model_dump(mode="json"),
        losses=compare_losses(cases[0].name, common.model.compute_dtype, layouts),
        layouts=layouts,
        left_out=skipped,
    )
    print_bench_table(result, console)
    for path in _write_results(result, out, args.json):
        console.print(str(path), markup=False, soft_wrap=True)
    if not result.losses.agree:
        Console(stderr=True).print(f"qlora-dist: {loss_comparison_message(result)}", markup=False, soft_wrap=True)
    return result.losses.agree


def bench_config(config: Config, out: Path, steps: int, *, quick: bool) -> Config:
    """Return the common configuration of the layouts: `steps` steps without evaluation or checkpoints.

    It has no dropout, because each rank draws its own numbers and the losses could not be compared.
    """
    total = WARM_UP_STEPS + steps
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
    return apply_changes(config, sections)


def _named_case(case: BenchCase, *, profile: bool) -> BenchCase:
    config = apply_changes(case.config, {"run": {"name": case.name, "profile": profile}})
    return BenchCase(case.layout, case.ranks, config, case.overrides)


def _write_results(result: BenchResult, out: Path, json_file: Path | None) -> Sequence[Path]:
    text = result.model_dump_json(indent=2) + "\n"
    texts = {
        out / "bench.json": text,
        out / "bench.html": render_bench_page(result),
        out / "bench.md": bench_markdown(result),
    }
    if json_file is not None:
        texts[json_file] = text
    for path, content in texts.items():
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another file with --json") from None
    return [*texts, *save_bench_plots(result, out)]
