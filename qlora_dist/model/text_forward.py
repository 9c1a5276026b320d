"""Check that a multimodal class hands text to its language model unchanged.

Training calls the language model itself. That is right only if the whole class does no more with text than look up its
embeddings. A class that adds something, or that lets a token see later ones, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import UserError
from qlora_dist.model.language_model import find_decoder
from qlora_dist.model.stand_ins import DecoderOutput, replaced_forward

_LENGTH, _DEVICE_PARAMETER = 3, "device_of_probe"
_SETTINGS = {
    *("past_key_values", "use_cache", "return_dict", "logits_to_keep", "cache_position"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
"""Arguments of a language model that leave its last hidden state as it is."""


def check_text_forward(model: PreTrainedModel, path: Path) -> None:
    """Run a multimodal class without towers, on meta, with a stand-in for its language model.

    Raises:
        UserError: the language model would receive more than the embeddings of the tokens, or the class cannot take
            text alone. The message names `path`, the model's folder.
    """
    try:
        with torch.no_grad(), _recorded_decoder(model) as (calls, embeddings):
            model(input_ids=torch.zeros(1, _LENGTH, dtype=torch.int64), use_cache=False, return_dict=True)
        reason = _difference(calls, embeddings)
    except Exception as error:  # the class's code may raise any kind
        reason = f"cannot run on text without its towers ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    if reason is not None:
        raise UserError(
            f"{path / 'config.json'}: a model of type {model.config.model_type} {reason}, so that its text cannot be "
            "trained here; give a causal language model of text only"
        )


def _difference(calls: list[Mapping[str, Any]], embeddings: torch.Tensor) -> str | None:
    """Return how the language model's inputs differ from those in training; None if they do not."""
    if len(calls) != 1:
        return f"calls its language model {len(calls)} times"
    inputs = {name: value for name, value in calls[0].items() if value is not None and name not in _SETTINGS}
    ids, embedded = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    positions, mask = inputs.pop("position_ids", None), inputs.pop("attention_mask", None)
    inputs.pop("per_layer_inputs", None)  # Gemma looks them up from the tokens, and so does its language model
    if (embedded is not None and not torch.equal(embedded, embeddings)) or (embedded is None and ids is None):
        return "changes the embeddings of the tokens"
    if positions is not None and not (positions.diff(dim=-1) == 1).all():
        return "numbers the positions of a text in another way than from left to right"
    if any(not _is_causal(part) for part in (mask.values() if isinstance(mask, Mapping) else [mask])):
        return "lets a token see later ones"
    if inputs:
        return f"passes {', '.join(sorted(inputs))} to its language model"
    return None


def _is_causal(mask: torch.Tensor | None) -> bool:
    """Return whether a mask, bool or added to the scores, lets each token see exactly those up to itself."""
    if mask is None or mask.dim() < 3:
        return True  # the language model makes its own, from a mask of the padding at most
    sees = mask if mask.dtype == torch.bool else mask == 0
    return bool((sees == torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()).all())


def _embed_as_zeros(size: int, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, size)


@contextmanager
def _recorded_decoder(model: PreTrainedModel) -> Iterator[tuple[list[Mapping[str, Any]], torch.Tensor]]:
    """Replace decoder, embeddings and head by stand-ins, and yield the decoder's calls and the tokens' embeddings."""
    decoder, head, was_training = find_decoder(model), model.get_output_embeddings(), model.training
    around = [module for module in model.modules() if any(child is decoder for child in module.modules())]
    vocabulary = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not vocabulary]
    embeddings = torch.randn(1, _LENGTH, vocabulary.embedding_dim)
    calls: list[Mapping[str, Any]] = []

    def record(*args: Any, **kwargs: Any) -> DecoderOutput:
        calls.append({f"argument {index}": value for index, value in enumerate(args)} | kwargs)
        return DecoderOutput((embeddings,))

    weight = vocabulary.weight
    model.set_output_embeddings(nn.Linear(embeddings.shape[-1], 8))
    # Gemma 4 reads the row of the padding token itself
    vocabulary.weight = nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False)
    model.eval()
    for module in around:  # a model's first parameter determines its device, to which it may move its input
        module.register_parameter(_DEVICE_PARAMETER, nn.Parameter(torch.empty(0)))
    try:
        with ExitStack() as stack:
            for table in tables:
                stack.enter_context(replaced_forward(table, partial(_embed_as_zeros, table.embedding_dim)))
            stack.enter_context(replaced_forward(vocabulary, lambda ids: embeddings))
            stack.enter_context(replaced_forward(decoder, record))
            yield calls, embeddings
    finally:
        for module in around:
            delattr(module, _DEVICE_PARAMETER)
        model.train(was_training)
        vocabulary.weight = weight
        model.set_output_embeddings(head)
