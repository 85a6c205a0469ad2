"""Generation: prompts of any lengths, one token at a time from the carried state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqarch.layers.mixer import MOST_COUNTED, first_tensor
from seqarch.ops.dispatch.checks import fits, show

if TYPE_CHECKING:
    from seqarch.models.language_model import LanguageModel
    from seqarch.models.stack import StackState

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor]


def _as_rows(prompt: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
    """The prompts as 1-D tensors.

    Raises:
        ValueError: there is no prompt, it is of another kind, one is empty, or a token is no integer or not in the
            vocabulary.
    """
    if isinstance(prompt, Tensor):
        rows = list(prompt) if prompt.ndim == 2 else [prompt]
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)):
        raise ValueError(
            f"generate: prompt is {show(prompt)}, expected a list of integers, a tensor or a list of these"
        )
    elif prompt and all(isinstance(token, int) for token in prompt):
        rows = [prompt]
    else:
        rows = list(prompt)
    if not rows:
        raise ValueError("generate: no prompt was given, expected at least one")
    tensors = [_as_row(i, row).to(device) for i, row in enumerate(rows)]
    for i, row in enumerate(tensors):
        if row.ndim != 1 or row.numel() == 0:
            raise ValueError(f"generate: prompt {i} has shape {list(row.shape)}, expected at least one token [T]")
        if row.dtype.is_floating_point or row.dtype.is_complex or row.dtype == torch.bool:
            raise ValueError(f"generate: prompt {i} has dtype {row.dtype}, expected integers")
        if not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            raise ValueError(
                f"generate: prompt {i} has tokens {int(row.min())} to {int(row.max())}, expected 0 to {vocab_size - 1}"
            )
    return [row.long() for row in tensors]


def _as_row(i: int, row: Any) -> Tensor:
    """Prompt i as a tensor.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        len(row)  # a single number has none
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"generate: prompt {i} is {show(row)}, expected a list of integers or a tensor [T]") from error


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of ``logits [B, vocab]``: ``[B]``.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: keep the likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1).
        generator: source of randomness.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # overflows to -inf alone
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    self: LanguageModel,
    prompt: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    The prompts take one pass, packed where their lengths differ; after it each token costs one step of the state.

    Args:
        prompt: one prompt (integers or a tensor ``[T]``) or several (a tensor ``[B, T]`` or a list).
        temperature: 0 is greedy.
        top_p: nucleus of each distribution that is sampled from, in (0, 1].
        stop_token: a row ends with this token, which is kept.
        generator: source of randomness, on the model's device.

    Returns:
        For each prompt, the prompt and what follows it, ``[T + new]``.

    Raises:
        ValueError: a prompt is empty, of another kind or holds a token outside the vocabulary, or an option is of
            another kind or out of range.
        RuntimeError: the logits of a row that still runs have no largest number: one is NaN or infinite.
    """
    _check_options(max_new_tokens, temperature, top_p, stop_token, generator, self.config.vocab_size)
    device = first_tensor(self).device
    rows = _as_rows(prompt, self.config.vocab_size, device)
    logits, state = _read_prompts(self, rows, max_new_tokens)
    new: list[Tensor] = []
    running = torch.ones(len(rows), dtype=torch.bool, device=device)
    while len(new) < max_new_tokens and bool(running.any()):
        _check_logits(logits, running, len(new))
        tokens = sample(logits, temperature, top_p, generator)
        new.append(tokens)
        if stop_token is not None:
            running &= tokens != stop_token
        if len(new) < max_new_tokens:
            features, state = self.features(tokens.unsqueeze(1), state)
            logits = self.logits(features[:, 0])
    following = torch.stack(new, dim=1) if new else torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    return [torch.cat([row, _until(tokens, stop_token)]) for row, tokens in zip(rows, following, strict=True)]


def _check_options(
    max_new_tokens: Any, temperature: Any, top_p: Any, stop_token: Any, generator: Any, vocab_size: int
) -> None:
    last = vocab_size - 1
    rules = [
        ("max_new_tokens", max_new_tokens, (int,), lambda: 0 <= max_new_tokens <= MOST_COUNTED, "an int of at least 0"),
        ("temperature", temperature, (float,), lambda: temperature >= 0, "a float of at least 0"),
        ("top_p", top_p, (float,), lambda: 0 < top_p <= 1, "a float in (0, 1]"),
        (
            "stop_token",
            stop_token,
            (int, NoneType),
            lambda: stop_token is None or 0 <= stop_token <= last,
            f"an int from 0 to {last}",
        ),
        ("generator", generator, (torch.Generator, NoneType), lambda: True, "a torch.Generator or None"),
    ]
    for name, value, kinds, holds, expected in rules:
        if not fits(value, kinds) or not holds():
            raise ValueError(f"generate: {name} is {show(value)}, expected {expected}")


def _check_logits(logits: Tensor, running: Tensor, step: int) -> None:
    """Raise where the largest logit of a running row is no number; greedy decoding would take some token even so."""
    lost = ~logits.amax(dim=-1).isfinite() & running
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        raise RuntimeError(
            f"generate: after {step} new tokens the logits of prompt {row} hold NaN or infinity: look for it in the"
            " model's parameters, or in activations that overflow its dtype"
        )


def _read_prompts(model: LanguageModel, rows: list[Tensor], max_new_tokens: int) -> tuple[Tensor, StackState]:
    """Logits ``[B, vocab]`` after each prompt, and the state with one row per prompt."""
    lengths = [len(row) for row in rows]
    state = model.init_state(len(rows), max_length=max(lengths) + max_new_tokens)
    if len(set(lengths)) == 1:
        features, state = model.features(torch.stack(rows), state)
        return model.logits(features[:, -1]), state
    cu_seqlens = [0, *accumulate(lengths)]
    features, state = model.features(torch.cat(rows).unsqueeze(0), state, cu_seqlens=cu_seqlens)
    return model.logits(features[0, [end - 1 for end in cu_seqlens[1:]]]), state


def _until(tokens: Tensor, stop_token: int | None) -> Tensor:
    """The tokens up to and including the first stop token."""
    hits = (tokens == stop_token).nonzero() if stop_token is not None else tokens.new_empty(0)
    return tokens[: int(hits[0]) + 1] if len(hits) else tokens
