"""Check before a run, by PEFT itself, that PEFT will read the trained tensors from the adapter's folder."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qlora_dist.compat.peft import convert_peft_adapter_state_dict_for_transformers, peft
from qlora_dist.errors import UserError

_ADAPTER_NAME = "default"


def needs_peft_conversion(config: peft.LoraConfig, model_type: str) -> bool:
    """Return whether PEFT converts names when it reads such an adapter. Only then is its slow check needed."""
    return bool(config.target_parameters) or get_checkpoint_conversion_mapping(model_type) is not None


def check_peft_roundtrip(
    plain: PreTrainedModel, config: peft.LoraConfig, shapes: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """Check that PEFT reads exactly the tensors that the folder will hold.

    PEFT changes `plain`, transformers' own class on meta. `shapes` has the shapes of the tensors that will be saved, by
    PEFT's names.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors that PEFT omits, which the comparison below reports
            model = peft.get_peft_model(plain, copy.deepcopy(config), adapter_name=_ADAPTER_NAME)
            peft_state = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER_NAME, save_embedding_layers=False)
            tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
            converted = convert_peft_adapter_state_dict_for_transformers(
                model, model.peft_config[_ADAPTER_NAME], tensors, _ADAPTER_NAME
            )
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"lora: PEFT could not read such an adapter of {base} ({reason}); adapt fewer layers with lora.targets"
        ) from None
    saved_shapes = {key: tuple(tensor.shape) for key, tensor in converted.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in peft_state.items()}
    differing = sorted(
        key for key in saved_shapes.keys() | expected.keys() if saved_shapes.get(key) != expected.get(key)
    )
    if differing:
        key = differing[0]
        saved_shape, expected_shape = saved_shapes.get(key, "missing"), expected.get(key, "missing")
        raise UserError(
            f"lora: PEFT would read other tensors from an adapter of {base} than it holds ({len(saved_shapes)} saved, "
            f"{len(expected)} in PEFT; {key} is {saved_shape} there and {expected_shape} in PEFT); adapt fewer layers "
            "with lora.targets"
        )
