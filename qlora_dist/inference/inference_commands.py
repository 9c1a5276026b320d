"""The verbs `generate_tokens` and `eval`, from the command line's words to what they print."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_dist.config.max_positions import max_positions
from qlora_dist.config.schema import Config
from qlora_dist.data.prepare_datasets import prepare_datasets
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.inference.chat import chat
from qlora_dist.inference.eval_loss import compute_eval_loss
from qlora_dist.inference.generate import SamplingOptions, check_prompt_lengths, generate_tokens
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import InferenceModel, open_inference_model
from qlora_dist.inference.lm_eval_tasks import TaskOptions, check_tasks, print_scores, run_tasks
from qlora_dist.inference.named_adapter import NamedAdapter, common_base, parse_named_adapters
from qlora_dist.inference.prompts import Prompt, PromptEncoder, make_prompt, read_prompts
from qlora_dist.model.model_folder import read_model_json
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.object_collectives import broadcast_json

BASE_MODEL_NAME = "base"
"""What stands for no adapter."""


@dataclass(frozen=True)
class ModelOptions:
    """What to load."""

    adapters: Sequence[str]
    """`NAME=FOLDER` or `FOLDER`."""
    base: Path | None = None
    """None: the one that the adapters name."""
    quantize: bool = True
    overrides: Sequence[str] = ()
    """`section.key=value` each."""


@dataclass(frozen=True)
class PromptOptions:
    """What to answer."""

    prompt: str | None = None
    file: Path | None = None
    chat: bool = False
    raw: bool = False
    """Continue a text as it is, although there is a chat template."""
    system: str | None = None
    use: str | None = None
    """The adapter that answers; None: the first."""
    batch_size: int = 8


def run_generate(options: ModelOptions, prompt_options: PromptOptions, sampling: SamplingOptions) -> None:
    """Answer one prompt, the prompts of a file, or a person. Called on every rank; rank 0 prints.

    Raises:
        UserError: what the user has to mend.
    """
    sampling.check()
    if (prompt_options.prompt is not None) + (prompt_options.file is not None) + prompt_options.chat != 1:
        raise UserError("generate: give one of a prompt, --prompts FILE and --chat")
    adapters, config = _parse_model_options(options, None)
    prompter = PromptEncoder(load_tokenizer(Path(config.model.base)), config.data.chat_template)
    prompts = _prompts(prompt_options, prompter)
    first = prompt_options.use or (adapters[0].name if adapters else BASE_MODEL_NAME)
    for prompt in [*prompts, Prompt("", first, f"--use {first}")]:
        if prompt.adapter not in (None, BASE_MODEL_NAME, *(adapter.name for adapter in adapters)):
            known = ", ".join((*(adapter.name for adapter in adapters), BASE_MODEL_NAME))
            raise UserError(f"{prompt.place}: no adapter of the name {prompt.adapter} is given; choose from {known}")
    end = prompter.end_of_turn_token()
    ends = [] if end is None else [end]
    tokens = [prompter.tokens(prompt) for prompt in prompts]
    check_prompt_lengths(tokens, max_positions(read_model_json(Path(config.model.base) / "config.json")))
    if prompt_options.chat:
        prompter.require_template("--chat")
    with open_inference_model(config, adapters, options.quantize) as loaded:
        loaded.use(None if first == BASE_MODEL_NAME else first)
        if prompt_options.chat:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
            chat(loaded, prompter, sampling, ends, _read_line, sys.stdout, prompt_options.system)
            return
        names = [prompt.adapter or first for prompt in prompts]
        tokens, names = broadcast_json([tokens, names])  # nodes may have different files of this name
        texts = [""] * len(tokens)
        for answers in _generate_by_adapter(loaded, names, tokens, sampling, ends, prompt_options.batch_size):
            for index, answer in answers.items():
                texts[index] = prompter.tokenizer.decode(answer, skip_special_tokens=True)
        if loaded.ranks.rank == 0:
            _print_answers(prompt_options, prompts, names, texts)


def run_eval(options: ModelOptions, data: str | None, tasks: TaskOptions | None, as_json: bool = False) -> None:
    """Print held-out loss, and scores on tasks, of each adapter or of the base. Called on every rank; rank 0 prints.

    Raises:
        UserError: what the user has to mend.
    """
    if data is None and tasks is None:
        raise UserError("eval: nothing to evaluate on; give --data FILE, or --tasks NAMES")
    if tasks is not None:
        check_tasks(tasks)
    adapters, config = _parse_model_options(options, data)
    is_rank_0 = read_rank_info().rank == 0
    progress = Console(stderr=True, quiet=not is_rank_0)
    if data is not None:  # tokenized before any rank waits for another
        eval_data_config = config.data.model_copy(update={"train": []})
        prepare_datasets(eval_data_config, load_tokenizer(Path(config.model.base)), progress)
    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    with open_inference_model(config, adapters, options.quantize) as loaded:
        for name in (*loaded.adapters,) or (None,):
            loaded.use(name)
            if data is not None:
                eval_loss = compute_eval_loss(loaded, data)
                rows.append(
                    {
                        "adapter": name,
                        "loss": eval_loss.loss,
                        "perplexity": eval_loss.perplexity,
                        "tokens": eval_loss.tokens,
                    }
                )
            if tasks is not None:
                scores[name or BASE_MODEL_NAME] = run_tasks(loaded, tasks)
    if not is_rank_0:
        return
    if as_json:
        answer: dict[str, Any] = {"base": config.model.base}
        if data is not None:
            answer |= {"data": data, "held_out": rows}
        print(json.dumps(answer | ({"tasks": scores} if tasks is not None else {})))
        return
    if data is not None:
        Console().print(_table(data, rows))
    for name, score in scores.items():
        print_scores(name, score)


def _parse_model_options(options: ModelOptions, data: str | None) -> tuple[list[NamedAdapter], Config]:
    adapters = parse_named_adapters(options.adapters)
    base = str(options.base) if options.base is not None else common_base(adapters)
    first = adapters[0].path if adapters else None
    return adapters, inference_config(base, first, data, options.overrides)


def _prompts(asked: PromptOptions, prompter: PromptEncoder) -> list[Prompt]:
    if asked.file is not None:
        return read_prompts(asked.file, prompter, asked.raw, asked.system)
    return [] if asked.prompt is None else [make_prompt(asked.prompt, prompter, asked.raw, asked.system)]


def _print_answers(asked: PromptOptions, prompts: Sequence[Prompt], names: Sequence[str], texts: Sequence[str]) -> None:
    if asked.file is None:
        print(texts[0])
        return
    for prompt, name, text in zip(prompts, names, texts, strict=True):
        key = "prompt" if isinstance(prompt.asked, str) else "messages"
        print(json.dumps({key: prompt.asked, "completion": text, "adapter": name}, ensure_ascii=False))


def _read_line() -> str:
    return input("> ") if sys.stdin.isatty() else input()


def _generate_by_adapter(
    loaded: InferenceModel,
    names: Sequence[str],
    tokens: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    ends: Sequence[int],
    batch_size: int,
) -> Iterator[dict[int, list[int]]]:
    """For each adapter, the answers to its prompts by their place."""
    for name in dict.fromkeys(names):
        loaded.use(None if name == BASE_MODEL_NAME else name)
        own = [index for index, other in enumerate(names) if other == name]
        answers = generate_tokens(loaded, [tokens[index] for index in own], sampling, ends, batch_size)
        yield dict(zip(own, answers, strict=True))


def _table(data: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("adapter", "held-out loss", "perplexity", title=f"{data}: {rows[0]['tokens']:,} tokens")
    for row in rows:
        table.add_row(row["adapter"] or BASE_MODEL_NAME, f"{row['loss']:.4f}", f"{row['perplexity']:.4g}")
    return table
