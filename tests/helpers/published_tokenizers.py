"""Small tokenizers with the special tokens, the kind of BPE and the chat templates of published models.

The vocabulary is made of `SENTENCES` and of the templates' own words: each word of these is one token.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "data" / "templates"

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "You are a cat. Who sat? a thought call it what",
    "role user assistant system model tool ipython",
]

# the rule of Llama 3 and Qwen: consecutive line feeds are one piece
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Family(NamedTuple):
    """Properties of a family's tokenizer."""

    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    """Token that ends the assistant's turn."""
    words: str = "bytes"
    """Kind of BPE: bytes (byte-level), prefixed (sentencepiece's, with a space before texts) or plain (without it)."""


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "chatml": Family(_CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(
        (*_CHATML, "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "llama-3": Family(_LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama-3.1": Family(_LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "mistral": Family(("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>", "prefixed"),
    "mistral-nemo": Family(
        (
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "<s>",
        "</s>",
        "</s>",
    ),
    "gemma": Family(
        ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>", "plain"
    ),
}


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


@functools.cache
def _serialized(name: str) -> str:
    family = FAMILIES[name]
    written = re.sub(r"\\n", "\n", " ".join(re.findall(r"'(.*?)'", template(name))))
    for special in family.specials:
        written = written.replace(special, " ")
    words = {word for text in (*SENTENCES, written) for word in text.split()}
    corpus = [piece for word in sorted(words) for piece in (word, " " + word, "\n\n")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if family.words == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=4000, initial_alphabet=alphabet, special_tokens=list(family.specials), show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return tokenizer.to_str()

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4000, show_progress=False))
    rules = json.loads(trained.to_str())["model"]
    listed = [*family.specials, *(f"<0x{byte:02X}>" for byte in range(256)), *rules["vocab"]]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(dict.fromkeys(listed))},
        merges=[tuple(merge) for merge in rules["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", "▁")
    prefixed = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.normalizer = prefixed if family.words == "prefixed" else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(family.specials))
    return tokenizer.to_str()


def make_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerFast:
    """Return a family's tokenizer with its template."""
    family = FAMILIES[name]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_serialized(name)),
        **{"bos_token": family.bos, "eos_token": family.eos, **options},
    )
    made.chat_template = template(name)
    return made


def token_texts(tokenizer: PreTrainedTokenizerFast, tokens: Any) -> list[str]:
    """Return the text of each token, with its space and line feeds."""
    named = tokenizer.convert_ids_to_tokens([int(token) for token in tokens])
    return [name.translate({ord("Ġ"): " ", ord("Ċ"): "\n", ord("▁"): " "}) for name in named]
