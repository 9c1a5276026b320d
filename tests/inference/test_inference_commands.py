"""If this fails, a command prints no answer, that of another adapter, or a traceback in place of a sentence."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.inference.chat import CHAT_HELP, chat
from qlora_dist.inference.generate import SamplingOptions
from qlora_dist.inference.inference_commands import ModelOptions, PromptOptions, run_eval, run_generate
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from qlora_dist.inference.prompts import PromptEncoder, make_prompt, read_prompts
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

CPU = ("train.device=cpu", "model.compute_dtype=fp32")
GREEDY = SamplingOptions(max_new_tokens=6, temperature=0.0)


def captured_stdout(function: Callable[..., Any], *args: Any) -> str:
    with redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


def print_eval_as_json(options: ModelOptions, data: str) -> None:
    run_eval(options, data, None, as_json=True)


def run_chat(given: list[str], lines: list[str]) -> str:
    adapters = parse_named_adapters(given)
    config = inference_config(common_base(adapters), adapters[0].path, overrides=CPU)
    remaining = iter(lines)
    with open_inference_model(config, adapters) as loaded:
        prompt_encoder = PromptEncoder(load_tokenizer(loaded.folder.path))

        def read() -> str:
            assert loaded.ranks.rank == 0
            line = next(remaining, None)
            if line is None:
                raise EOFError
            return line

        out = io.StringIO()
        end = prompt_encoder.end_of_turn_token()
        assert prompt_encoder.tokenizer.decode([end]) == "<|im_end|>"
        chat(loaded, prompt_encoder, GREEDY, [end], read, out)
    return out.getvalue()


def test_a_chat_switches_adapters_and_is_equal_on_two_ranks(material: Any) -> None:
    given = [f"one={material.first_adapter}", f"two={material.second_adapter}"]
    lines = [
        "hello world",
        "/adapter two",
        "/reset",
        "hello world",
        "/adapter stranger",
        "/base",
        "/reset",
        "hello world",
    ]
    lines += ["/adapter one", "/reset", "hello world", "what is this", "/what"]
    (alone,) = run_ranks(1, run_chat, given, lines)
    assert run_ranks(2, run_chat, given, lines) == [alone, ""]
    first, one, two, mistake, base, again, more, last, end = alone.split("\n")
    assert (first, last, end) == (CHAT_HELP, CHAT_HELP, "")
    assert mistake == "stranger: no adapter of that name; choose from one, two"
    assert again == one and len({one, two, base, more}) == 4


def test_rank_0_prints_answers_and_losses(material: Any, tmp_path: Path) -> None:
    model_options = ModelOptions([f"one={material.first_adapter}", f"two={material.second_adapter}"], overrides=CPU)
    file = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "hello", "adapter": name} for name in ("two", "base", None)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    prompt_options = PromptOptions(file=file, batch_size=1)
    (alone,) = run_ranks(1, captured_stdout, run_generate, model_options, prompt_options, GREEDY)
    assert run_ranks(2, captured_stdout, run_generate, model_options, prompt_options, GREEDY) == [alone, ""]
    answers = [json.loads(line) for line in alone.splitlines()]
    assert [answer["adapter"] for answer in answers] == ["two", "base", "one"]
    assert len({answer["completion"] for answer in answers}) == 3
    data = str(tiny_models.make_data(tmp_path / "eval.jsonl", 4))
    options = ModelOptions(model_options.adapters, overrides=(*CPU, f"data.cache={tmp_path}", "data.seq_len=64"))
    (alone,) = run_ranks(1, captured_stdout, print_eval_as_json, options, data)
    single = json.loads(alone)
    together, nothing = run_ranks(2, captured_stdout, print_eval_as_json, options, data)
    assert nothing == ""
    for rows, expected in zip(json.loads(together)["held_out"], single["held_out"], strict=True):
        assert rows.pop("adapter") == expected["adapter"]
        assert rows == pytest.approx({key: expected[key] for key in rows}, rel=1e-6)
    assert [row["adapter"] for row in single["held_out"]] == ["one", "two"]
    assert single["base"] == str(material.base)


def test_prompts_are_encoded_as_in_training(tmp_path: Path) -> None:
    """The template renders a conversation up to the question. A text is encoded as it is."""
    prompt_encoder = PromptEncoder(tiny_models.make_tokenizer())
    user = [{"role": "user", "content": "hello"}]
    rows = [{"messages": [*user, {"role": "assistant", "content": "world"}]}, {"messages": user}]
    by_file = {"a.jsonl": rows, "b.jsonl": [{"prompt": "hello"}], "c.jsonl": [{"instruction": "hello"}]}
    for name, content in by_file.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in content))
    (tmp_path / "lines").write_text("hello\n\n")
    chatml = prompt_encoder.tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    plain = prompt_encoder.tokenizer("hello")["input_ids"]
    for name, expected in {"a.jsonl": [chatml] * 2, "b.jsonl": [plain], "c.jsonl": [chatml], "lines": [chatml]}.items():
        assert [prompt_encoder.encode(prompt) for prompt in read_prompts(tmp_path / name, prompt_encoder)] == expected
    assert prompt_encoder.encode(make_prompt("hello", prompt_encoder, raw=True)) == plain


def user_error_messages(
    material: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """Return a call that fails for each part of a message."""
    other = tiny_models.make_model(tmp_path / "other", hidden_size=32)
    silent = tiny_models.make_model(tmp_path / "silent")
    tiny_models.make_tokenizer(chat_template=None).save_pretrained(silent)
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "hello"}\n{"prompt":\n')
    (tmp_path / "stranger.jsonl").write_text('{"prompt": "hello", "adapter": "stranger"}\n')
    one, prompt = [f"one={material.first_adapter}"], PromptOptions(prompt="hello")
    data = str(tiny_models.make_data(tmp_path / "data.jsonl", 3))
    old, run = tmp_path / "old", tmp_path / "run"
    old.mkdir()
    (old / "adapter_config.json").write_text((material.first_adapter / "adapter_config.json").read_text())
    (old / "adapter_model.bin").touch()
    shutil.copytree(material.first_adapter, run / "adapter")
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    head = make_adapter(tmp_path / "head", material.base, seed=3, target_modules=["q_proj", "lm_head"])
    rows = make_adapter(tmp_path / "rows", material.base, seed=3, target_modules=["q_proj", "embed_tokens"])
    experts = tmp_path / "experts"
    shutil.copytree(material.second_adapter, experts)
    tensors = load_file(material.second_adapter / "adapter_model.safetensors")
    renamed = {key.replace("self_attn.q_proj", "mlp.experts.0.up_proj"): value for key, value in tensors.items()}
    save_file(renamed, experts / "adapter_model.safetensors")

    def model(adapters: list[str] = one, base: Path | None = None, *overrides: str) -> ModelOptions:
        return ModelOptions(adapters, base, overrides=(*CPU, *overrides))

    return {
        "no such folder": (run_generate, (model(["nowhere"]), prompt, GREEDY)),
        "holds no adapter_config.json": (run_generate, (model([str(material.base)]), prompt, GREEDY)),
        "that is a model's folder; give that of an adapter": (
            run_generate,
            (model([str(material.base)]), prompt, GREEDY),
        ),
        f"give {run / 'adapter'}": (run_generate, (model([str(run)]), prompt, GREEDY)),
        f"a checkpoint is no adapter; give {run / 'adapter'}": (
            run_generate,
            (model([f"a={run / 'checkpoints' / 'step-000001'}"]), prompt, GREEDY),
        ),
        "load it with PEFT and save it again": (run_generate, (model([str(old)]), prompt, GREEDY)),
        "has LoRA on the output head": (run_eval, (model([str(head)]), data, None)),
        "has LoRA on an embedding (model.embed_tokens)": (run_generate, (model([str(rows)]), prompt, GREEDY)),
        "one expert's layer as transformers 4 had it": (run_generate, (model([str(experts)]), prompt, GREEDY)),
        "the name one is given twice": (run_generate, (model(one * 2), prompt, GREEDY)),
        "has the shape": (run_generate, (model(base=other), prompt, GREEDY)),
        "no adapter and no base": (run_generate, (model([]), prompt, GREEDY)),
        "broken.jsonl, line 2": (run_generate, (model(), PromptOptions(file=tmp_path / "broken.jsonl"), GREEDY)),
        "stranger.jsonl, line 1: no adapter of the name stranger": (
            run_generate,
            (model(), PromptOptions(file=tmp_path / "stranger.jsonl"), GREEDY),
        ),
        "--use stranger: no adapter of the name stranger": (
            run_generate,
            (model(), PromptOptions(prompt="a", adapter="stranger"), GREEDY),
        ),
        "--top-p 2": (run_generate, (model(), prompt, SamplingOptions(top_p=2))),
        "one of a prompt": (run_generate, (model(), PromptOptions(), GREEDY)),
        "has no chat template": (run_generate, (model([], silent), PromptOptions(chat=True), GREEDY)),
        "512 positions": (run_generate, (model(), PromptOptions(prompt="hello " * 600), GREEDY)),
        "unknown key": (run_generate, (model(one, None, "modle.base=a"), prompt, GREEDY)),
        "nothing to evaluate on": (run_eval, (model(), None, None)),
        "no such data file": (run_eval, (model(), "nowhere.jsonl", None)),
    }


def test_mistakes_are_one_sentence(material: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    for message, (function, arguments) in user_error_messages(material, make_adapter, tmp_path).items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            function(*arguments)
        sentence = str(caught.value)
        assert "\n" not in sentence and len(sentence) < 500 and not sentence.endswith(".")
