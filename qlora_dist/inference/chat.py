"""A conversation with a loaded model at a terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from transformers import TextStreamer

from qlora_dist.data.source_row import Message
from qlora_dist.errors import UserError
from qlora_dist.inference.generate import SamplingOptions, generate_tokens
from qlora_dist.inference.inference_model import InferenceModel
from qlora_dist.inference.prompts import Prompt, PromptEncoder
from qlora_dist.runtime.heartbeat import record_heartbeat

CHAT_HELP = "/adapter NAME or /base: choose what answers; /reset: begin anew; /exit: end"

_WAIT_S = 0.05
_UNLIMITED_TIMEOUT_FACTOR = 1e9  # multiplier of the timeout: the other ranks wait while a person thinks


class _AnswerStreamer(TextStreamer):
    """Prints an answer token by token, without what ends it."""

    def __init__(self, prompt_encoder: PromptEncoder, ends: Sequence[int], out: TextIO) -> None:
        super().__init__(prompt_encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._out = ends, out

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", flush=True, file=self._out)


def chat(
    loaded: InferenceModel,
    prompt_encoder: PromptEncoder,
    sampling: SamplingOptions,
    end_tokens: Sequence[int],
    read_line: Callable[[], str],
    out: TextIO,
    system: str | None = None,
) -> None:
    """Converse until `/exit` or the end of the input. Call it on all ranks; rank 0 reads and prints.

    A mistake, such as the name of an unknown adapter, is printed, and the conversation continues. `end_tokens` end an
    answer. `read_line` returns the next line, and raises EOFError after the last one, or KeyboardInterrupt.
    """
    prompt_encoder.require_template("--chat")
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages, turn = list(first), 0
    is_rank_0 = loaded.ranks.rank == 0

    def print_on_rank_0(text: str) -> None:
        if is_rank_0:
            print(text, file=out, flush=True)

    print_on_rank_0(CHAT_HELP)
    while (line := _next_line(loaded, turn, read_line)) is not None:
        turn += 1
        command, _, name = line.strip().partition(" ")
        try:
            if command == "/exit":
                break
            if command == "/reset":
                messages = list(first)
            elif command in ("/adapter", "/base"):
                loaded.set_adapter(name.strip() if command == "/adapter" else None)
            elif command.startswith("/"):
                print_on_rank_0(CHAT_HELP)
            elif line.strip():
                conversation: list[Message] = [*messages, {"role": "user", "content": line.strip()}]
                tokens = prompt_encoder.encode(Prompt(content=conversation, place="the conversation"))
                streamer = _AnswerStreamer(prompt_encoder, end_tokens, out) if is_rank_0 else None
                (answer,) = generate_tokens(loaded, [tokens], sampling, end_tokens, streamer=streamer)
                answer_text = prompt_encoder.tokenizer.decode(answer, skip_special_tokens=True)
                messages = [*conversation, {"role": "assistant", "content": answer_text}]
        except UserError as mistake:  # all ranks raise the same one
            print_on_rank_0(str(mistake))


def _next_line(loaded: InferenceModel, turn: int, read: Callable[[], str]) -> str | None:
    """Return rank 0's next line on every rank, or None at the end.

    The line travels through the store, because a collective would time out while a person thinks.
    """
    key = f"line/{turn}"
    if loaded.ranks.rank == 0:
        record_heartbeat(phase="reading data", timeout_factor=_UNLIMITED_TIMEOUT_FACTOR)
        line: str | None = None
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            line = read()
        loaded.store.set(key, json.dumps(line))
    else:
        while not loaded.store.check([key]):
            record_heartbeat(phase="reading data")
            time.sleep(_WAIT_S)
        line = json.loads(loaded.store.get(key))
    record_heartbeat(turn + 1, "evaluating")
    return line
