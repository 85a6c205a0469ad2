"""Tables of invertible rules between another library's state dict and ours.

A rule takes some of their tensors to some of ours by steps, each of which knows its inverse. All of it is made of torch
operations, so gradients pass through a table as well. Steps move numbers and change none (rename, concatenate, split,
reorder, transpose, squeeze, reshape): whatever the dtype, a tensor comes back bit for bit, and an optimizer that goes
through our numbers goes through theirs. What a model multiplies or adds beside its weights is an option of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype

Weights = dict[str, Tensor]

Computed = Callable[[torch.dtype], Tensor]
_Change = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Step:
    """A change of tensors, there and back.

    Attributes:
        gathers: whether each number is fetched by an index, so that no result is a view.
    """

    to_ours: _Change
    to_theirs: _Change
    gathers: bool = False


@dataclass(frozen=True)
class Rule:
    """Their tensors of these names are our tensors of those, after the steps; see :func:`rule`."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def to_ours(self, weights: Mapping[str, Tensor]) -> Weights:
        return self._apply(weights, self.theirs, self.ours, [step.to_ours for step in self.steps])

    def to_theirs(self, weights: Mapping[str, Tensor]) -> Weights:
        return self._apply(weights, self.ours, self.theirs, [step.to_theirs for step in reversed(self.steps)])

    def _apply(
        self, weights: Mapping[str, Tensor], taken: Sequence[str], made: Sequence[str], changes: list[_Change]
    ) -> Weights:
        tensors = [weights[name] for name in taken]
        try:
            for change in changes:
                tensors = change(tensors)
        except ValueError as error:
            raise ValueError(f"{' + '.join(taken)}: {error}") from error
        except (IndexError, RuntimeError) as error:
            shapes = ", ".join(str(list(weights[name].shape)) for name in taken)
            raise ValueError(f"{' + '.join(taken)}: the shape {shapes} does not fit: {error}") from error
        return dict(zip(made, tensors, strict=True))


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], *steps: Step) -> Rule:
    """``theirs`` are ``ours`` after ``steps``: one name or several on either side."""
    names = [(name,) if isinstance(name, str) else tuple(name) for name in (theirs, ours)]
    return Rule(names[0], names[1], steps)


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules with a prefix to the names of each side."""
    return [
        Rule(tuple(theirs + name for name in rule.theirs), tuple(ours + name for name in rule.ours), rule.steps)
        for rule in rules
    ]


def concatenate(*sizes: int, dim: int = 0) -> Step:
    """Several tensors of these sizes along ``dim`` are one of ours."""

    def join(parts: list[Tensor]) -> list[Tensor]:
        _expect([part.shape[dim] for part in parts], list(sizes), f"sizes along dimension {dim}")
        return [torch.cat(parts, dim)]

    def cut(whole: list[Tensor]) -> list[Tensor]:
        _expect(whole[0].shape[dim], sum(sizes), f"a size along dimension {dim}")
        return list(whole[0].split(list(sizes), dim))

    return Step(join, cut)


def split(*sizes: int, dim: int = 0) -> Step:
    """One tensor is several of ours, of these sizes along ``dim``."""
    return _inverse(concatenate(*sizes, dim=dim))


def reorder(order: Sequence[int], dim: int = 0) -> Step:
    """Our entry i along ``dim`` is their entry ``order[i]``."""
    index = torch.tensor(order, device="cpu")

    def pick(tensor: Tensor, index: Tensor) -> Tensor:
        _expect(tensor.shape[dim], len(order), f"a size along dimension {dim}")
        return tensor.index_select(dim, index.to(tensor.device))

    to_ours, to_theirs = (_each(lambda tensor, by=by: pick(tensor, by)) for by in (index, index.argsort()))
    return Step(to_ours, to_theirs, gathers=True)


def pairs_to_halves(width: int, tensors: int) -> Step:
    """In heads of ``width`` channels along the first dimension, neighbours of theirs that turn together are channels
    i and ``i + width / 2`` of ours; in the first so many tensors, the others stay.
    """

    def change(tensor: Tensor, *sizes: int) -> Tensor:
        return tensor.unflatten(0, (-1, *sizes)).transpose(1, 2).flatten(0, 2)

    def all_of(*sizes: int) -> _Change:
        return lambda given: [change(each, *sizes) if i < tensors else each for i, each in enumerate(given)]

    return Step(all_of(width // 2, 2), all_of(2, width // 2))


def transpose(first: int = 0, second: int = 1) -> Step:
    """Two dimensions change places; ours are a view of theirs, to be copied to where they are wanted."""
    return Step(
        _each(lambda tensor: tensor.transpose(first, second)),
        _each(lambda tensor: tensor.transpose(first, second).contiguous()),
    )


def squeeze(dim: int) -> Step:
    """A dimension of size 1 of theirs is none of ours."""

    def drop(tensor: Tensor) -> Tensor:
        _expect(tensor.shape[dim], 1, f"a size along dimension {dim}")
        return tensor.squeeze(dim)

    return Step(_each(drop), _each(lambda tensor: tensor.unsqueeze(dim)))


def reshape(theirs: Sequence[int], ours: Sequence[int]) -> Step:
    """The same numbers in another shape."""

    def change(tensor: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
        _expect(list(tensor.shape), list(before), "the shape")
        return tensor.reshape(tuple(after))

    return Step(_each(lambda tensor: change(tensor, theirs, ours)), _each(lambda tensor: change(tensor, ours, theirs)))


@dataclass(frozen=True)
class WeightMap:
    """A whole model's rules.

    Attributes:
        rules: every tensor of both sides is in exactly one of them.
        tied: names of theirs that repeat another tensor of theirs, as ``{copy: original}``: a state dict may leave the
            copies out, or holds the same numbers twice. Where ours has the tensor once, a copy is in no rule.
        computed: tensors of theirs that follow from the configuration and that nothing of ours is made of, as functions
            which make them in float32 or float64. A state dict may leave them out, and is refused if it holds others.
    """

    rules: Sequence[Rule]
    tied: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)

    def __post_init__(self):
        for side in ([name for rule in self.rules for name in names(rule)] for names in (_theirs, _ours)):
            twice = sorted({name for name in side if side.count(name) > 1}) if len(set(side)) < len(side) else []
            if twice:
                raise ValueError(f"these tensors are in two rules: {', '.join(twice)}")

    def to_seqarch(self, state_dict: Mapping[str, Tensor]) -> Weights:
        """Our state dict from theirs.

        Raises:
            ValueError: tensors are missing or left over (all are listed), of another shape, or tied ones differ.
        """
        given = {name: tensor for name, tensor in state_dict.items() if name not in self.computed}
        for name in self.computed.keys() & state_dict.keys():
            self.check_computed(name, state_dict[name])
        for copy, original in self.tied.items():
            if original in given:
                given.setdefault(copy, given[original])
        expected = [*(name for rule in self.rules for name in rule.theirs), *(self.more.keys() & given.keys())]
        _account(given, expected, "the state dict to read")
        self._check_tied(given)
        return {name: tensor for rule in self.rules for name, tensor in rule.to_ours(given).items()}

    @property
    def more(self) -> dict[str, str]:
        """Of the tied, the copies that are in no rule."""
        named = {name for rule in self.rules for name in rule.theirs}
        return {copy: original for copy, original in self.tied.items() if copy not in named}

    def to_transformers(self, state_dict: Mapping[str, Tensor]) -> Weights:
        """Their state dict from ours; errors as in :meth:`to_seqarch`."""
        _account(state_dict, [name for rule in self.rules for name in rule.ours], "seqarch's state dict")
        made = {name: tensor for rule in self.rules for name, tensor in rule.to_theirs(state_dict).items()}
        made |= {copy: made[original] for copy, original in self.more.items()}
        self._check_tied(made)
        return made | self.computed_tensors(next(iter(made.values())))

    def computed_tensors(self, like: Tensor) -> Weights:
        """Those of theirs that follow from the configuration, in the dtype and on the device of a tensor."""
        return {name: make(accumulation_dtype(like)).to(like) for name, make in self.computed.items()}

    def check_computed(self, name: str, tensor: Tensor) -> None:
        """Raise where a tensor of theirs is not what follows from the configuration, as rounded to its dtype."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is no tensor of floating point")
        if tensor.is_meta:
            return
        expected = self.computed[name](accumulation_dtype(tensor)).to(tensor.device)
        _expect(list(tensor.shape), list(expected.shape), f"{name}: the shape")
        tolerance = 16 * torch.finfo(tensor.dtype).eps
        if not torch.allclose(tensor.to(expected), expected, rtol=tolerance, atol=tolerance):
            raise ValueError(f"{name} is not what its configuration says, which no model here can have")

    def _check_tied(self, weights: Weights) -> None:
        for copy, original in self.tied.items():
            if weights[copy] is not weights[original] and not torch.equal(weights[copy], weights[original]):
                raise ValueError(f"{copy} and {original} are one tensor in the other model, but differ here")


def _theirs(rule: Rule) -> tuple[str, ...]:
    return rule.theirs


def _ours(rule: Rule) -> tuple[str, ...]:
    return rule.ours


def _account(given: Mapping[str, Tensor], expected: Sequence[str], what: str) -> None:
    others = {name for name, tensor in given.items() if not isinstance(tensor, Tensor)}
    sides = {"missing": set(expected) - set(given), "left over": set(given) - set(expected), "not a tensor": others}
    lines = [f"  {kind}: {name}" for kind, names in sides.items() for name in sorted(names)]
    if lines:
        raise ValueError("\n".join([f"{what} does not match this model's configuration:", *lines]))


def _expect(got: object, expected: object, what: str) -> None:
    if got != expected:
        raise ValueError(f"expected {what} of {expected}, got {got}")


def _each(change: Callable[[Tensor], Tensor]) -> _Change:
    return lambda tensors: [change(tensor) for tensor in tensors]


def _inverse(step: Step) -> Step:
    return Step(step.to_theirs, step.to_ours)
