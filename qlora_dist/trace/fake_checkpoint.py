"""A model's folder without weights: the tensors that belong to a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.model.model_class import causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder


class FakeCheckpoint(ModelFolder):
    """A folder with the names and shapes of the tensors that transformers would save in 16 bit, but without data.

    Args:
        path: empty folder, into which config.json is written.
        config: content of config.json.

    Raises:
        UserError: transformers has no causal language model for the configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config_folder, self.config, self.entries = path, path, dict(config), {}
        self.quantized, self.published = {}, {}
        self.config.pop("quantization_config", None)
        (path / "config.json").write_text(json.dumps(self.config))
        dtype_name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        model = causal_lm_on_meta(self, getattr(torch, dtype_name.removeprefix("torch.")))
        # use a checkpoint's names, in which each expert's matrices are separate tensors
        tensors = revert_weight_conversion(model, model.state_dict())
        self.entries = {
            name: TensorEntry(
                path=path / "model.safetensors",
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                start=0,
                stop=tensor.nbytes,
            )
            for name, tensor in tensors.items()
        }

    def tensors_equal(self, one: str, other: str) -> bool:
        """Return True, because no tensor has values: matrices are tied if config.json ties them."""
        return True


def truncate_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return a config.json with fewer layers. Lists with an entry for each layer are shortened."""
    count = config["num_hidden_layers"]
    truncated = {
        key: value[:num_layers] if isinstance(value, list) and len(value) == count else value
        for key, value in config.items()
    }
    return truncated | {"num_hidden_layers": num_layers}
