"""The tokens that end a text and that stand before one, by what lies beside a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from seqarch.checkpoints.tokenizers import ByteTokenizer
from seqarch.models import LanguageModel

SEPARATOR = "<|endoftext|>"
"""Between documents, by the tokenizers that the runner trains."""

LINE_FEED = 10
"""Stands before a text of bytes where the model has no token for its start."""


def end_tokens(model: LanguageModel) -> tuple[int, ...]:
    """The tokens that end a text: of ``generation_config.json``, ``config.json`` or ``tokenizer_config.json``, of the
    first of these that names one, or else the separator of a tokenizer of the runner's; a model of bytes may have none.
    """
    return _named(model, "eos")


def prefix_token(model: LanguageModel) -> int | None:
    """The token before a text's first: one that begins texts or else one that ends them; ``None`` without either."""
    if isinstance(model.tokenizer, ByteTokenizer):
        return LINE_FEED if model.tokenizer.start is None else model.tokenizer.start
    return next(iter((*_named(model, "bos"), *_named(model, "eos"))), None)


def _named(model: LanguageModel, kind: str) -> tuple[int, ...]:
    tokenizer = model.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return () if tokenizer.start is None else (tokenizer.start,)
    for found in _candidates(model, kind):
        tokens = found if isinstance(found, list) else [found]
        numbers = [_number(model, token) for token in tokens]
        if known := [number for number in numbers if number is not None]:
            return tuple(known)
    return ()


def _candidates(model: LanguageModel, kind: str) -> Iterator[Any]:
    """What each place says, numbers or texts, one or a list."""
    origin = model.origin
    if origin is not None:
        yield _carried(model, "generation_config.json").get(f"{kind}_token_id")
        yield (origin.settings or {}).get(f"{kind}_token_id")
        yield _carried(model, "tokenizer_config.json").get(f"{kind}_token")
    if kind == "eos":
        yield SEPARATOR


def _carried(model: LanguageModel, name: str) -> dict[str, Any]:
    try:
        found = json.loads(model.origin.carried.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(model: LanguageModel, token: Any) -> int | None:
    """A token by its number, its text, or an object with its text; ``None`` where it is none of the model's."""
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        token = model.tokenizer.tokenizer.token_to_id(token)
    return token if type(token) is int and 0 <= token < model.config.vocab_size else None
