"""Log-likelihoods and continuations of lists of tokens: what several requests begin with is read once.

A request is a context and what follows it. Requests with the same context read it once; its state is then taken once
for each of them (:func:`seqarch.layers.rows.state_rows`). Rows of different lengths are packed, the longest first, so
that none is padded, and a row that is too long for one pass is read in parts, each from the state before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.layers.mixer import first_tensor
from seqarch.layers.rows import state_rows
from seqarch.models import LanguageModel
from seqarch.models.sampling import sample
from seqarch.ops.dispatch.checks import accumulation_dtype

Tokens = tuple[int, ...]

MOST_TOKENS = 16_384
"""Of one pass; more than a batch needs to keep a machine busy, few enough for the activations of a layer."""

MOST_LOGITS = 1 << 27
"""Numbers of the logits that are held at a time: 512 MB in float32."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a context.

    Attributes:
        until: texts, any of which ends a continuation and is no part of it.
        max_new_tokens: the longest continuation.
        temperature: 0 takes the likeliest token.
        top_p: keep the likeliest tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep so many of the likeliest tokens; 0 keeps all.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class Scorer:
    """Scores and continues tokens with one model, which is not trained meanwhile.

    Args:
        batch_size: rows of a pass, at most.
        share: whether requests with the same context read it once; the numbers are the same either way.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 8, share: bool = True):
        self.model, self.batch_size, self.share = model, batch_size, share
        self.device = first_tensor(model).device
        self.most_judged = max(1, MOST_LOGITS // model.config.vocab_size)
        self.passes = self.tokens_read = 0

    @torch.no_grad()
    def log_likelihoods(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Of each context and continuation, both of at least one token: ``ln p(continuation | context)`` in nats, and
        whether each of its tokens was the likeliest.
        """
        following: dict[Tokens, list[Tokens]] = {}
        for context, continuation in dict.fromkeys(requests):
            following.setdefault(context, []).append(continuation)
        shared = {context for context, ends in following.items() if self.share and len(ends) > 1 and len(context) > 1}
        scores: dict[tuple[Tokens, Tokens], tuple[float, bool]] = {}
        alone = [(context, end) for context, ends in following.items() if context not in shared for end in ends]
        for batch in self._batches(alone, lambda pair: len(pair[0]) + len(pair[1]) - 1):
            rows = [context + end[:-1] for context, end in batch]
            found = self._score(rows, [len(end) for _, end in batch], [end for _, end in batch], None)
            scores.update(zip(batch, found, strict=True))
        for contexts in self._batches(shared, len):
            scores.update(self._of_shared(contexts, following))
        return [scores[request] for request in requests]

    def _of_shared(
        self, contexts: Sequence[Tokens], following: dict[Tokens, list[Tokens]]
    ) -> Iterator[tuple[tuple[Tokens, Tokens], tuple[float, bool]]]:
        """The scores of all continuations of some contexts: the first token by the context's logits, the others by the
        state after it.
        """
        features, state = self._read(contexts, [1] * len(contexts), None, 0)
        ends = [(row, end) for row, context in enumerate(contexts) for end in following[context]]
        firsts = self._judge(features, [row for row, _ in ends], [end[0] for _, end in ends])
        scores = dict(zip(ends, firsts, strict=True))
        longer = [each for each in ends if len(each[1]) > 1]
        for batch in self._batches(longer, lambda each: len(each[1])):
            rows, targets = [end[:-1] for _, end in batch], [end[1:] for _, end in batch]
            before = state_rows(state, [row for row, _ in batch])
            rest = self._score(rows, [len(each) for each in targets], targets, before)
            for each, (value, greedy) in zip(batch, rest, strict=True):
                first = scores[each]
                scores[each] = first[0] + value, first[1] and greedy
        for (row, end), score in scores.items():
            yield (contexts[row], end), score

    def _score(
        self, rows: Sequence[Tokens], counts: Sequence[int], targets: Sequence[Tokens], state: Any
    ) -> list[tuple[float, bool]]:
        """Of each row the log-likelihood of its targets, which are what should follow its last ``count`` tokens."""
        features, _ = self._read(rows, counts, state, 0)
        flat = [token for each in targets for token in each]
        judged = self._judge(features, range(len(flat)), flat)
        bounds = [0, *accumulate(counts)]
        parts = [judged[start:end] for start, end in pairwise(bounds)]
        return [(sum(value for value, _ in part), all(greedy for _, greedy in part)) for part in parts]

    def _judge(self, features: Tensor, places: Iterable[int], targets: Sequence[int]) -> list[tuple[float, bool]]:
        """Of each target its log-probability by the features ``[M, D]`` at its place, and whether it is likeliest."""
        found: list[tuple[float, bool]] = []
        at = torch.tensor([*places], dtype=torch.int64, device=self.device)
        expected = torch.tensor([*targets], dtype=torch.int64, device=self.device)
        for start in range(0, len(expected), self.most_judged):
            wanted = expected[start : start + self.most_judged]
            logits = self.model.logits(features[at[start : start + self.most_judged]])
            values = logits.to(accumulation_dtype(logits)).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            found += zip(values.tolist(), (logits.argmax(-1) == wanted).tolist(), strict=True)
        return found

    def _read(self, rows: Sequence[Tokens], counts: Sequence[int], state: Any, room: int) -> tuple[Tensor, Any]:
        """The features of the last ``count`` tokens of each row, one row's after the other's, and the state.

        Args:
            state: of one row each, before these tokens.
            room: tokens that will be read after these, for which caches are made large enough.
        """
        lengths = [len(row) for row in rows]
        if state is None:
            state = self.model.init_state(len(rows), max_length=max(lengths) + room)
        if len(rows) == 1:
            return self._read_in_parts(rows[0], counts[0], state)
        ends = [*accumulate(lengths)]
        places = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
        same = len(set(lengths)) == 1
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=self.device)
        tokens = tokens.view(len(rows), -1) if same else tokens[None]
        return self._pass(tokens, state, None if same else [0, *ends], places)

    def _read_in_parts(self, row: Tokens, count: int, state: Any) -> tuple[Tensor, Any]:
        """The same of one row, in passes of at most so many tokens."""
        tokens = torch.tensor(row, dtype=torch.int64, device=self.device)[None]
        features = []
        for start in range(0, len(row), MOST_TOKENS):
            part = tokens[:, start : start + MOST_TOKENS]
            first = max(len(row) - count - start, 0)
            found, state = self._pass(part, state, None, range(min(first, part.shape[1]), part.shape[1]))
            features.append(found)
        return torch.cat(features), state

    def _pass(self, tokens: Tensor, state: Any, cu_seqlens: Any, places: Iterable[int]) -> tuple[Tensor, Any]:
        self.passes += 1
        self.tokens_read += tokens.numel()
        wanted = torch.tensor([*places], dtype=torch.int64, device=self.device)
        if not len(wanted):
            features, state = self.model.features(tokens, state, cu_seqlens)
            return features[0, :0], state
        features, state = self.model.features(tokens, state, cu_seqlens, places=wanted)
        return features[0], state

    def _batches(self, items: Iterable[Any], length: Any) -> Iterator[list[Any]]:
        """The items in batches, the longest first: at most so many rows, and tokens if there is more than one."""
        batch: list[Any] = []
        tokens = 0
        for item in sorted(items, key=length, reverse=True):
            if batch and (len(batch) == self.batch_size or tokens + length(item) > MOST_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(item)
            tokens += length(item)
        if batch:
            yield batch

    @torch.no_grad()
    def continuations(self, requests: Sequence[tuple[Tokens, Sampling]], ends: Sequence[int]) -> list[str]:
        """The text that follows each context of at least one token, up to where its sampling ends it.

        Args:
            ends: tokens that end a text, and are no part of it.
        """
        texts: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i][1]), -len(requests[i][0]), requests[i][0]))
        for how, same in groupby(order, key=lambda i: requests[i][1]):
            for batch in self._batches(same, lambda i: len(requests[i][0])):
                found = self._continue([requests[i][0] for i in batch], how, ends)
                for i, text in zip(batch, found, strict=True):
                    texts[i] = text
        return texts

    def _continue(self, contexts: Sequence[Tokens], how: Sampling, ends: Sequence[int]) -> list[str]:
        distinct = [*dict.fromkeys(contexts)] if self.share else [*contexts]
        features, state = self._read(distinct, [1] * len(distinct), None, how.max_new_tokens)
        if self.share and len(distinct) < len(contexts):
            rows = [distinct.index(context) for context in contexts]
            features, state = features[rows], state_rows(state, rows)
        new: list[list[int]] = [[] for _ in contexts]
        running = [*range(len(contexts))]
        for step in range(how.max_new_tokens):
            tokens = sample(self.model.logits(features), how.temperature, how.top_p, top_k=how.top_k)
            kept = [k for k, token in enumerate(tokens.tolist()) if self._goes_on(new[running[k]], token, how, ends)]
            if not kept or step + 1 == how.max_new_tokens:
                break
            if len(kept) < len(running):
                running, tokens, state = [running[k] for k in kept], tokens[kept], state_rows(state, kept)
            found, state = self.model.features(tokens[:, None], state)
            features = found[:, 0]
        return [_until(self.model.tokenizer.decode(tokens), how.until) for tokens in new]

    def _goes_on(self, tokens: list[int], token: int, how: Sampling, ends: Sequence[int]) -> bool:
        """Whether a text goes on after one more token, which is added to it unless it ends it."""
        if token in ends:
            return False
        tokens.append(token)
        if not how.until:
            return True
        longest = max(len(text.encode()) for text in how.until)  # a token stands for a byte at least
        tail = self.model.tokenizer.decode(tokens[-longest - 1 :])
        return not any(text in tail for text in how.until)


def _until(text: str, until: Sequence[str]) -> str:
    """The text up to the first of these."""
    return text[: min((place for each in until if (place := text.find(each)) >= 0), default=len(text))]
