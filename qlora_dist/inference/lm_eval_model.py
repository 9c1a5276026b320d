"""The `LM` of lm-evaluation-harness for a loaded model, which may be too large for one device.

Every rank gets all requests and returns all answers. In each round every rank computes one batch. In the last round,
ranks without a batch compute the last one again, because all ranks are needed to gather a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.max_positions import max_positions
from qlora_dist.inference.generate import SamplingOptions, generate_tokens
from qlora_dist.inference.inference_model import InferenceModel
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json

_Item = TypeVar("_Item")
_DEFAULT_POSITIONS = 2048
LogLikelihood = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding would give it."""
LogLikelihoodRequest = tuple[Any, list[int], list[int]]
"""Texts, which may be missing, tokens of the context, and tokens of the continuation."""


class LmEvalModel(TemplateLM):
    """The harness's model interface, answered by the active adapter.

    `batch_size` is the number of requests in a forward pass of a rank.
    """

    def __init__(self, loaded: InferenceModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_length = max_positions(loaded.folder.config) or _DEFAULT_POSITIONS
        self._loaded, self._device = loaded, loaded.device
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before the first token of a text."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Name that the harness uses for its caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize by the rules of the harness's own `hf` model."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if not special and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, verbose=False, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as the harness's own `hf` model does."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[LogLikelihood]:
        scored: list[LogLikelihood] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of the model's length."""
        windows: list[LogLikelihoodRequest] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate texts up to a stop sequence or the end token."""
        end = self.tokenizer.decode([self.eot_token_id])
        answers: list[str] = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(index)
        for indices in by_options.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[indices[0]].args[1]))
            until = handle_stop_sequences(options.get("until"), eos=end)
            sampling = SamplingOptions(
                max_new_tokens=options["max_gen_toks"],
                temperature=float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0,
                top_p=float(options.get("top_p", 1.0)),
                top_k=int(options.get("top_k", 0)),
                repetition_penalty=float(options.get("repetition_penalty", 1.0)),
            )
            most_prompt_tokens = self.max_length - sampling.max_new_tokens
            prompts = [self.tok_encode(requests[index].args[0])[-most_prompt_tokens:] for index in indices]

            def stopping(length: int, batch: int, until: list[str] = until) -> Any:
                return stop_sequences_criteria(self.tokenizer, until, length, batch)

            generated = generate_tokens(
                self._loaded, prompts, sampling, [self.eot_token_id], self.batch_size, make_stopping_criteria=stopping
            )
            for index, tokens in zip(indices, generated, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                answers[index] = postprocess_generated_text(text, until, None)
        return answers

    def _loglikelihood_tokens(self, requests: list[LogLikelihoodRequest], **kwargs: Any) -> list[LogLikelihood]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        batch_scores = map_over_ranks(
            self._loaded, batches, lambda batch: self._score([requests[index] for index in batch])
        )
        scores: list[LogLikelihood] = [(0.0, False)] * len(requests)
        for batch, answers in zip(batches, batch_scores, strict=True):
            for index, (score, greedy) in zip(batch, answers, strict=True):
                scores[index] = (score, greedy)
        return scores

    @torch.no_grad()
    def _score(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        """Score a batch. It is padded on the right, which no earlier position sees; only needed logits are computed."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        length = max(len(row) for row in rows) - 1
        ids = torch.tensor([row[:-1] + [0] * (length - len(row) + 1) for row in rows], device=self._device)
        spans = [
            (len(row) - 1 - len(continuation), len(row) - 1)
            for row, (_, _, continuation) in zip(rows, requests, strict=True)
        ]
        first = min(start for start, _ in spans)
        keep = {"logits_to_keep": torch.arange(first, length, device=self._device)} if self._has_logits_to_keep else {}
        logits = self._loaded.model(input_ids=ids, use_cache=False, **keep).logits
        offset = first if self._has_logits_to_keep else 0
        record_heartbeat()
        scores = []
        for row, (start, stop), (_, _, continuation) in zip(logits, spans, requests, strict=True):
            targets = torch.tensor(continuation, device=self._device)
            log_probs = row[start - offset : stop - offset].float().log_softmax(dim=-1)
            greedy = bool((log_probs.argmax(dim=-1) == targets).all())
            scores.append((float(log_probs.gather(1, targets.unsqueeze(1)).double().sum()), greedy))
        return scores


def map_over_ranks(loaded: InferenceModel, items: Sequence[_Item], function: Callable[[_Item], Any]) -> list[Any]:
    """Return a function's JSON result for each item, on every rank. In each round every rank computes one item."""
    ranks, results = loaded.ranks, []
    for first in range(0, len(items), ranks.world_size):
        round_items = items[first : first + ranks.world_size]
        answer = function(round_items[min(ranks.rank, len(round_items) - 1)])
        results += all_gather_json(answer)[: len(round_items)]
    return results
