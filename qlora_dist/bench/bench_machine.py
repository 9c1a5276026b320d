"""Where a benchmark was run, as its runs say. No torch."""

from __future__ import annotations

from qlora_dist.bench.bench_result import BenchMachine
from qlora_dist.plan.calibration_file import load_calibration
from qlora_dist.report.run_files import RunFiles


def bench_machine_of_run(run: RunFiles, date: str) -> BenchMachine:
    """What its rank 0 was on, which may be another machine than this one.

    Args:
        run: the first of all.
        date: when the benchmark began.
    """
    machine_fields = {key: value for key, value in run.process["machine"].items() if key != "threads"}
    return BenchMachine(
        date=date, links_bytes_per_s=_links() if machine_fields["device"] == "cpu" else {}, **machine_fields
    )


def _links() -> dict[str, float]:
    measured = load_calibration().devices.get("cpu")
    if measured is None:
        return {}
    links = {"inside a node": measured.inside_bytes, "between nodes": measured.between_bytes}
    return {name: speed for name, speed in links.items() if speed}
