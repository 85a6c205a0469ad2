"""Generation: prompts of any lengths, one token at a time from the carried state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqarch.layers.mixer import MOST_COUNTED, first_tensor
from seqarch.layers.rows import state_rows
from seqarch.models.sampling import GenerationOptions, LogitsProcessor
from seqarch.ops.dispatch.checks import fits, show

if TYPE_CHECKING:
    from seqarch.models.language_model import LanguageModel
    from seqarch.models.stack import StackState

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor]


def as_rows(prompt: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
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


@torch.no_grad()
def generate(
    self: LanguageModel,
    prompt: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    stop_token: int | Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    num_sequences: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    The prompts take one pass, packed where their lengths differ; after it each token costs one step of the state. The
    options that are not named here are those of :class:`seqarch.models.sampling.GenerationOptions`.

    Args:
        prompt: one prompt (integers or a tensor ``[T]``) or several (a tensor ``[B, T]`` or a list).
        num_sequences: continuations of each prompt, which is read once.

    Returns:
        For each prompt, the prompt and what follows it, ``[T + new]``; several continuations of one stand together.

    Raises:
        ValueError: a prompt is empty, of another kind or holds a token outside the vocabulary, an option is of
            another kind or out of range, or a processor returned something else than logits.
        RuntimeError: the logits of a row that still runs have no largest number: one is NaN or infinite.
    """
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logits_processors=logits_processors,
        stop_token=stop_token,
        stop_sequences=stop_sequences,
        generator=generator,
    )
    rows = _checked(self, prompt, options, num_sequences)
    steps = [*_steps(self, rows, options, num_sequences)]
    rows = [row for row in rows for _ in range(num_sequences)]
    if not steps:
        return rows
    following = torch.stack([tokens for tokens, _ in steps], dim=1)
    counts = torch.stack([running for _, running in steps]).sum(0).tolist()
    return [torch.cat([row, new[:count]]) for row, new, count in zip(rows, following, counts, strict=True)]


def stream(self: LanguageModel, prompt: Prompts, max_new_tokens: int, **options: Any) -> Iterator[int]:
    """Continue one prompt, a token at a time: each is there as soon as it is chosen.

    Whoever stops asking has paid for the tokens that were asked for. Several prompts at a time are what
    :class:`seqarch.serving.Generator` is for.

    Args:
        options: those of :meth:`generate`, but for ``num_sequences``; the tokens are the same.

    Raises:
        ValueError: as of :meth:`generate`, or there are several prompts; before anything is read.
        RuntimeError: as of :meth:`generate`, when the token is asked for.
    """
    checked = GenerationOptions(max_new_tokens=max_new_tokens, **options)
    rows = _checked(self, prompt, checked, 1)
    if len(rows) != 1:
        raise ValueError(f"stream: {len(rows)} prompts were given, expected one")
    return (int(tokens) for tokens, _ in _steps(self, rows, checked, 1))


def _checked(model: LanguageModel, prompt: Prompts, options: GenerationOptions, num_sequences: Any) -> list[Tensor]:
    """The prompts as 1-D tensors on the model's device.

    Raises:
        ValueError: they, or the options, are not as :func:`generate` takes them.
    """
    vocab_size = model.config.vocab_size
    options.check_vocabulary(vocab_size)
    if not fits(num_sequences, (int,)) or not 1 <= num_sequences <= MOST_COUNTED:
        raise ValueError(f"generate: num_sequences is {show(num_sequences)}, expected an int of at least 1")
    if num_sequences > 1 and options.temperature == 0:
        raise ValueError(
            f"generate: num_sequences is {num_sequences} at temperature 0, expected 1, as all would be the same"
        )
    return as_rows(prompt, vocab_size, first_tensor(model).device)


@torch.no_grad()
def _steps(
    model: LanguageModel, rows: list[Tensor], options: GenerationOptions, num_sequences: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each step, ``[B]``, and which rows had not ended before it, ``[B]``."""
    if not options.max_new_tokens:
        return
    logits, state = _read_prompts(model, rows, options.max_new_tokens)
    if num_sequences > 1:
        index = [row for row in range(len(rows)) for _ in range(num_sequences)]
        rows, logits, state = [rows[i] for i in index], logits[index], state_rows(state, index)
    tokens_so_far = _TokensSoFar(rows, options.max_new_tokens) if options.reads_tokens else None
    new: list[Tensor] = []
    running = torch.ones(len(rows), dtype=torch.bool, device=logits.device)
    likeliest: Tensor | None = None
    while True:
        check_logits(logits, running, len(new))
        if tokens_so_far is not None:
            logits = options.adjusted(logits, tokens_so_far.rows)
        new.append(options.choose(logits, options.generator) if likeliest is None else likeliest)
        yield new[-1], running
        if options.ends:
            running = running & ~options.rows_ended(new)
        if len(new) == options.max_new_tokens or not bool(running.any()):
            return
        if tokens_so_far is not None:
            tokens_so_far.add(new[-1])
        if options.is_greedy and model.greedy_token.serves(model, new[-1]):
            likeliest, largest, state = model.greedy_token(model, new[-1], state)
            logits = largest.unsqueeze(1)  # the largest of each row is all that is checked
            continue
        features, state = model.features(new[-1].unsqueeze(1), state)
        logits, likeliest = model.logits(features[:, 0]), None


class _TokensSoFar:
    """The tokens of rows of different lengths, in memory that is there from the start."""

    def __init__(self, rows: list[Tensor], room: int):
        self.memory = [torch.cat([row, row.new_empty(room)]) for row in rows]
        self.lengths = [len(row) for row in rows]

    @property
    def rows(self) -> list[Tensor]:
        return [tokens[:length] for tokens, length in zip(self.memory, self.lengths, strict=True)]

    def add(self, tokens: Tensor) -> None:
        for i, token in enumerate(tokens):
            self.memory[i][self.lengths[i]] = token
            self.lengths[i] += 1


def check_logits(logits: Tensor, running: Tensor, step: int) -> None:
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
