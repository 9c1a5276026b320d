"""Keys of other trainers and their equivalents here: docs/training.md, "Coming from another trainer"."""

from __future__ import annotations

from collections.abc import Collection

MIGRATION_PAGE = 'docs/training.md, "Coming from another trainer"'
_FOREIGN_KEYS = {
    "model.base": "base_model model_name_or_path",
    "model.compute_dtype": "bf16 fp16 dtype torch_dtype",
    "model.attention": "attn_implementation flash_attention flash_attn sdp_attention",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target_modules target_modules lora_target lora_target_linear",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.dora": "use_dora peft_use_dora",
    "data.train": "datasets dataset dataset_name",
    "data.eval": "test_datasets eval_dataset",
    "data.chat_template": "template",
    "data.seq_len": "max_length max_seq_length max_seq_len cutoff_len sequence_len",
    "data.packing": "sample_packing",
    "data.mask": "train_on_inputs train_on_input train_on_prompt assistant_only_loss completion_only_loss",
    "data.cache": "dataset_prepared_path",
    "data.workers": "dataset_processes dataset_num_proc preprocessing_num_workers",
    "parallel.base, parallel.adapter": "fsdp fsdp_config fsdp_version",
    "parallel.engine": "deepspeed",
    "optim.name": "optim optimizer",
    "optim.lr": "learning_rate",
    "optim.lora_plus_ratio": "loraplus_lr_ratio",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon",
    "optim.schedule": "lr_scheduler lr_scheduler_type",
    "optim.warmup_steps": "warmup_ratio",
    "train.steps": "max_steps",
    "train.epochs": "num_epochs num_train_epochs",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size",
    "train.checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "train.compile": "torch_compile",
    "train.eval_every": "eval_steps",
    "train.save_every": "save_steps",
    "train.keep_checkpoints": "save_total_limit",
    "run.dir, run.name": "output_dir",
    "run.trackers": "report_to",
    "run.project": "wandb_project",
}
_OTHER_ADVICE = {
    "write train.global_batch: rows of a step, over all ranks; only train.micro_batch is per rank": (
        "gradient_accumulation_steps batch_size"
    ),
    "leave it out: training is always QLoRA, with a base in 4 bit": (
        "load_in_4bit quantization_bit use_peft adapter finetuning_type"
    ),
    "put these rows into a file of their own and name it in data.eval": "val_set_size val_size",
    "leave it out: metrics.jsonl has every step": "logging_steps",
}
_KEYS_BY_ADVICE = {f"write {own_key}": keys for own_key, keys in _FOREIGN_KEYS.items()} | _OTHER_ADVICE
KEY_ADVICE = {key: advice for advice, keys in _KEYS_BY_ADVICE.items() for key in keys.split()}
"""Advice for keys of axolotl, LLaMA-Factory, TRL, transformers and torchtune, by key."""
_TYPICAL_KEYS = {
    "axolotl": "base_model datasets sequence_len micro_batch_size num_epochs adapter val_set_size",
    "LLaMA-Factory": "finetuning_type stage template cutoff_len lora_rank lora_target dataset",
    "TRL": "dataset_name use_peft load_in_4bit lora_r max_length lora_target_modules dataset_config",
    "torchtune": "tokenizer checkpointer recipe_checkpoint loss optimizer dataset",
}


def detect_trainer(keys: Collection[str]) -> str | None:
    """Return the trainer whose files have these keys at the top, or None if fewer than two are another trainer's."""
    if sum(key in KEY_ADVICE for key in keys) < 2:
        return None
    return max(_TYPICAL_KEYS, key=lambda trainer: len(set(_TYPICAL_KEYS[trainer].split()).intersection(keys)))
