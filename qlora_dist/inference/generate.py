"""Generation with a loaded model, sharded or not, by transformers' `generate`. All ranks generate in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_dist.config.max_positions import max_positions
from qlora_dist.errors import UserError
from qlora_dist.inference.inference_model import InferenceModel
from qlora_dist.io.adapter_files import GENERATION_CONFIG_NAME
from qlora_dist.model.model_folder import read_model_json
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json

StoppingCriteriaFactory = Callable[[int, int], StoppingCriteriaList]
"""Function of a batch's padded prompt length and its size, which returns further criteria to stop it."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for choosing the next token, under the names of transformers' `GenerationConfig`."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    """0 chooses the most likely token. This default and that of `top_p` are the QLoRA paper's (section 5.2)."""
    top_p: float = 0.9
    top_k: int = 0
    """0 sets no limit."""
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Check that each option is in its range."""
        ranges = [
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "more than 0"),
            ("seed", self.seed, 0 <= self.seed < 2**32, "from 0 to 4294967295"),
        ]
        for name, value, fits, allowed in ranges:
            if not fits:
                raise UserError(f"--{name} {value}: write a number {allowed}")


def generate_tokens(
    loaded: InferenceModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    end_tokens: Sequence[int] = (),
    batch_size: int = 8,
    streamer: BaseStreamer | None = None,
    make_stopping_criteria: StoppingCriteriaFactory | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, without its end token. Call it on all ranks, with the same prompts.

    Batches hold the prompts in their order, and are the same on any number of ranks. In each round every rank computes
    one batch. A rank without a batch, or with a finished one, computes something that is thrown away, because all ranks
    are needed to gather a layer. Each batch has its own seed.

    Args:
        loaded: the model, with its active adapter.
        prompts: tokens of each prompt.
        sampling: options for choosing tokens.
        end_tokens: tokens that end an answer, besides the model's own end tokens.
        batch_size: number of prompts that are computed together, padded on the left.
        streamer: receiver of the tokens of a single prompt, as they are generated.
        make_stopping_criteria: source of further criteria that end a batch.
    """
    limit = max_positions(loaded.folder.config)
    check_prompt_lengths(prompts, limit)
    batches = [list(prompts[first : first + batch_size]) for first in range(0, len(prompts), batch_size)]
    world, answers = loaded.ranks.world_size, []
    ends = sorted({*_end_tokens(loaded), *end_tokens})
    for first in range(0, len(batches), world):
        round_batches = batches[first : first + world]
        longest = max(len(prompt) for batch in round_batches for prompt in batch)
        steps = min(sampling.max_new_tokens, limit - longest) if limit is not None else sampling.max_new_tokens
        own_batch = round_batches[loaded.ranks.rank] if loaded.ranks.rank < len(round_batches) else round_batches[0][:1]
        torch.manual_seed(sampling.seed + first + loaded.ranks.rank)
        own_answers = _generate_batch(loaded, own_batch, sampling, steps, ends, streamer, make_stopping_criteria)
        answers += [answer for batch in all_gather_json(own_answers)[: len(round_batches)] for answer in batch]
    return answers


def check_prompt_lengths(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Check that each prompt leaves room for an answer."""
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest >= limit:
        raise UserError(
            f"a prompt has {longest:,} tokens, and the model {limit:,} positions for prompt and answer; shorten it"
        )


@torch.no_grad()
def _generate_batch(
    loaded: InferenceModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    streamer: BaseStreamer | None,
    stopping: StoppingCriteriaFactory | None,
) -> list[list[int]]:
    length = max(map(len, prompts))
    padding = end_tokens[0] if end_tokens else 0
    ids = torch.tensor([[padding] * (length - len(p)) + list(p) for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=padding,
        use_cache=True,
        **chosen,
    )
    # at every forward pass, because a rank with a finished batch calls nothing else during the passes of the others
    handle = loaded.model.register_forward_hook(lambda *_: record_heartbeat())
    try:
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            streamer=streamer,
            stopping_criteria=None if stopping is None else stopping(length, len(prompts)),
            synced_gpus=loaded.ranks.world_size > 1,
        )
    finally:
        handle.remove()
    return [_before_end_token(row, end_tokens) for row in output[:, length:].tolist()]


def _before_end_token(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


def _end_tokens(loaded: InferenceModel) -> set[int]:
    """Return the end tokens that the folder names in generation_config.json or config.json."""
    path = loaded.folder.path / GENERATION_CONFIG_NAME
    named = read_model_json(path).get("eos_token_id") if path.exists() else None
    named = loaded.model.config.get_text_config().eos_token_id if named is None else named
    return set() if named is None else {int(token) for token in (named if isinstance(named, list) else [named])}
