"""transformers' own class for the config.json of a folder, on the meta device and without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from qlora_dist.compat.transformers import load_model_config
from qlora_dist.errors import UserError
from qlora_dist.layers.embedding import vocab_weight_names
from qlora_dist.model.language_model import Towers, remove_towers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.model_support import check_model_class, check_text_config
from qlora_dist.model.quantizable import has_tied_embeddings
from qlora_dist.model.text_forward import check_text_forward
from qlora_dist.model.weight_sources import target_names


def causal_lm_on_meta(folder: ModelFolder, dtype: torch.dtype, attention: str = "sdpa") -> transformers.PreTrainedModel:
    """Build transformers' class for the folder's config.json, without weights and without towers.

    Raises:
        UserError: transformers has no such class, or its text cannot be trained.
    """
    model = whole_model_on_meta(folder, dtype, attention)
    keep_language_model(model, folder.path)
    return model


def keep_language_model(model: transformers.PreTrainedModel, path: Path) -> Towers:
    """Remove the towers of a class on meta, check that its text can be trained, and return the towers' names.

    Raises:
        UserError: it cannot. The message names `path`, the model's folder.
    """
    check_text_config(model, path)
    towers = remove_towers(model)
    check_model_class(model, path)
    if towers.paths:
        check_text_forward(model, path)
    return towers


def whole_model_on_meta(
    folder: ModelFolder, dtype: torch.dtype, attention: str = "sdpa"
) -> transformers.PreTrainedModel:
    """Build transformers' class for the folder's config.json without weights, the towers of a multimodal one included.

    Raises:
        UserError: transformers has no such class.
    """
    try:
        config = load_model_config(folder.config_folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it would make transformers quantize the model
        if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
            attention = "eager"  # SDPA has no cap, and transformers would omit it silently
        requested = "eager" if attention == "eager" else None  # None: SDPA where the architecture has it
        model = _from_config(config, dtype, requested)
        if has_tied_embeddings(model) and _stores_untied_head(model, folder):
            if config.get_text_config() is config:
                check_model_class(model, folder.path)  # other shared weights are shared no more below
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
            model = _from_config(config, dtype, requested)
    except UserError:
        raise
    except Exception as error:  # the class's code may raise any kind
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder.path / 'config.json'}: transformers {transformers.__version__} cannot build a causal language "
            f"model from it ({reason}); give another model or upgrade transformers"
        ) from None
    return model


def _from_config(config: transformers.PretrainedConfig, dtype: torch.dtype, attention: str | None) -> Any:
    with torch.device("meta"):
        return _auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    """Return the Auto class with which transformers opens the whole model, towers included."""
    is_causal = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.get_text_config() is not config or not is_causal:
        if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForImageTextToText
        if type(config) in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING:
            return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def _stores_untied_head(model: transformers.PreTrainedModel, folder: ModelFolder) -> bool:
    """Return whether the folder holds an output head that differs from the embedding to which config.json ties it.

    Merging a trained embedding and head produces such folders, and transformers keeps both tensors on loading.
    """
    embedding, head = vocab_weight_names(model)
    names = folder.names
    if not any(name.endswith(head.rpartition(".")[0].rpartition(".")[2] + ".weight") for name in names):
        return False  # the usual case; converting all names takes longer
    keys = {target: key for key, target in target_names(model, names).items()}
    if head not in keys or embedding not in keys:
        return False
    return not folder.tensors_equal(keys[head], keys[embedding])
