"""Whether PEFT will read from an adapter's folder what was trained, asked of PEFT itself before a run starts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qlora_dist.compat.peft import convert_peft_adapter_state_dict_for_transformers, peft
from qlora_dist.errors import UserError

_NAME = "default"


def needs_peft_conversion(config: peft.LoraConfig, model_type: str) -> bool:
    """Whether PEFT reads an adapter of such models by more than the ends of names: asking it takes some seconds."""
    return bool(config.target_parameters) or get_checkpoint_conversion_mapping(model_type) is not None


def check_peft_roundtrip(
    plain: PreTrainedModel, config: peft.LoraConfig, shapes: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """See whether PEFT makes of the folder the parameters that are in it, no more and no fewer.

    Args:
        plain: transformers' own class on meta, without weights; PEFT changes it.
        config: as it will be saved.
        shapes: of the tensors that will be saved, by PEFT's names.
        base: the base model's folder, for messages.

    Raises:
        UserError: PEFT would leave out what was trained, or add what was not.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PEFT leaves out; the comparison says more
            model = peft.get_peft_model(plain, copy.deepcopy(config), adapter_name=_NAME)
            peft_state = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
            tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
            converted = convert_peft_adapter_state_dict_for_transformers(
                model, model.peft_config[_NAME], tensors, _NAME
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
            f"lora: PEFT would read other tensors from an adapter of {base} than are in it ({len(saved_shapes)} are in it, "
            f"and PEFT has {len(expected)}; {key} is {saved_shape} there and {expected_shape} in PEFT); adapt fewer layers with "
            "lora.targets"
        )
