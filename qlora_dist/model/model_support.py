"""Check of a model's class, before any weight is read or written, for properties that prevent training."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.torch import module_parameters
from qlora_dist.errors import UserError
from qlora_dist.model.quantizable import has_tied_embeddings
from qlora_dist.model.weight_reads import find_weight_reads

_CROSS_ATTENTION = {"encoder_attn", "cross_attn", "crossattention"}
"""Names of transformers' modules that attend to the states of an encoder."""
_OTHER_INPUTS = ("vision", "audio", "vq")
_UNSUPPORTED = {
    "diffusion_gemma": "predicts several tokens at a time in any order",
    "cpmant": "puts its own prompt before each sequence",
    "reformer": "takes only sequences of the length that axial_pos_shape gives",
    "shieldgemma2": "classifies images",
    "xlm": "lets a position see later ones",
    "xlnet": "lets a position see later ones",
}
"""Reasons why a model is no causal language model for rows of any length, by `model_type`."""


def check_text_config(model: PreTrainedModel, path: Path) -> None:
    """Check that the language model of a class of transformers is a part of its own.

    Raises:
        UserError: one decoder computes text, images or sounds together. The message names `path`, the model's folder.
    """
    config = model.config
    if config.get_text_config() is config and any(hasattr(config, f"{kind}_config") for kind in _OTHER_INPUTS):
        raise _unsupported(path, config.model_type, "has no language model apart from its images or sounds")
    try:
        has_vocabulary = model.get_input_embeddings() is not None and model.get_output_embeddings() is not None
    except NotImplementedError:
        has_vocabulary = False
    if not has_vocabulary:
        raise _unsupported(path, config.model_type, "has no single input embedding and output head")


def check_model_class(model: PreTrainedModel, path: Path) -> None:
    """Check that a class of transformers, on meta, can be trained as a causal language model of text.

    Raises:
        UserError: it cannot. The message names `path`, the model's folder.
    """
    kind = model.config.model_type
    if (reason := _UNSUPPORTED.get(kind)) is not None:
        raise _unsupported(path, kind, reason)
    if not hasattr(model.config.get_text_config(), "num_hidden_layers"):
        raise _unsupported(path, kind, "has no single stack of decoder layers")
    attends = any(name.rpartition(".")[2] in _CROSS_ATTENTION for name, _ in model.named_modules())
    if attends or getattr(type(model.config), "is_encoder_decoder", False):
        raise _unsupported(path, kind, "attends to the states of an encoder")
    if (names := _shared_parameter_names(model)) is not None:
        raise _unsupported(path, kind, f"shares one weight between {names[0]} and {names[1]}")
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and has_tied_embeddings(model) and head.bias is not None:
        raise _unsupported(path, kind, "adds a bias to an output head that is tied to the input embedding")
    changed = [name for name, use in find_weight_reads(model).items() if use == "change"]
    if changed:
        raise _unsupported(path, kind, f"changes the weight of {changed[0]} while it computes")


def _unsupported(path: Path, kind: str, reason: str) -> UserError:
    return UserError(
        f"{path / 'config.json'}: a model of type {kind} {reason}, which cannot be trained here; give another causal "
        "language model"
    )


def _shared_parameter_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return two names of one parameter. The output head may share the embedding's parameters."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    allowed = {id(module.weight) for module in (head, embedding) if hasattr(module, "weight")}
    allowed |= {id(head.bias)} if getattr(head, "bias", None) is not None else set()
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module_parameters(module).items():
            if parameter is not None and id(parameter) not in allowed:
                full = f"{path}.{name}" if path else name
                if first.setdefault(id(parameter), full) != full:
                    return first[id(parameter)], full
    return None
