"""Held-out loss of a merged model beside that of its base and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_dist.config.schema import Config
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
    """Merge, and measure the held-out loss of the merged model and of what it is made of.

    The 4-bit base is measured with and without the adapter, and so is a 16-bit base if one is given. A base whose
    published format the run kept is measured as it is. One model at a time is in memory, on the device that `train`
    would take. The merged model is measured last, so that a mistake in the data is found before anything is written.

    Without `base`, the adapter names it. The held-out file `data` is read as the adapter's run read its own.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    named_adapter = read_named_adapter(adapter, "adapter")
    folder = str(base or named_adapter.base)
    as_trained = [
        f"model.quant_type={options.quant_type}",
        f"model.block_size={options.block_size}",
        f"model.double_quant={str(options.double_quant).lower()}",
        f"model.keep_format={str(options.keep_format).lower()}",
    ]
    config = inference_config(folder, adapter, data, as_trained)
    trained_base = "base as published" if options.keep_format else "4-bit base"
    losses = _evaluate_model(trained_base, config, [named_adapter], data, console)
    if not options.keep_format and not ModelFolder(folder).is_quantized:
        # adapters of experts need a base in 4 bit
        has_experts = any(update.experts for update in named_adapter.saved.low_rank.values())
        adapters = [] if has_experts else [named_adapter]
        config = inference_config(folder, adapter, data)
        losses |= _evaluate_model("16-bit base", config, adapters, data, console, quantize=False)
    report = merge_folder(base, adapter, out, options, console)
    # matrices without an update may have kept their published format
    keeps = str(bool(ModelFolder(out).published)).lower()
    config = inference_config(str(out), adapter, data, [f"model.keep_format={keeps}"])
    losses |= _evaluate_model(f"merged into {options.into}", config, [], data, console, quantize=False)
    return report, losses


def _evaluate_model(
    name: str, config: Config, adapters: Sequence[NamedAdapter], data: str, console: Console, *, quantize: bool = True
) -> LossByModel:
    """Measure the loss with the adapter, if there is one, and without it."""
    quiet = nullcontext() if not console.is_terminal else console.status(f"held-out loss: {name}")
    with quiet, open_inference_model(config, adapters, quantize=quantize) as loaded:
        losses = {f"{name} + adapter": compute_eval_loss(loaded, data, console)} if adapters else {}
        loaded.set_adapter(None)
        return losses | {name: compute_eval_loss(loaded, data, console)}


def print_loss_table(losses: LossByModel, console: Console) -> None:
    """Print the losses as a table, the best first."""
    tokens = next(iter(losses.values())).tokens
    table = Table("model", "held-out loss", "perplexity", title=f"{tokens:,} tokens", title_justify="left")
    for name, eval_loss in sorted(losses.items(), key=lambda item: item[1].loss):
        table.add_row(name, f"{eval_loss.loss:.4f}", f"{eval_loss.perplexity:.3f}")
    console.print(table)
