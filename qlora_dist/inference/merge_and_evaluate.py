"""What merging costs, in held-out loss: the model that is written beside what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_dist.errors import UserError
from qlora_dist.inference.eval_loss import EvalLoss, compute_eval_loss
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import NamedAdapter, read_named_adapter
from qlora_dist.merge.merge_folder import MergeReport, merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.model_folder import ModelFolder

LossByModel = dict[str, EvalLoss]


def merge_and_evaluate(
    base: Path | None, adapter: Path, out: Path, options: MergeOptions, data: str, console: Console
) -> tuple[MergeReport, LossByModel]:
    """Merge, and measure the loss of what is written, of the 4-bit base with and without the adapter, and of a 16-bit
    base likewise if that is what was given.

    Args:
        base: as `merge_folder` takes it, as the others.
        adapter: its folder.
        out: folder to make.
        options: how.
        data: the held-out file, read as the adapter's run read its own.
        console: for progress.

    One model at a time is in memory, on the device that `train` would take. The parts are measured before anything is
    written, so that a mistake in the data is found first.

    Raises:
        UserError: as `merge_folder` and `compute_eval_loss`.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    named_adapter = read_named_adapter(adapter, "adapter")
    folder = str(base or named_adapter.base)
    as_trained = [
        f"model.quant_type={options.quant_type}",
        f"model.block_size={options.block_size}",
        f"model.double_quant={str(options.double_quant).lower()}",
    ]
    losses = _evaluate_model("4-bit base", folder, named_adapter, data, as_trained, console)
    if not ModelFolder(folder).is_quantized:
        experts = any(
            update.experts for update in named_adapter.saved.low_rank.values()
        )  # whose adapters need a base in 4 bit
        losses |= _evaluate_model(
            "16-bit base", folder, named_adapter, data, (), console, quantize=False, base_only=experts
        )
    report = merge_folder(base, adapter, out, options, console)
    merged = _evaluate_model(
        f"merged into {options.into}", str(out), named_adapter, data, (), console, quantize=False, base_only=True
    )
    return report, losses | merged


def _evaluate_model(
    name: str,
    base: str,
    adapter: NamedAdapter,
    data: str,
    overrides: Sequence[str],
    console: Console,
    quantize: bool = True,
    base_only: bool = False,
) -> LossByModel:
    """Of a base, and of base and adapter unless it is to be `base_only`."""
    config = inference_config(base, adapter.path, data, overrides)
    quiet = nullcontext() if not console.is_terminal else console.status(f"held-out loss: {name}")
    with quiet, open_inference_model(config, [] if base_only else [adapter], quantize) as loaded:
        losses = {} if base_only else {f"{name} + adapter": compute_eval_loss(loaded, data, console)}
        loaded.use(None)
        return losses | {name: compute_eval_loss(loaded, data, console)}


def print_loss_table(losses: LossByModel, console: Console) -> None:
    """As a table, the best first."""
    tokens = next(iter(losses.values())).tokens
    table = Table("model", "held-out loss", "perplexity", title=f"{tokens:,} tokens", title_justify="left")
    for name, eval_loss in sorted(losses.items(), key=lambda item: item[1].loss):
        table.add_row(name, f"{eval_loss.loss:.4f}", f"{eval_loss.perplexity:.3f}")
    console.print(table)
