"""`qlora-dist report`: runs as one HTML page that needs nothing else, no network either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_dist import __version__
from qlora_dist.errors import UserError
from qlora_dist.report.html_page import page
from qlora_dist.report.report_charts import draw
from qlora_dist.report.report_table import differences, numbers, plan_rows, table
from qlora_dist.report.run_files import RunFiles, read_run_files

REPORT = "report.html"


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        folders: of the runs.
        out: the file; None: `report.html`, in the run's folder where there is one run, and else in this one.

    Returns:
        The file.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    runs = [read_run_files(folder) for folder in folders]
    path = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    html = render(runs)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file with --out") from None
    return path


def report_json(folders: Sequence[Path]) -> str:
    """The same numbers for other programs: a list with an object a run."""
    runs = [read_run_files(folder) for folder in folders]
    tree = [{"name": run.name, "path": str(run.path), **numbers(run), "config": run.config} for run in runs]
    return json.dumps(tree, indent=2, allow_nan=False)


def render(runs: Sequence[RunFiles]) -> str:
    """The page's text."""
    different, equal = differences(runs)
    return page(
        "qlora_dist.report",
        "report.html.jinja",
        title=", ".join(run.name for run in runs),
        runs=runs,
        table=table(runs),
        charts=draw(runs),
        different=different,
        equal=equal,
        plans=[(run.name, plan_rows(run.summary["plan"])) for run in runs if run.summary.get("plan")],
        version=__version__,
    )
