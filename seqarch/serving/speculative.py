"""Speculative decoding: several tokens are proposed cheaply, and the model judges them in one pass.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1; Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling". A proposal x of a draft with distribution q is
taken with probability ``min(1, p(x) / q(x))``, and otherwise replaced by a draw from ``max(0, p - q)``: the tokens have
the distribution p of plain sampling, whatever the draft proposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from seqarch.layers.mixer import MOST_COUNTED, first_tensor
from seqarch.models import LanguageModel
from seqarch.models.generation import Prompts, as_rows, check_logits
from seqarch.models.sampling import GenerationOptions
from seqarch.ops.dispatch.checks import fits, show
from seqarch.state.checkpoints import Checkpoints


class Draft(Protocol):
    """What proposes tokens of one sequence, such as :class:`PromptLookup`."""

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], Tensor | None]:
        """At most ``count`` tokens to follow these, and the distributions ``[count, vocab]`` that they were drawn from.

        ``None`` in place of the distributions where the proposals are certain.
        """
        ...


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the last tokens where they stood before, as in quotations and in code: no second model.

    Attributes:
        longest, shortest: how many last tokens are looked for, the most first and the last such place first.
    """

    longest: int = 3
    shortest: int = 1

    def __post_init__(self):
        right = all(fits(size, (int,)) for size in (self.longest, self.shortest))
        if not right or not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"PromptLookup: longest is {show(self.longest)} and shortest {show(self.shortest)}, expected"
                " ints of at least 1, the longest no smaller"
            )

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], Tensor | None]:
        known = [*tokens]
        for size in range(min(self.longest, len(known) - 1), self.shortest - 1, -1):
            end = known[-size:]
            for start in range(len(known) - size - 1, -1, -1):
                if known[start : start + size] == end:
                    return known[start + size : start + size + count], None
        return [], None


class _ModelDraft:
    """Proposes what a smaller model continues with, under the same options."""

    def __init__(self, model: LanguageModel, options: GenerationOptions, count: int):
        self.options = options
        self.read = Checkpoints(
            model, every=1, keep=count + 2
        )  # a copy after each proposal, so that none is read again
        self.tokens: list[int] = []

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], Tensor | None]:
        known = [*tokens]
        pairs = enumerate(zip(self.tokens, known, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(known) - 1))
        self.read.rollback(len(self.tokens) - common)
        unread, distributions = known[common:], []
        proposed: list[int] = []
        while len(proposed) < count:
            logits = self.read.read(unread, last=1)
            probabilities = _distribution(self.options, logits, [*known, *proposed])
            proposed += _drawn(self.options, probabilities)
            distributions.append(probabilities)
            unread = proposed[-1:]
        self.tokens = [*known, *proposed[:-1]]
        return proposed, torch.cat(distributions)


@dataclass(frozen=True)
class Speculated:
    """What :func:`speculate` returns.

    Attributes:
        tokens: the prompt and what follows it, ``[T + new]``.
        state: of one row, after all of these but the last.
        passes: of the model, after the prompt's; plain decoding takes one a token.
        proposed, accepted: tokens of the draft.
    """

    tokens: Tensor
    state: Any
    passes: int
    proposed: int
    accepted: int


def speculate(
    model: LanguageModel,
    prompt: Prompts,
    max_new_tokens: int,
    *,
    draft: LanguageModel | Draft,
    draft_tokens: int = 4,
    exact_state: bool = False,
    **options: Any,
) -> Speculated:
    """Continue one prompt as :meth:`seqarch.LanguageModel.generate` does, by proposals of a draft.

    The tokens are those of greedy decoding, or have the distribution of plain sampling with the same options. The
    proposals are judged by logits of one pass, which differ from those of steps by rounding: where two tokens are as
    good as each other, another may be taken.

    Args:
        draft: a smaller model of the same vocabulary, or ``PromptLookup()``, or anything that proposes.
        draft_tokens: proposals for a pass.
        exact_state: read what was accepted again, a token at a time, so that the state is to the bit that of plain
            decoding. This takes the time that speculation saves. Without it, where a proposal was rejected, those
            accepted are read again in one call from a copy of the state; either way nothing of what was rejected is in
            the state (:class:`seqarch.state.Checkpoints`).
        options: those of ``generate``, but for ``num_sequences``.

    Raises:
        ValueError: the draft has another vocabulary, there are several prompts, or as of ``generate``.
        RuntimeError: as of ``generate``.
    """
    checked = GenerationOptions(max_new_tokens=max_new_tokens, **options)
    vocab_size, device = model.config.vocab_size, first_tensor(model).device
    checked.check_vocabulary(vocab_size)
    rows = as_rows(prompt, vocab_size, device)
    if len(rows) != 1:
        raise ValueError(f"speculate: {len(rows)} prompts were given, expected one")
    if not fits(draft_tokens, (int,)) or draft_tokens < 1:
        raise ValueError(f"speculate: draft_tokens is {show(draft_tokens)}, expected an int of at least 1")
    if isinstance(draft, LanguageModel):
        if draft.config.vocab_size != vocab_size:
            raise ValueError(
                f"speculate: the draft has a vocabulary of {draft.config.vocab_size} tokens, expected {vocab_size}, as"
                " the model has"
            )
        draft = _ModelDraft(draft, checked, draft_tokens)
    return _Speculation(model, rows[0].tolist(), checked, draft).run(draft_tokens, exact_state)


class _Speculation:
    """One sequence: the model has read all its tokens but the last."""

    def __init__(self, model: LanguageModel, prompt: list[int], options: GenerationOptions, draft: Draft):
        self.tokens, self.options, self.draft = prompt, options, draft
        self.new: list[int] = []
        self.read = Checkpoints(model, every=MOST_COUNTED, keep=1)
        self.device = first_tensor(model).device
        if len(prompt) > 1:
            self.read.read(prompt[:-1], last=0)

    @torch.no_grad()
    def run(self, draft_tokens: int, exact_state: bool) -> Speculated:
        passes = proposals = accepted = 0
        while len(self.new) < self.options.max_new_tokens and not (self.new and self.options.ended(self.new)):
            count = min(draft_tokens, self.options.max_new_tokens - len(self.new) - 1)
            proposed, distributions = self.draft.propose(self.tokens, count) if count else ([], None)
            self._check(proposed, count)
            self.read.mark()
            logits = self.read.read([self.tokens[-1], *proposed])
            check_logits(logits, torch.ones(len(logits), dtype=torch.bool, device=self.device), len(self.new))
            taken = self._until_end(judged(self.options, logits, self.tokens, proposed, distributions))
            self._take_back(len(proposed) - (len(taken) - 1), len(taken), exact_state)
            passes, proposals = passes + 1, proposals + len(proposed)
            accepted += sum(a == b for a, b in zip(taken, proposed, strict=False))
        made = torch.tensor(self.tokens, dtype=torch.int64, device=self.device)
        return Speculated(made, self.read.state, passes, proposals, accepted)

    def _check(self, proposed: list[int], count: int) -> None:
        most = self.read.model.config.vocab_size
        if len(proposed) > count or not all(fits(token, (int,)) and 0 <= token < most for token in proposed):
            raise ValueError(f"speculate: the draft proposed {proposed}, expected at most {count} tokens below {most}")

    def _until_end(self, taken: list[int]) -> list[int]:
        """Add these tokens, up to the one that ends the sequence: those that were added."""
        for number, token in enumerate(taken, 1):
            self.tokens.append(token)
            self.new.append(token)
            if self.options.ended(self.new):
                return taken[:number]
        return taken

    def _take_back(self, count: int, taken: int, exact_state: bool) -> None:
        """Leave the state after all tokens but the last."""
        if not exact_state:
            self.read.rollback(count)
            return
        self.read.rollback(count + taken)
        for token in self.tokens[-taken - 1 : -1]:
            self.read.read([token], last=0)


def judged(
    options: GenerationOptions, logits: Tensor, tokens: list[int], proposed: list[int], distributions: Tensor | None
) -> list[int]:
    """The proposals that are accepted, and the token after them.

    Args:
        logits: after the last of the tokens so far and after each proposal, ``[proposals + 1, vocab]``.
        distributions: that the proposals were drawn from, ``[proposals, vocab]``; ``None`` where they are certain.
    """
    for i, token in enumerate(proposed):
        p = _distribution(options, logits[i : i + 1], [*tokens, *proposed[:i]])
        q = torch.zeros_like(p).index_fill(1, torch.tensor([token], device=p.device), 1.0)
        q = q if distributions is None else distributions[i : i + 1].to(p)
        if options.temperature == 0:
            accepted = bool(p[0, token] == 1)
        else:
            draw = torch.rand((), generator=options.generator, device=p.device, dtype=p.dtype)
            accepted = bool(draw * q[0, token] < p[0, token])
        if not accepted:
            rest = (p - q).clamp(min=0)
            return [*proposed[:i], *_drawn(options, rest if bool(rest.sum() > 0) else p)]
    return [*proposed, *_drawn(options, _distribution(options, logits[len(proposed) :], [*tokens, *proposed]))]


def _distribution(options: GenerationOptions, logits: Tensor, tokens: list[int]) -> Tensor:
    if options.reads_tokens:
        logits = options.adjusted(logits, [torch.tensor(tokens, device=logits.device)])
    return options.probabilities(logits)


def _drawn(options: GenerationOptions, weights: Tensor) -> list[int]:
    """A token by weights ``[1, vocab]``; at temperature 0 the only one that has any."""
    if options.temperature == 0:
        return weights.argmax(-1).tolist()
    return torch.multinomial(weights, 1, generator=options.generator)[0].tolist()
