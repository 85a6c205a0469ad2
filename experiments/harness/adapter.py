"""A language model of seqarch's as the lm-evaluation-harness calls one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from experiments.harness.scoring import Sampling, Scorer, Tokens
from experiments.harness.special_tokens import end_tokens, prefix_token
from experiments.util.errors import RunnerError
from seqarch.models import LanguageModel

KNOWN = ("do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k")
NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}
"""Arguments of generation that may be given with the value that asks for nothing."""


class SeqarchLM(TemplateLM):
    """A model on the requests of the harness.

    Texts are encoded without special tokens. An empty context is the token that begins a text, or else the one that
    ends it (:mod:`experiments.harness.special_tokens`).

    Args:
        model: with a tokenizer.
        limit: the most tokens of a request; ``None`` where the model has no limit. A rolling text that is longer is
            scored in windows of so many tokens; without a limit each token is scored after all before it.

    Raises:
        RunnerError: the model has no tokenizer, or neither a token that begins a text nor one that ends it.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 8, limit: int | None = None, share: bool = True):
        super().__init__()
        if model.tokenizer is None:
            where = "the model" if model.origin is None else model.origin.folder
            raise RunnerError(f"{where} has no tokenizer, by a tokenizer.json or as a model of bytes: it reads no text")
        prefix = prefix_token(model)
        if prefix is None:
            raise RunnerError("the model's files name no token that begins or ends a text (bos_token_id, eos_token_id)")
        self.model, self.limit, self._prefix, self.ends = model, limit, prefix, end_tokens(model)
        self.scorer = Scorer(model, batch_size, share)
        self._device = self.scorer.device

    @property
    def eot_token_id(self) -> int:
        return self.ends[0] if self.ends else self._prefix

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return sys.maxsize if self.limit is None else self.limit

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        first, following = super()._encode_pair(context, continuation)
        if not following:
            raise RunnerError(
                f"the continuation {continuation!r} adds no token to a context that ends in {context[-20:]!r}: tokens"
                " go over the border between them; begin it with a space, as by target_delimiter"
            )
        return first or [self._prefix], following

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            self._check_length(len(context) + len(continuation) - 1, str(texts[0]) if texts else "")
            pairs.append((tuple(context), tuple(continuation)))
        scored = [pair for pair in pairs if pair[1]]  # a text of the prefix alone has nothing to score
        found = dict(zip(scored, self.scorer.log_likelihoods(scored), strict=True))
        return [found.get(pair, (0.0, True)) for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[*self._windows(tokens)] for tokens in texts]
        scores = iter(self.scorer.log_likelihoods([window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def _windows(self, tokens: list[int]) -> list[tuple[Tokens, Tokens]]:
        """Each a context and the tokens that are scored after it; together they score each token once."""
        if not tokens:
            return []
        if self.limit is None:
            return [((self._prefix,), tuple(tokens))]
        windows = get_rolling_token_windows(tokens, self._prefix, self.limit, context_len=1)
        return [(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = []
        for request in tqdm(requests, "Encoding", disable=disable_tqdm):
            context, options = request.args  # type: ignore[misc]
            tokens, how = tuple(self.tok_encode(context)) or (self._prefix,), sampling(options)
            self._check_length(len(tokens), context)
            if self.limit is not None:
                how = Sampling(**{**vars(how), "max_new_tokens": min(how.max_new_tokens, self.limit - len(tokens))})
            asked.append((tokens, how))
        return self.scorer.continuations(asked, self.ends)

    def _check_length(self, length: int, text: str) -> None:
        if self.limit is not None and length > self.limit:
            raise RunnerError(
                f"a request of {length} tokens is longer than the {self.limit} that the model reads (its"
                f" max_position_embeddings, or --max-length): {text[:40]!r} ..."
            )


def sampling(options: Mapping[str, Any]) -> Sampling:
    """How a task's ``generation_kwargs`` want a context to be continued.

    Raises:
        RunnerError: an option that would change the result is not known here, or a value is out of range.
    """
    known: Mapping[str, Any] = {**normalize_gen_kwargs({**options}, Sampling.max_new_tokens)}
    for name, value in known.items():
        if name not in KNOWN and not (name in NEUTRAL and NEUTRAL[name] == value):
            raise RunnerError(f"generation_kwargs has {name}={value!r}; expected only {', '.join(KNOWN)}")
    how = Sampling(
        until=tuple(text for text in known["until"] if text),
        max_new_tokens=known["max_gen_toks"],
        temperature=float(known.get("temperature", 1.0)) if known["do_sample"] else 0.0,
        top_p=float(known.get("top_p", 1.0)),
        top_k=int(known.get("top_k", 0)),
    )
    if how.max_new_tokens < 1 or not how.temperature >= 0 or not 0 < how.top_p <= 1 or how.top_k < 0:
        raise RunnerError(
            f"generation_kwargs ask for {how}; expected 1 token or more, temperature >= 0, 0 < top_p <= 1"
        )
    return how
