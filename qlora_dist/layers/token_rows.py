"""Rows of an embedding or an output head that have values of their own, beside a frozen weight.

They replace rows of the weight, or follow its last row. The weight itself stays as the folder has it, in 16 or 4 bit,
so new tokens need no larger matrix. PEFT calls these rows `trainable_tokens_delta`, although they replace the weight's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.errors import UserError

TOKEN_ROWS_NAME = "trainable_tokens_delta"
"""Name of the parameter, fp32[n, h], in the embedding or head. PEFT's files have it too."""

if TYPE_CHECKING:
    _Embedding = nn.Embedding
else:  # a mixin without a base class calls the forward of the class that it is mixed into
    _Embedding = object


@dataclass(frozen=True)
class TokenRows:
    """Rows with values of their own, of one module."""

    ids: tuple[int, ...]
    """Numbers of the rows, which are token ids, in ascending order."""
    vocabulary: int
    """Rows of the module together with those that follow the weight's last row."""
    values: torch.Tensor
    """[len(ids), h], in the order of `ids`."""

    def index(self, device: torch.device) -> torch.Tensor:
        """Return the ids as int64[len(ids)]."""
        return torch.tensor(self.ids, device=device)


def use_token_rows(module: nn.Embedding | nn.Linear, ids: Sequence[int], path: str) -> None:
    """Give some rows of an embedding or an output head values of their own, on the weight's device and in fp32.

    Ids beyond the weight must follow its last row without a gap. The module's class is changed in place, so references
    to it stay valid. `path` is the module's name in messages.

    Raises:
        UserError: the module's class computes with its weight in another way than PEFT's layer for such rows.
    """
    _check_class(module, path)
    weight_rows, h = module.weight.shape
    added = [token for token in sorted(ids) if token >= weight_rows]
    assert added == list(range(weight_rows, weight_rows + len(added))), f"{path}: rows are missing before {added}"
    if isinstance(module, nn.Embedding):
        module.__class__ = type("TokenRowsEmbedding", (_TokenRowsEmbedding, type(module)), {})
    # torch's types allow only tensors and modules as attributes of a module
    module.token_ids = tuple(sorted(ids))  # type: ignore[assignment]
    module.token_vocabulary = weight_rows + len(added)  # type: ignore[assignment]
    parameter = nn.Parameter(torch.empty(len(ids), h, dtype=torch.float32, device=module.weight.device))
    module.register_parameter(TOKEN_ROWS_NAME, parameter)


def token_rows(module: nn.Module) -> TokenRows | None:
    """Return the rows with values of their own; None if the module has none."""
    ids: tuple[int, ...] | None = getattr(module, "token_ids", None)
    if ids is None:
        return None
    vocabulary: int = module.token_vocabulary  # type: ignore[assignment]  # torch's types allow only tensors here
    return TokenRows(ids, vocabulary, module.get_parameter(TOKEN_ROWS_NAME))


def is_token_rows_parameter(name: str) -> bool:
    """Return whether a parameter holds rows with values of their own."""
    return name.rpartition(".")[2] == TOKEN_ROWS_NAME


def add_token_rows_to_logits(logits: torch.Tensor, hidden: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """Return logits [..., vocabulary] of all rows, given the weight's logits and the head's input [..., h]."""
    whole = logits.new_empty(*logits.shape[:-1], rows.vocabulary)
    whole[..., : logits.shape[-1]] = logits
    whole[..., rows.index(logits.device)] = hidden @ rows.values.to(hidden.dtype).t()
    return whole


class _TokenRowsEmbedding(_Embedding):
    """Mixin that looks some tokens up in `trainable_tokens_delta` instead of the weight."""

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """Map ids int64[...] to [..., h]. A tied embedding also gets hidden states, which it handles itself."""
        if x.is_floating_point():
            return super().forward(x, *args)
        rows = token_rows(self)
        assert rows is not None
        ids = rows.index(x.device)
        position = torch.searchsorted(ids, x).clamp_(max=len(rows.ids) - 1)
        is_token = ids[position] == x
        looked_up = super().forward(x.masked_fill(is_token, 0), *args)
        # the row of the padding token gets no gradient, as in torch
        padding = rows.ids.index(self.padding_idx) if self.padding_idx in rows.ids else None
        own = nn.functional.embedding(position, rows.values.to(looked_up.dtype), padding)
        scale = getattr(self, "embed_scale", None)  # as in PEFT, for Gemma's class and others that scale
        if scale is not None:
            own = own * (scale.to(own.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(is_token.unsqueeze(-1), own, looked_up)


def _check_class(module: nn.Module, path: str) -> None:
    """Raise a UserError unless PEFT's layer for single rows computes what the module's class does."""
    forward = next(
        vars(owner)["forward"]
        for owner in type(module).__mro__
        if "forward" in vars(owner) and not owner.__module__.startswith("qlora_dist.")
    )
    is_plain = forward in (nn.Embedding.forward, nn.Linear.forward) or (
        isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    )
    if not is_plain or getattr(module, "bias", None) is not None:
        reason = "has a bias" if is_plain else f"is a {type(module).__name__}, which computes in its own way"
        raise UserError(
            f"model.add_tokens: {path} {reason}, so PEFT cannot train single rows of it; leave model.add_tokens and "
            "lora.trainable_tokens out"
        )
