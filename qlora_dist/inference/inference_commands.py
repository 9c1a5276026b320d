"""The commands `generate` and `eval`, from their options to what they print."""

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
from qlora_dist.errors import UserError
from qlora_dist.inference.adapter_tokenizer import load_adapter_tokenizer
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
"""Name that selects the model without an adapter."""


@dataclass(frozen=True)
class ModelOptions:
    """Options for loading a model and its adapters."""

    adapters: Sequence[str]
    """Adapters, each as `NAME=FOLDER` or `FOLDER`."""
    base: Path | None = None
    """Folder of the base model; None for the one that the adapters name."""
    quantize: bool = True
    overrides: Sequence[str] = ()
    """Configuration keys, each as `section.key=value`."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that say which prompts to answer."""

    prompt: str | None = None
    file: Path | None = None
    chat: bool = False
    raw: bool = False
    """Whether to continue a text as it is, although there is a chat template."""
    system: str | None = None
    adapter: str | None = None
    """Name of the adapter that answers; None for the first one."""
    batch_size: int = 8


def run_generate(options: ModelOptions, prompt_options: PromptOptions, sampling: SamplingOptions) -> None:
    """Answer one prompt, the prompts of a file, or a person. Call it on every rank; rank 0 prints."""
    sampling.check()
    if (prompt_options.prompt is not None) + (prompt_options.file is not None) + prompt_options.chat != 1:
        raise UserError("generate: give one of a prompt, --prompts FILE and --chat")
    adapters, config = _parse_model_options(options, None)
    tokenizer = load_adapter_tokenizer(config, [adapter.saved for adapter in adapters])
    prompt_encoder = PromptEncoder(tokenizer, config.data.chat_template)
    prompts = _prompts(prompt_options, prompt_encoder)
    first = prompt_options.adapter or (adapters[0].name if adapters else BASE_MODEL_NAME)
    for prompt in [*prompts, Prompt(content="", adapter=first, place=f"--use {first}")]:
        if prompt.adapter not in (None, BASE_MODEL_NAME, *(adapter.name for adapter in adapters)):
            known = ", ".join((*(adapter.name for adapter in adapters), BASE_MODEL_NAME))
            raise UserError(f"{prompt.place}: no adapter of the name {prompt.adapter} is given; choose from {known}")
    end = prompt_encoder.end_of_turn_token()
    ends = [] if end is None else [end]
    tokens = [prompt_encoder.encode(prompt) for prompt in prompts]
    check_prompt_lengths(tokens, max_positions(read_model_json(Path(config.model.base) / "config.json")))
    if prompt_options.chat:
        prompt_encoder.require_template("--chat")
    with open_inference_model(config, adapters, quantize=options.quantize) as loaded:
        loaded.set_adapter(None if first == BASE_MODEL_NAME else first)
        if prompt_options.chat:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
            chat(loaded, prompt_encoder, sampling, ends, _read_line, sys.stdout, prompt_options.system)
            return
        names = [prompt.adapter or first for prompt in prompts]
        tokens, names = broadcast_json([tokens, names])  # nodes may have different files of this name
        texts = [""] * len(tokens)
        for answers in _generate_by_adapter(loaded, names, tokens, sampling, ends, prompt_options.batch_size):
            for index, answer in answers.items():
                texts[index] = prompt_encoder.tokenizer.decode(answer, skip_special_tokens=True)
        if loaded.ranks.rank == 0:
            _print_answers(prompt_options, prompts, names, texts)


def run_eval(options: ModelOptions, data: str | None, tasks: TaskOptions | None, *, as_json: bool = False) -> None:
    """Print held-out loss and task scores of each adapter, or of the base. Call it on every rank; rank 0 prints."""
    if data is None and tasks is None:
        raise UserError("eval: nothing to evaluate on; give --data FILE, or --tasks NAMES")
    if tasks is not None:
        check_tasks(tasks)
    adapters, config = _parse_model_options(options, data)
    is_rank_0 = read_rank_info().rank == 0
    progress = Console(stderr=True, quiet=not is_rank_0)
    if data is not None:  # tokenize now, because later the other ranks would wait in a collective
        eval_data_config = config.data.model_copy(update={"train": []})
        tokenizer = load_adapter_tokenizer(config, [adapter.saved for adapter in adapters])
        prepare_datasets(eval_data_config, tokenizer, progress)
    rows: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    with open_inference_model(config, adapters, quantize=options.quantize) as loaded:
        for name in (*loaded.adapter_names,) or (None,):
            loaded.set_adapter(name)
            if data is not None:
                held_out = compute_eval_loss(loaded, data)
                row = {"adapter": name, "loss": held_out.loss, "perplexity": held_out.perplexity}
                rows.append({**row, "tokens": held_out.tokens})
            if tasks is not None:
                scores[name or BASE_MODEL_NAME] = run_tasks(loaded, tasks)
    if not is_rank_0:
        return
    if as_json:
        output: dict[str, Any] = {"base": config.model.base}
        if data is not None:
            output |= {"data": data, "held_out": rows}
        print(json.dumps(output | ({"tasks": scores} if tasks is not None else {})))
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


def _prompts(options: PromptOptions, prompt_encoder: PromptEncoder) -> list[Prompt]:
    if options.file is not None:
        return read_prompts(options.file, prompt_encoder, raw=options.raw, system=options.system)
    if options.prompt is None:
        return []
    return [make_prompt(options.prompt, prompt_encoder, raw=options.raw, system=options.system)]


def _print_answers(
    options: PromptOptions, prompts: Sequence[Prompt], names: Sequence[str], texts: Sequence[str]
) -> None:
    if options.file is None:
        print(texts[0])
        return
    for prompt, name, text in zip(prompts, names, texts, strict=True):
        key = "prompt" if isinstance(prompt.content, str) else "messages"
        print(json.dumps({key: prompt.content, "completion": text, "adapter": name}, ensure_ascii=False))


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
    """Yield the answers of one adapter after the other, by the index of their prompt."""
    for name in dict.fromkeys(names):
        loaded.set_adapter(None if name == BASE_MODEL_NAME else name)
        own = [index for index, other in enumerate(names) if other == name]
        answers = generate_tokens(loaded, [tokens[index] for index in own], sampling, ends, batch_size)
        yield dict(zip(own, answers, strict=True))


def _table(data: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("adapter", "held-out loss", "perplexity", title=f"{data}: {rows[0]['tokens']:,} tokens")
    for row in rows:
        table.add_row(row["adapter"] or BASE_MODEL_NAME, f"{row['loss']:.4f}", f"{row['perplexity']:.4g}")
    return table
