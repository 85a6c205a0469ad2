"""A byte-level BPE tokenizer as llama.cpp's files hold one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqarch.models import LanguageModel

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {QWEN2: "qwen2", QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}
"""llama.cpp's names of how text is cut into words, by the regular expressions of tokenizers."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of a tokenizer.

    Attributes:
        pre: llama.cpp's name of how text is cut into words.
        tokens, types: an entry for each row of the embedding; those that no text becomes are ``[PADn]``, unused.
        merges: two tokens with a space between, the first to be joined first.
        special: numbers of tokens by their meaning, ``bos``, ``eos``, ``pad`` and ``unk``.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]


def vocabulary(model: LanguageModel, pre: str | None) -> Vocabulary:
    """The vocabulary of a model with a ``tokenizer.json``.

    Raises:
        ValueError: it is no byte-level BPE, or cuts words in a way whose name must be given by ``pre``.
    """
    stored = json.loads(model.tokenizer.tokenizer.to_str())
    kind, rows = stored["model"], model.config.vocab_size
    if kind.get("type") != "BPE" or kind.get("byte_fallback") or "ByteLevel" not in json.dumps(stored["pre_tokenizer"]):
        raise ValueError("its tokenizer is no byte-level BPE, the only kind that is written to a GGUF file")
    by_number = {number: text for text, number in kind["vocab"].items()}
    types = dict.fromkeys(by_number, NORMAL)
    for added in stored.get("added_tokens", []):
        by_number[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(by_number) >= rows:
        raise ValueError(f"its tokenizer has token {max(by_number)}, and the model {rows} rows for tokens")
    return Vocabulary(
        pre or _cutting(stored["pre_tokenizer"]),
        [by_number.get(number, f"[PAD{number}]") for number in range(rows)],
        [types.get(number, UNUSED) for number in range(rows)],
        [merge if isinstance(merge, str) else " ".join(merge) for merge in kind["merges"]],
        dict(_special(model)),
    )


def _cutting(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    parts = stored["pretokenizers"] if stored["type"] == "Sequence" else [stored]
    kinds = [part["type"] for part in parts]
    last = parts[-1]
    if kinds == ["ByteLevel"] and last["use_regex"] and not last["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"] and not last["add_prefix_space"]:
        pattern = parts[0]["pattern"].get("Regex")
        if parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] and pattern in PATTERNS:
            return PATTERNS[pattern]
    raise ValueError(
        "how its tokenizer cuts text into words is none that is known here: name llama.cpp's own way by pre, as"
        " 'falcon-h1', from the list in its llama-vocab.cpp"
    )


def _special(model: LanguageModel) -> dict[str, int]:
    """By ``generation_config.json``, or else ``config.json``."""
    if model.origin is None:
        return {}
    try:
        generation = json.loads(model.origin.carried.get("generation_config.json", b"{}"))
    except ValueError:
        generation = {}
    found = {}
    for name in ("bos", "eos", "pad", "unk"):
        number = generation.get(f"{name}_token_id", (model.origin.settings or {}).get(f"{name}_token_id"))
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < model.config.vocab_size:
            found[name] = number
    return found
