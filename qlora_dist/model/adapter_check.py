"""Check before quantizing that PEFT can read an adapter of all linear layers of the model."""

from __future__ import annotations

import torch

from qlora_dist.adapters.attach import attach_adapter, make_peft_config
from qlora_dist.adapters.export import config_to_save, shapes_to_save
from qlora_dist.adapters.peft_roundtrip import check_peft_roundtrip, needs_peft_conversion
from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.model.meta_model import LossModel
from qlora_dist.model.model_class import whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder


def find_adapter_problem(model: LossModel, folder: ModelFolder) -> str | None:
    """Return the sentence with which `train` refuses the default `lora.targets`; None if it does not.

    The model is on meta, without adapters. It has them afterwards.
    """
    base = str(folder.path)
    try:
        adapter = make_peft_config(model, LoraConfig(), base, model.towers.names)
        attach_adapter(model, adapter)
        if model.towers.paths or needs_peft_conversion(adapter, model.config.model_type):
            plain = whole_model_on_meta(folder, torch.float32)
            check_peft_roundtrip(plain, config_to_save(adapter), shapes_to_save(model), base)
    except UserError as error:
        return str(error)
    return None
