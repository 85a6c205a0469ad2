"""Which experts of a layer are in memory where they do not all fit: a cache of some places, and what leaves it.

:class:`ExpertCache` holds no tensors: a model that decodes asks it for places and reads what is missing
(:mod:`seqarch.layers.channel.offloaded`), and a recorded routing is replayed through the same code
(:mod:`seqarch.serving.routing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from seqarch.ops.dispatch.checks import show, unknown_name


class Policy(Protocol):
    """What one layer's cache gives up, and what it reads before it is asked for."""

    def used(self, experts: Sequence[int], before: Sequence[int]) -> None:
        """A call asks for these experts, after the layer before asked for those ``before``, of the same tokens."""
        ...

    def give_up(self, held: Collection[int]) -> int:
        """The expert that makes room for another."""
        ...

    def expected(self, before: Sequence[int]) -> Sequence[int]:
        """The experts to read ahead, the likeliest first, once the layer before has asked for those ``before``."""
        ...


class LRU:
    """Gives up what was used least recently."""

    def __init__(self) -> None:
        self._calls = 0
        self._last: dict[int, int] = {}

    def used(self, experts: Sequence[int], before: Sequence[int]) -> None:
        self._calls += 1
        self._last.update(dict.fromkeys(experts, self._calls))

    def give_up(self, held: Collection[int]) -> int:
        return min(held, key=lambda expert: (self._last.get(expert, 0), expert))

    def expected(self, before: Sequence[int]) -> Sequence[int]:
        return ()


class LFU(LRU):
    """Gives up what was used least often; of those used as often, what was used least recently."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[int] = Counter()

    def used(self, experts: Sequence[int], before: Sequence[int]) -> None:
        super().used(experts, before)
        self._counts.update(experts)

    def give_up(self, held: Collection[int]) -> int:
        return min(held, key=lambda expert: (self._counts[expert], self._last.get(expert, 0), expert))


class LayerBefore(LRU):
    """:class:`LRU`, and reads ahead what used to be chosen after the experts that the layer before has chosen.

    Of each pair of an expert there and one here it counts how often one token chose both. As many experts are expected
    as the last call asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pairs: dict[int, Counter[int]] = {}
        self._asked = 0

    def used(self, experts: Sequence[int], before: Sequence[int]) -> None:
        super().used(experts, before)
        self._asked = len(experts)
        for expert in before:
            self._pairs.setdefault(expert, Counter()).update(experts)

    def expected(self, before: Sequence[int]) -> Sequence[int]:
        likely: Counter[int] = Counter()
        for expert in before:
            pairs = self._pairs.get(expert, Counter())
            total = pairs.total()
            likely.update({after: count / total for after, count in pairs.items()})  # type: ignore[arg-type]
        return sorted(likely, key=lambda expert: (-likely[expert], expert))[: self._asked]


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU, "layer_before": LayerBefore}
"""By the names that ``expert_policy`` takes."""


def policy_maker(policy: str | Callable[[], Policy]) -> Callable[[], Policy]:
    """What makes a layer's policy: one of :data:`POLICIES` by name, or a class or function of one's own."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise unknown_name("expert_policy", policy, POLICIES)
        return POLICIES[policy]
    if not callable(policy):
        raise ValueError(f"expert_policy is {show(policy)}, expected {', '.join(POLICIES)} or what makes a Policy")
    return policy


@dataclass
class ExpertUse:
    """Counts of a cache, or of several.

    Attributes:
        asked: experts that calls asked for; of a call of several tokens, each expert once.
        hits: of these, in memory when they were asked for, or on their way there.
        read: experts that were read since they were asked for.
        ahead: experts that were read before they were asked for.
        bytes: that were read.
    """

    asked: int = 0
    hits: int = 0
    read: int = 0
    ahead: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """``hits`` over ``asked``; 0 before the first call."""
        return self.hits / max(self.asked, 1)

    def __add__(self, other: ExpertUse) -> ExpertUse:
        return ExpertUse(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class ExpertCache:
    """The places of one layer's experts.

    Attributes:
        places: how many experts are held at once.
        place_of: the places of those held.
        following: the cache of the next layer with experts, which this one tells of its choices.
        use: counts since the beginning, or since they were set to ``ExpertUse()``.
    """

    def __init__(self, places: int, policy: Policy):
        self.places, self.policy = places, policy
        self.place_of: dict[int, int] = {}
        self.following: ExpertCache | None = None
        self.use = ExpertUse()
        self._before: Sequence[int] = ()

    def call(self, experts: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
        """Each expert that a call asks for, with its place, and whether it has to be read into it.

        Those in memory come first. A place is sure until the next expert is asked for.
        """
        before, self._before = self._before, ()
        if self.following is not None:
            self.following._before = experts
        self.policy.used(experts, before)
        self.use.asked += len(experts)
        held = [expert for expert in experts if expert in self.place_of]
        self.use.hits += len(held)
        yield from ((expert, self.place_of[expert], False) for expert in held)
        for expert in (each for each in experts if each not in held):
            self.use.read += 1
            yield expert, self._room_for(expert, kept=experts), True

    def ahead(self) -> Iterator[tuple[int, int]]:
        """Experts to be read before this layer is asked, with their places; after a call of the layer before."""
        expected = list(self.policy.expected(self._before))[: self.places] if self._before else []
        for expert in expected:
            if expert not in self.place_of:
                self.use.ahead += 1
                yield expert, self._room_for(expert, kept=expected)

    def forget(self, expert: int) -> None:
        """Its place holds something else: it could not be read."""
        self.place_of.pop(expert, None)

    def _room_for(self, expert: int, kept: Sequence[int]) -> int:
        """A place for an expert: a free one, else that of one that the policy gives up, if it can none of ``kept``."""
        if len(self.place_of) < self.places:
            place = next(place for place in range(self.places) if place not in self.place_of.values())
        else:
            others = [each for each in self.place_of if each not in kept]
            place = self.place_of.pop(self.policy.give_up(others or list(self.place_of)))
        self.place_of[expert] = place
        return place
