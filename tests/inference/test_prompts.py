"""If this fails, prompts are encoded differently from training data."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import processors

from qlora_dist.inference.prompts import PromptEncoder, make_prompt, read_prompts
from tests.helpers.published_tokenizers import make_tokenizer

USER = {"role": "user", "content": "the cat"}
TOOLS = [{"type": "function", "function": {"name": "what", "parameters": {}}}]


def test_tools_and_variables_of_a_row_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen3")
    path = tmp_path / "a.jsonl"
    row = {"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    path.write_text(json.dumps(row))
    prompt_encoder = PromptEncoder(tokenizer)
    (tokens,) = [prompt_encoder.encode(prompt) for prompt in read_prompts(path, prompt_encoder)]
    expected = tokenizer.apply_chat_template([USER], TOOLS, add_generation_prompt=True, enable_thinking=False)
    assert tokens == expected["input_ids"]


def test_a_prompt_that_was_rendered_before_gets_no_second_bos_token() -> None:
    tokenizer = make_tokenizer("llama-3")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    prompt_encoder = PromptEncoder(tokenizer)
    plain = prompt_encoder.encode(make_prompt("the cat", prompt_encoder, raw=True))
    assert tokenizer.decode(plain) == "<|begin_of_text|>the cat"
    assert prompt_encoder.encode(make_prompt("<|begin_of_text|>the cat", prompt_encoder, raw=True)) == plain
