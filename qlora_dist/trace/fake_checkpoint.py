"""A model's folder without weights: what its config.json would have beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.model.meta_model import causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder


class FakeCheckpoint(ModelFolder):
    """The tensors that transformers would save for a config.json, in 16 bit, none of which exist.

    Args:
        path: an empty folder, for config.json.
        config: its content.

    Raises:
        UserError: transformers makes no causal language model of it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config, self.quantized, self.entries = path, dict(config), {}, {}
        self.config.pop("quantization_config", None)
        (path / "config.json").write_text(json.dumps(self.config))
        saved_as = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        model = causal_lm_on_meta(self, getattr(torch, saved_as.removeprefix("torch.")))
        # by the names of a checkpoint: an expert's matrices are tensors of their own there
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
        """True: no tensor has values, and what config.json ties is tied."""
        return True


def truncate_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json of fewer layers. Lists with an entry for each layer are cut."""
    count = config["num_hidden_layers"]
    cut = {
        key: value[:num_layers] if isinstance(value, list) and len(value) == count else value
        for key, value in config.items()
    }
    return cut | {"num_hidden_layers": num_layers}
