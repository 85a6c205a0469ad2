"""Which layers a model can spare: each replaced by a student's alone, and what that costs measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from seqarch.convert.conversion import changed_layers
from seqarch.convert.planning import BY_NAME, check_alike
from seqarch.models import LanguageModel, tile_pattern
from seqarch.models.pattern import write_pattern


@dataclass(frozen=True)
class LayerCost:
    """What one layer's replacement costs.

    Attributes:
        layer: its number.
        mixers: as the student's pattern has them.
        score: of the teacher with that layer of the student's.
        change: ``score`` less that of the teacher itself.
    """

    layer: int
    mixers: str
    score: float
    change: float


def with_layers(teacher: LanguageModel, student: LanguageModel, layers: Iterable[int]) -> LanguageModel:
    """The teacher with some layers, whole, of a student that differs from it in mixers alone; both stay as they are.

    Raises:
        ValueError: they differ in more than mixers, a number is of no layer, or options of a mixer by its name are one
            thing in the teacher and another in the student.
    """
    check_alike(teacher.config, student.config)
    chosen, depth = set(layers), teacher.config.depth
    if odd := [each for each in chosen if each not in range(depth)]:
        raise ValueError(f"convert: there is no layer {odd[0]!r}, expected numbers from 0 to {depth - 1}")
    both = [tile_pattern(model.config.pattern, depth) for model in (teacher, student)]
    pattern = write_pattern([both[i in chosen][i] for i in range(depth)])
    options = {}
    for name in ("mixers", *BY_NAME):
        theirs, own = getattr(teacher.config, name), getattr(student.config, name)
        if odd := [key for key in theirs.keys() & own.keys() if theirs[key] != own[key]]:
            raise ValueError(
                f"convert: {name} of {odd[0]} is {theirs[odd[0]]!r} in the teacher and {own[odd[0]]!r} in the student:"
                " expected the same"
            )
        options[name] = {**theirs, **own}
    made = LanguageModel(replace(teacher.config, pattern=pattern, **options))
    like = next(teacher.parameters())
    made.to(like.device, like.dtype)
    weights, others = teacher.state_dict(), student.state_dict()
    prefixes = tuple(f"stack.layers.{i}." for i in chosen)
    made.load_state_dict({name: (others if prefixes and name.startswith(prefixes) else weights)[name] for name in
                          made.state_dict()})  # fmt: skip
    made.tokenizer = teacher.tokenizer
    return made.train(teacher.training)


def sensitivity(
    teacher: LanguageModel, student: LanguageModel, score: Callable[[LanguageModel], float]
) -> list[LayerCost]:
    """What it costs to replace each layer that differs, alone, by the student's.

    Before the student's mixers are trained on the teacher's inputs (``of_outputs``), all layers cost about alike.

    Args:
        score: of a model, such as its loss on data held out.

    Raises:
        ValueError: as of :func:`with_layers`.
    """
    whole, patterns = score(teacher), tile_pattern(student.config.pattern, student.config.depth)
    found = []
    for i in changed_layers(teacher, student):
        value = score(with_layers(teacher, student, [i]))
        found.append(LayerCost(i, "+".join(patterns[i].mixers), value, value - whole))
    return found


def most_costly(costs: Sequence[LayerCost], count: int, higher_is_better: bool = False) -> list[int]:
    """The layers, in ascending order, that cost most to replace: those to keep, for ``convert(keep_layers=...)``."""
    sign = 1 if higher_is_better else -1
    ranked = sorted(costs, key=lambda each: (sign * each.change, each.layer))
    return sorted(each.layer for each in ranked[:count])
