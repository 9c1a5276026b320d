"""The language model inside a class of transformers that also takes images or sounds.

Only text is trained here, so the rest of such a class, its towers and projectors, is taken out. The language model
keeps the names that it has in the whole class. Adapters and merged folders therefore fit the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.transformers import mark_initialized


@dataclass(frozen=True)
class Towers:
    """Parts of transformers' class outside its language model, by their names there."""

    paths: tuple[str, ...] = ()
    """The outermost modules and parameters, such as `model.vision_tower`."""
    names: frozenset[str] = frozenset()
    """All their modules and parameters."""

    def holds(self, name: str) -> bool:
        """Return whether a module or a tensor is part of them."""
        return any(name == path or name.startswith(f"{path}.") for path in self.paths)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module that a causal language model calls before its output head."""
    decoder: nn.Module = model.get_decoder()
    if decoder is model:
        return _child_with_embedding(model)
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        return find_decoder(decoder)  # Llama 4: a causal language model inside the multimodal class
    return decoder


def remove_towers(model: PreTrainedModel) -> Towers:
    """Remove everything but the language model from a multimodal class, and return the names of what was removed.

    The model is on meta. A class for text alone stays as it is.
    """
    if model.config.get_text_config() is model.config:
        return Towers()
    text = (find_decoder(model), model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is part for part in text)]
    kept = [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]
    names = _names(model)
    removed = []
    for path in sorted({ancestor for name in kept for ancestor in _ancestors(name)}):
        owner = model.get_submodule(path)
        prefix = path and f"{path}."
        for name in [name for name, _ in owner.named_children()]:
            child = prefix + name
            if not any(f"{text_path}.".startswith(f"{child}.") for text_path in kept):
                delattr(owner, name)
                removed.append(child)
        for name, parameter in list(owner.named_parameters(recurse=False)):
            _replace_with_placeholder(owner, name, parameter.shape)
            removed.append(prefix + name)
    return Towers(tuple(removed), names - _names(model))


def _child_with_embedding(model: PreTrainedModel) -> nn.Module:
    """Return the decoder of a class such as Llama-4's, whose prefix names another module."""
    embedding: nn.Module = model.get_input_embeddings()
    children: Iterable[nn.Module] = model.children()
    return next(child for child in children if any(module is embedding for module in child.modules()))


def _replace_with_placeholder(owner: nn.Module, name: str, shape: torch.Size) -> None:
    """Replace a parameter by a tensor without values, which a class may still mention when it sets first values."""
    delattr(owner, name)
    placeholder = torch.empty(shape, device="meta")
    mark_initialized(placeholder)
    setattr(owner, name, placeholder)


def _ancestors(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module, the model's own empty one included."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _names(model: nn.Module) -> frozenset[str]:
    """Return the names of all modules and parameters."""
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, _ in [*model.named_modules(), *parameters])
