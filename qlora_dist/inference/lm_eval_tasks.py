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

from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.inference.inference_model import InferenceModel

_NETWORK_LIBRARIES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}
"""Whose errors say that something was not reached; which of them is there depends on releases."""


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how."""

    names: Sequence[str]
    num_fewshot: int | None = None
    """None: as each task has it."""
    limit: int | None = None
    """Rows of each task; None: all."""
    batch_size: int = 8
    folder: Path | None = None
    """Of tasks of one's own."""


def check_tasks(options: TaskOptions) -> None:
    """See whether the harness is installed, knows the tasks and has their data, before a model is loaded.

    Raises:
        UserError: it is not, or does not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness; pip install 'qlora-dist[eval]'")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _task_manager(tuple(options.names), options.folder).preload(list(options.names))


def run_tasks(loaded: InferenceModel, options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Scores by task and metric. Called on all ranks; each of them computes the metrics.

    Raises:
        UserError: there is no such task.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that computes
    from lm_eval.evaluator import simple_evaluate

    from qlora_dist.inference.lm_eval_model import LmEvalModel

    model = LmEvalModel(loaded, load_tokenizer(loaded.folder.path), options.batch_size)
    results = simple_evaluate(
        model,
        tasks=list(options.names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=_task_manager(tuple(options.names), options.folder),
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {} if results is None else {name: _numeric_metrics(found) for name, found in results["results"].items()}


@cache
def _task_manager(names: tuple[str, ...], folder: Path | None) -> Any:
    """What knows the tasks. All of the harness's own are read, in seconds, where the folder has not all."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        """The harness's own, which says in a sentence that data is out of reach, and loads it before the model too."""

        ahead: Any = None
        """What was loaded ahead, for the first evaluation: the harness changes the tasks that it evaluates."""

        def preload(self, task_list: list[str]) -> None:
            self.ahead = self.load(task_list)

        def load(self, task_list: Any) -> Any:
            if self.ahead is not None:
                loaded, self.ahead = self.ahead, None
                return loaded
            try:
                return super().load(task_list)
            except Exception as error:
                if not _is_data_unavailable(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(
                    f"--tasks {','.join(names)}: the data of a task cannot be loaded ({reason}); run the same command "
                    "where there is a network, with --limit 1, and give this machine its cache (HF_HOME)"
                ) from None

    path = None if folder is None else str(folder)
    for defaults in (False, True) if folder is not None else (True,):
        manager = Manager(include_path=path, include_defaults=defaults)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise UserError(f"--tasks {missing[0]}: no such task; see `lm-eval ls tasks`, or give --task-folder")


def _is_data_unavailable(error: Exception) -> bool:
    """Whether it is about files or a network, and not a mistake in what was loaded."""
    from datasets.exceptions import DatasetsError

    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return (
        isinstance(error, (OSError, DatasetsError))
        or not libraries.isdisjoint(_NETWORK_LIBRARIES)
        or str(error).startswith("Couldn't find cache for")  # of datasets: another part of it was loaded
    )


def _numeric_metrics(found: dict[str, Any]) -> dict[str, Any]:
    """Of `acc,none` and the like, with the filter's name where there is one."""
    return {
        key.removesuffix(",none"): value
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def print_scores(name: str, scores: dict[str, dict[str, Any]]) -> None:
    """A table of an adapter's scores."""
    table = Table("task", "metric", "value", "standard error", title=name)
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or metric == "sample_len":
                continue
            plain, comma, kind = metric.partition(",")
            error = metrics.get(f"{plain}_stderr{comma}{kind}")
            table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console().print(table)
