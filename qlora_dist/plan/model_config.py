"""The config.json of a model, by the model's name or folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError

_BUNDLED_MODELS = Path(__file__).parent / "models"


def bundled_model_names() -> list[str]:
    return sorted(path.stem for path in _BUNDLED_MODELS.glob("*.json"))


def read_model_config(model: str) -> dict[str, Any]:
    """Read a config.json by its path, its folder, or a name of `bundled_model_names`.

    Raises:
        UserError: the file does not exist, or it describes no language model.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = _BUNDLED_MODELS / f"{path.name.lower()}.json"  # also by its name on the hub, OWNER/NAME
        if not path.is_file():
            matches = difflib.get_close_matches(Path(model).name.lower(), bundled_model_names(), n=3)
            hint = f"did you mean {', '.join(matches)}?" if matches else "give its config.json, or its folder"
            raise UserError(f"{model}: no config.json, no folder with one, and no model that is known by name; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a model's config.json") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: has no model_type; give the config.json of a language model")
    config = language_model_config(config)
    missing = [key for key in _REQUIRED_KEYS if key not in config]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}; give the config.json of a language model")
    return config


def language_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the language model, as that of a model of text only has it."""
    text = config.get("text_config")
    result = {**config, **text} if isinstance(text, Mapping) else dict(config)
    result.pop("text_config", None)
    if "tie_word_embeddings" in config:  # the whole model's applies, and not its part's
        result["tie_word_embeddings"] = config["tie_word_embeddings"]
    kind = result.get("model_type")
    return result | {"model_type": _TEXT_MODEL_TYPES.get(str(kind), kind)}


_TEXT_MODEL_TYPES = {
    "kimi_k2": "deepseek_v3",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Model types with the same layers, by the type of another model or of a multimodal model."""
_REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
