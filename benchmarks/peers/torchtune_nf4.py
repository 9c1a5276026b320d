"""torchtune's recipe lora_finetune_distributed on NF4 (torchao), with marks where it logs and saves.

It quantizes a folder in 16 bit itself with different blocks, so losses are near the others', but not equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchtune.training
from marks import (
    IGNORED,
    WORLD_SIZE,
    mark_and_restart_peak,
    padded_batch,
    static_bytes,
    steps,
    wait_for_turn,
    write_mark,
)
from omegaconf import OmegaConf


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A data set whose items are a rank's batches of a step, made on access."""

    def __init__(self, tokenizer: Any) -> None:
        pass

    def __len__(self) -> int:
        return len(steps()) * WORLD_SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        wait_for_turn()  # the only call of the recipe on all ranks at the beginning of a step
        batch = padded_batch(steps()[index // WORLD_SIZE], index % WORLD_SIZE, WORLD_SIZE)
        return {"tokens": batch["input_ids"], "labels": batch["labels"]}


def collate(items: list[dict[str, torch.Tensor]], padding_idx: int, ignore_idx: int) -> dict[str, torch.Tensor]:
    """Return the item, which is already a batch."""
    return dict(items[0])


class Tokenizer:
    """A tokenizer that the recipe requires but does not use, because rows are already tokens."""

    pad_id = 0


class Logger:
    """A logger that writes marks on rank 0 in each step."""

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, values: dict[str, Any], step: int) -> None:
        write_mark("step")
        write_mark("loss", loss=float(values["loss"]))

    def close(self) -> None:
        pass


def recipe_module() -> Any:
    """Import the recipe from its file beside torchtune, because it cannot be imported from a package."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_distributed.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_distributed", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recipe(recipe_module().LoRAFinetuneRecipeDistributed):  # type: ignore[misc]
    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.ignore_labels_cache = torch.full((1024, 1), IGNORED)  # a batch has more rows than `batch_size`

    def train(self) -> None:
        mark_and_restart_peak("loaded")
        super().train()

    def save_checkpoint(self, epoch: int) -> None:
        write_mark("end", static_bytes=static_bytes())


def configuration(base: str, output: str, longest: int) -> Any:
    config = json.loads((Path(base) / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    model = {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": longest,
        "norm_eps": config["rms_norm_eps"],
        "rope_base": int(rope.get("rope_theta") or config["rope_theta"]),
        "scale_factor": int(rope.get("factor", 1)),
        "lora_rank": 16,
        "lora_alpha": 32,
        "quantize_base": True,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": base,
        "checkpoint_files": sorted(file.name for file in Path(base).glob("*.safetensors")),
        "recipe_checkpoint": None,
        "output_dir": output,
        "model_type": "LLAMA3_2",
    }
    return OmegaConf.create(
        {
            "output_dir": output,
            "model": model,
            "tokenizer": {"_component_": "torchtune_nf4.Tokenizer"},
            "checkpointer": checkpointer,
            "resume_from_checkpoint": False,
            "dataset": {"_component_": "torchtune_nf4.Batches"},
            "collate_fn": "torchtune_nf4.collate",
            "seed": 0,
            "shuffle": False,
            "batch_size": 1,
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.0, "lr": 2e-4},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 0,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "epochs": 1,
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "clip_grad_norm": 1.0,
            "metric_logger": {"_component_": "torchtune_nf4.Logger"},
            "log_every_n_steps": 1,
            "device": "cpu",
            "dtype": "bf16",
            "enable_activation_checkpointing": True,
            "enable_activation_offloading": False,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "quantization_config" in json.loads((Path(args.base) / "config.json").read_text()):
        raise ValueError("torchtune quantizes weights in 16 bit itself, and --base is in 4 bit: give it in 16 bit")
    torch.distributed.init_process_group("gloo")
    mark_and_restart_peak("imported")
    # the parts of the recipe that need a GPU do not train: they log its memory and empty its cache
    torchtune.training.cleanup_before_training = lambda: None
    torchtune.training.get_memory_stats = lambda device: {}
    torchtune.training.log_memory_stats = lambda stats: None
    longest = max(len(row["ids"]) for step in steps() for row in step["rows"])
    with tempfile.TemporaryDirectory() as output:
        config = configuration(args.base, output, longest)
        recipe = Recipe(config)
        recipe.setup(config)
        recipe.train()
        write_mark("engine", engine=type(recipe._model).__name__)
        recipe.cleanup()


if __name__ == "__main__":
    main()
