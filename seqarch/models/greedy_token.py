"""One greedily decoded token of a language model in a compiled call: embedding, layers, norm, head and argmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqarch.models.one_token import OneToken
from seqarch.models.stack import Stack, StackState, in_turn
from seqarch.models.streams import split
from seqarch.ops.dispatch.eager import is_plain

if TYPE_CHECKING:
    from seqarch.models.language_model import LanguageModel

MOST_TOKENS = 1 << 24
"""Of a vocabulary: float32 holds these numbers."""


class _End(nn.Module):
    """What a model does before its first layer or after its last one, as a layer without mixers and state.

    Its modules are those of the model itself; it is no part of the model.
    """

    exchanges = False
    mixers = ()

    def __init__(self, model: LanguageModel, parts: Sequence[nn.Module | None]):
        super().__init__()
        self.parts = nn.ModuleList([part for part in parts if part is not None])
        self._model = (model,)


class Embed(_End):
    """The tokens ``[B, 1]`` as the residual stream, or several."""

    def forward(self, tokens: Tensor) -> Tensor:
        (model,) = self._model
        return split(model.embedded(tokens), model.config.residual_streams)


class Choose(_End):
    """``[B, 2]``: the likeliest token after the residual stream, and its logit, which is none if one of them is."""

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self._model
        logits = model.logits(model.norm(model.stack.joined(x))[:, 0])
        return torch.stack([logits.argmax(-1).to(torch.float32), logits.amax(-1)], dim=-1)


def _through(layers: Sequence[Any], x: Tensor, state: Any, cu_seqlens: None) -> tuple[Tensor, Any]:
    """Layers one after another, and the ends among them."""
    after: list[Any] = []
    begin = 0
    while begin < len(layers):
        if isinstance(layers[begin], _End):
            x = layers[begin](x)
            after.append(())
            begin += 1
            continue
        end = next((i for i in range(begin, len(layers)) if isinstance(layers[i], _End)), len(layers))
        x, carried = in_turn(layers[begin:end], x, None if state is None else state[begin:end], cu_seqlens)
        after += carried
        begin = end
    return x, tuple(after)


class GreedyToken:
    """The likeliest next token of each of a few rows, where nobody would miss a call of a module or of torch."""

    def __init__(self) -> None:
        self.programs = OneToken(_through)
        self._ends: tuple[Embed, Choose] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GreedyToken, ()  # programs hold addresses: copies write their own

    def __call__(self, model: LanguageModel, tokens: Tensor, state: StackState) -> tuple[Tensor, Tensor, StackState]:
        """After ``tokens [B]``: the likeliest ones ``[B]``, their logits ``[B]``, and the state."""
        found, after = self.programs([*self._layers(model)], tokens.unsqueeze(1), ((), *state, ()))
        return found[:, 0].long(), found[:, 1], after[1:-1]

    def serves(self, model: LanguageModel, tokens: Tensor) -> bool:
        """Whether the model does nothing else for a token, and a program may run."""
        from seqarch.models.language_model import LanguageModel

        stack, own = model.stack, type(model)
        return (
            all(getattr(own, name) is getattr(LanguageModel, name) for name in ("embedded", "features", "logits"))
            and not {"embedded", "features", "logits"} & vars(model).keys()
            and type(stack) is Stack
            and all(part is None or is_plain(part) for part in (stack, *_first(model), *_last(model)))
            and stack.schedule is in_turn
            and model.config.vocab_size <= MOST_TOKENS
            and OneToken.serves(tokens.unsqueeze(1), (torch.int64,))
        )

    def _layers(self, model: LanguageModel) -> list[Any]:
        first, last = _first(model), _last(model)
        if self._ends is None or not (_are(self._ends[0], model, first) and _are(self._ends[1], model, last)):
            self._ends = Embed(model, first), Choose(model, last)
        return [self._ends[0], *model.stack._layers(), self._ends[1]]


def _first(model: LanguageModel) -> list[nn.Module | None]:
    return [model.embedding, model.embedding_norm]


def _last(model: LanguageModel) -> list[nn.Module | None]:
    return [model.stack.weighted_streams, model.norm, model.head]


def _are(end: _End, model: LanguageModel, parts: Sequence[nn.Module | None]) -> bool:
    """Whether an end was made of these."""
    given = [part for part in parts if part is not None]
    return end._model[0] is model and len(end.parts) == len(given) and all(map(lambda a, b: a is b, end.parts, given))
