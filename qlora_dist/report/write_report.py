"""`qlora-dist report`: runs as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from qlora_dist import __version__
from qlora_dist.errors import UserError
from qlora_dist.report.report_charts import draw_charts
from qlora_dist.report.report_table import plan_comparison_rows, report_rows, split_config_keys, summarize_run
from qlora_dist.report.run_files import RunFiles, read_run_files

REPORT_FILE = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, and return its file.

    By default, it is `report.html`, in the run's folder if there is one run, else in this folder.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    runs = [read_run_files(folder) for folder in folders]
    path = out or (folders[0] / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE))
    html = render_report(runs)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file with --out") from None
    return path


def report_json(folders: Sequence[Path]) -> str:
    """Return the figures as JSON: a list with an object for each run."""
    runs = [read_run_files(folder) for folder in folders]
    tree = [{"name": run.name, "path": str(run.path), **summarize_run(run), "config": run.config} for run in runs]
    return json.dumps(tree, indent=2, allow_nan=False)


def render_report(runs: Sequence[RunFiles]) -> str:
    different, equal = split_config_keys(runs)
    return render_html(
        "qlora_dist.report",
        "report.html.jinja",
        title=", ".join(run.name for run in runs),
        runs=runs,
        table=report_rows(runs),
        charts=draw_charts(runs),
        different=different,
        equal=equal,
        plans=[(run.name, plan_comparison_rows(run.summary["plan"])) for run in runs if run.summary.get("plan")],
        version=__version__,
    )


def render_html(package: str, template: str, **values: Any) -> str:
    """Return the text of a page from a template in a package's `templates`, which extends `page.html.jinja`."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("qlora_dist.report")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(values)
