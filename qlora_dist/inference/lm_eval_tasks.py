"""Scores on tasks of lm-evaluation-harness, which is the extra `eval`."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_dist.errors import UserError
from qlora_dist.inference.inference_model import InferenceModel

_NETWORK_LIBRARIES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}
"""Libraries whose errors mean that a server was not reached. Which ones are installed depends on releases."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options for evaluation on tasks."""

    names: Sequence[str]
    num_fewshot: int | None = None
    """Number of examples before each question; None for each task's own."""
    limit: int | None = None
    """Number of rows of each task; None for all."""
    batch_size: int = 8
    folder: Path | None = None
    """Folder of YAML files with the user's own tasks."""


def check_tasks(options: TaskOptions) -> None:
    """Check before a model is loaded that the harness is installed, knows the tasks and has their data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness; pip install 'qlora-dist[eval]'")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _task_manager(tuple(options.names), options.folder).preload(list(options.names))


def run_tasks(loaded: InferenceModel, options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Return scores by task and metric. Call it on all ranks; each of them computes the metrics."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else its bootstrap forks a process, which would compute
    from lm_eval.evaluator import simple_evaluate

    from qlora_dist.inference.lm_eval_model import LmEvalModel

    model = LmEvalModel(loaded, loaded.load_tokenizer(), options.batch_size)
    results = simple_evaluate(
        model,
        tasks=list(options.names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=_task_manager(tuple(options.names), options.folder),
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {} if results is None else {name: _numeric_metrics(metrics) for name, metrics in results["results"].items()}


@cache
def _task_manager(names: tuple[str, ...], folder: Path | None) -> Any:
    """Return the task manager. It reads the harness's own tasks, in seconds, only if the folder lacks one."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        """Task manager of the harness that can load data before the model, and reports missing data in one sentence."""

        preloaded: Any = None
        """Tasks for the first evaluation only, because the harness changes the tasks that it evaluates."""

        def preload(self, task_list: list[str]) -> None:
            self.preloaded = self.load(task_list)

        def load(self, task_list: Any) -> Any:
            if self.preloaded is not None:
                loaded, self.preloaded = self.preloaded, None
                return loaded
            try:
                return super().load(task_list)
            except Exception as error:
                if not _is_data_unavailable(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(
                    f"--tasks {','.join(names)}: the data of a task cannot be loaded ({reason}); run the same command "
                    "where there is a network, with --limit 1, and let this machine use its cache (HF_HOME)"
                ) from None

    path = None if folder is None else str(folder)
    for defaults in (False, True) if folder is not None else (True,):
        manager = Manager(include_path=path, include_defaults=defaults)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise UserError(f"--tasks {missing[0]}: no such task; see `lm-eval ls tasks`, or give --task-folder")


def _is_data_unavailable(error: Exception) -> bool:
    """Whether an error is about files or a network, and not about the content of what was loaded."""
    from datasets.exceptions import DatasetsError

    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return (
        isinstance(error, (OSError, DatasetsError))
        or not libraries.isdisjoint(_NETWORK_LIBRARIES)
        # from datasets, whose cache holds another part of the data set
        or str(error).startswith("Couldn't find cache for")
    )


def _numeric_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Select the numbers, and drop the name of the filter `none`, as in `acc,none`."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def print_scores(name: str, scores: dict[str, dict[str, Any]]) -> None:
    """Print a table of an adapter's scores."""
    table = Table("task", "metric", "value", "standard error", title=name)
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or metric == "sample_len":
                continue
            plain, comma, kind = metric.partition(",")
            error = metrics.get(f"{plain}_stderr{comma}{kind}")
            table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console().print(table)
