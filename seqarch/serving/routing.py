"""Routing on record: which experts tokens were sent to, and what a cache of experts would have made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from seqarch.layers.channel.expert_cache import ExpertCache, ExpertUse, Policy, policy_maker
from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.models import LanguageModel
from seqarch.ops.dispatch.checks import show


@dataclass(frozen=True)
class RoutingTrace:
    """The experts that the tokens of a text were sent to, one token after another.

    Attributes:
        index: ``[T, L, k]`` int16: of each token the k experts of each of the L layers with experts, the heaviest
            first.
        experts: of a layer.
    """

    index: Tensor
    experts: int

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a file of JSON."""
        Path(path).write_text(json.dumps({"experts": self.experts, "index": self.index.tolist()}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingTrace:
        """What :meth:`save` wrote.

        Raises:
            ValueError: the file holds no routing, or cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            index, experts = torch.tensor(content["index"], dtype=torch.int16), content["experts"]
            if index.ndim != 3 or not 0 <= int(index.amin()) <= int(index.amax()) < experts:
                raise ValueError(f"its numbers are not [tokens, layers, k], of experts below {experts}")
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no routing: {error}") from error
        return cls(index, experts)


@torch.no_grad()
def record_routing(model: LanguageModel, tokens: Tensor) -> RoutingTrace:
    """Where a model sends the tokens ``[B, T]`` of B texts, read whole: as it would decode them, but for rounding.

    Raises:
        ValueError: the model has no mixture of experts, or layers of unlike ones.
    """
    mixtures = [each for each in model.modules() if isinstance(each, MixtureOfExperts)]
    sizes = {(each.config.num_experts, each.config.top_k) for each in mixtures}
    if len(sizes) != 1:
        kinds = ", ".join(f"{k} of {count}" for count, k in sorted(sizes)) or "none"
        raise ValueError(f"record_routing: expected a model whose experts are as many in all layers, got {kinds}")
    model.features(tokens)
    chosen = [each.routing.index for each in mixtures if each.routing is not None]
    return RoutingTrace(torch.stack(chosen, dim=1).to("cpu", torch.int16), next(iter(sizes))[0])


def replay(routing: RoutingTrace, places: int, policy: str | Callable[[], Policy] = "lru") -> ExpertUse:
    """How caches of ``places`` experts a layer are used where the tokens are decoded one at a time.

    The code is that of a model which was read with ``experts_in_memory=places``, but that nothing is read: ``bytes``
    stays 0.

    Raises:
        ValueError: there is no such policy, or no place.
    """
    if type(places) is not int or places < 1:
        raise ValueError(f"replay: places is {show(places)}, expected a number of at least 1")
    make_policy = policy_maker(policy)
    caches = [ExpertCache(places, make_policy()) for _ in range(routing.index.shape[1])]
    for cache, following in pairwise(caches):
        cache.following = following
    for token in routing.index.tolist():
        for cache, chosen in zip(caches, token, strict=True):
            for _ in cache.call(sorted(set(chosen))):
                pass
            for _ in cache.following.ahead() if cache.following is not None else ():
                pass
    return reduce(add, (cache.use for cache in caches))
