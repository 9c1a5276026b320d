"""Files of tiny models of many types, with the tokenizer and the data that all of them share."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from tests.helpers import tiny_models
from tests.helpers.tiny_configs import tiny_config
from tests.helpers.tiny_overrides import WITHOUT_CLASS

STEPS = 2
AUTO_CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "image-text-to-text": transformers.AutoModelForImageTextToText,
}
"""Class of transformers for each task."""

_NOT_RANDOM = ("A_log", "dt_bias", "norm", "ln_", "time_", "rglru", "recurrent_param", "conv1d")
"""Parts of names of parameters that keep the values of their class, because others would be out of range."""


class SweepFolder:
    """Folder of the models of a task."""

    def __init__(self, path: Path, task: str) -> None:
        self.path = path
        self.auto_class: Any = AUTO_CLASSES[task]
        self._tokenizer = path / "tokenizer"
        tiny_models.make_tokenizer().save_pretrained(self._tokenizer)
        self._config = tiny_models.make_config(path, path, train__steps=STEPS, optim__warmup_steps=0)

    def folder(self, model_type: str) -> Path:
        return self.path / model_type

    def source(self, model_type: str) -> Path:
        return self.folder(model_type) / "source"

    def quantized(self, model_type: str) -> Path:
        return self.folder(model_type) / "nf4"

    def make_source(self, model_type: str) -> Path:
        """Save a tiny model of a type in bf16. If transformers has no class for it, only the configuration is right."""
        source, config = self.source(model_type), tiny_config(model_type)
        if model_type in WITHOUT_CLASS:
            config.save_pretrained(source)
            save_file({"model.embed_tokens.weight": torch.zeros(1)}, source / "model.safetensors")
        else:
            torch.manual_seed(0)
            model = self.auto_class.from_config(config)
            _randomize(model)
            model.generation_config = transformers.GenerationConfig()  # that of some classes cannot be saved
            model.to(torch.bfloat16).save_pretrained(source)
        shutil.copytree(self._tokenizer, source, dirs_exist_ok=True)
        return source

    def load_config(self, model_type: str, overrides: Iterable[str], world_size: int) -> Config:
        settings = [
            f"model.base={self.quantized(model_type)}",
            f"run.dir={self.folder(model_type) / 'runs'}",
            f"run.name={world_size}-ranks",
            "data.seq_len=64",
            "train.global_batch=8",
            f"train.micro_batch={8 // world_size}",
        ]
        return load_config(self._config, [*settings, *overrides])

    def without_folders(self, message: str) -> str:
        """Return a message without the folders of this sweep."""
        for folder in self.path.glob("*/*"):
            message = message.replace(f"{folder}/", "").replace(str(folder), f"the {folder.name} folder")
        return message


def _randomize(model: torch.nn.Module) -> None:
    """Give weights and biases values that have an effect. The default ones are small, and zero for biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(part in name for part in _NOT_RANDOM):
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
                elif name.endswith(("bias", "sinks")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
