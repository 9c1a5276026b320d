"""transformers' Trainer: alone, with accelerate's FSDP plugin (--fsdp 1 or 2), or with DeepSpeed's ZeRO-3 (--zero3)."""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
import transformers
from marks import WORLD_SIZE, mark_and_restart_peak, padded_batch, static_bytes, steps, wait_for_turn, write_mark
from peft_model import peft_model, warm_up_imports

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        # with the defaults all parameters would stay gathered between forward and backward
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    },
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A data set whose items are a rank's batches of a step, made on access, so that other steps take no memory."""

    def __len__(self) -> int:
        return len(steps()) * WORLD_SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return padded_batch(steps()[index // WORLD_SIZE], index % WORLD_SIZE, WORLD_SIZE)


class SequentialTrainer(transformers.Trainer):
    """A trainer that keeps the order of the batches."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class MarkCallback(transformers.TrainerCallback):
    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        mark_and_restart_peak("loaded", wrapped=type(kwargs["model"]).__name__)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        wait_for_turn()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        write_mark("step")

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
        if "loss" in logs:
            write_mark("loss", loss=logs["loss"])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        write_mark("end", static_bytes=static_bytes())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--fsdp", choices=["1", "2"])
    parser.add_argument("--zero3", action="store_true")
    parser.add_argument("--checkpointing", choices=["full", "none"], default="full")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warm_up_imports(args.base)
    mark_and_restart_peak("imported")
    options: dict[str, Any] = {}
    if args.fsdp:
        settings = {"version": int(args.fsdp), "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options = {"fsdp": "full_shard auto_wrap" if args.fsdp == "1" else True, "fsdp_config": settings}
    if args.zero3:
        import deepspeed

        # the loopback counts bytes, but ranks of one machine would send some through shared memory
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        options = {"deepspeed": ZERO3}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(steps()),
            per_device_train_batch_size=1,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch" if args.zero3 else "adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=args.checkpointing == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        )
        model = peft_model(args.base)  # after the arguments, which enable DeepSpeed for the model
        write_mark("model")
        trainer = SequentialTrainer(
            model=model,
            args=arguments,
            train_dataset=Batches(),
            data_collator=lambda items: items[0],
            callbacks=[MarkCallback()],
        )
        trainer.train()
        kinds = sorted({type(module).__name__ for module in trainer.model_wrapped.modules()})
        engine = next((k for k in kinds if "FSDP" in k or "FullySharded" in k or "DeepSpeed" in k), None)
        write_mark("engine", engine=engine or type(trainer.model_wrapped).__name__)


if __name__ == "__main__":
    main()
