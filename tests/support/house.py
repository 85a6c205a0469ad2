"""The rooms of the house, the floors that they are on, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from seqarch.ops import OPS
from tests.support.paths import ROOT

FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("seqarch", "experiments") for path in ROOT.glob(f"{top}/**/*.py")
)


@dataclass(frozen=True)
class Room:
    """A folder, or some that belong together.

    Attributes:
        name: in the pictures and the errors.
        holds: its packages and modules; a module is in the room that holds most of its name.
        beside: the rooms on its own floor that it may import.
    """

    name: str
    holds: tuple[str, ...]
    beside: tuple[str, ...] = ()


def _room(package: str, *beside: str) -> Room:
    """The room of one package, named by its path below ``seqarch`` or ``experiments``."""
    return Room(package.partition(".")[2].replace(".", "/"), (package,), beside)


_LAYERS = "seqarch.layers"
FLOORS: dict[str, tuple[Room, ...]] = {
    "machinery of operations": (
        _room("seqarch.ops.dispatch"),
        _room("seqarch.ops.native", "ops/dispatch"),
        _room("seqarch.ops.triton", "ops/dispatch"),
        _room("seqarch.ops.chunked", "ops/dispatch", "ops/native"),
    ),
    "operations": (Room("ops/NAME", ("seqarch.ops", *(f"seqarch.ops.{name}" for name in OPS))),),
    "parts of mixers": (
        Room(
            "layers/mixer.py, layers/modules",
            tuple(f"{_LAYERS}.{name}" for name in ("mixer", "recurrent_mixer", "rows", "materialize", "modules")),
        ),
        _room("seqarch.decoding"),
    ),
    "families of mixers": (
        _room(f"{_LAYERS}.attention"),
        _room(f"{_LAYERS}.delta_rule"),
        _room(f"{_LAYERS}.recurrent"),
        _room(f"{_LAYERS}.convolution"),
        _room(f"{_LAYERS}.channel"),
        _room(f"{_LAYERS}.sparse_attention", "layers/attention"),
        _room(f"{_LAYERS}.linear_attention", "layers/attention"),
        _room(f"{_LAYERS}.state_space", "layers/recurrent"),
        _room(f"{_LAYERS}.hybrid", "layers/attention", "layers/channel", "layers/state_space"),
    ),
    "stacks": (_room("seqarch.layers"), _room("seqarch.models", "layers")),
    "around them": (
        _room("seqarch.interop"),
        _room("seqarch.testing"),
        _room("seqarch.parallel"),
        _room("seqarch.convert"),
        _room("seqarch.checkpoints"),
        _room("seqarch.state"),
        _room("seqarch.serving", "state"),
        _room("seqarch.pretrained", "interop", "checkpoints"),
        _room("seqarch.interop.hf", "checkpoints", "pretrained"),
        Room("python -m seqarch", ("seqarch.__main__",), ("pretrained",)),
    ),
    "ground": (_room("experiments.util"), _room("experiments.tasks", "util"), _room("experiments.trackers")),
    "a run's settings": (_room("experiments.config"),),
    "a run's folder": (_room("experiments.runs"),),
    "work on runs": (
        _room("experiments.training"),
        _room("experiments.sweeps"),
        _room("experiments.report"),
        _room("experiments.bench", "training"),
        _room("experiments.harness"),
    ),
    "findings": (_room("experiments.studies"),),
    "commands": (Room("commands", ("experiments", "experiments.report.__main__", "experiments.runs.__main__")),),
}
"""From the ground up, the runner's above the library's. A room imports what is on floors below it and, on its own, the
rooms that it names."""

ROOMS = {room.name: room for floor in FLOORS.values() for room in floor}
_HOLDERS = {package: room.name for room in ROOMS.values() for package in room.holds}
_NUMBERS = {room.name: number for number, floor in enumerate(FLOORS.values()) for room in floor}


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(name: str) -> Room | None:
    """The room of a module, or of something in it; ``None`` for ``seqarch`` itself, and outside of the house."""
    parts = name.split(".")
    heads = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    holder = next((_HOLDERS[head] for head in heads if head in _HOLDERS), None)
    return None if holder is None else ROOMS[holder]


def may_import(room: Room, other: Room) -> bool:
    return other == room or other.name in room.beside or _NUMBERS[other.name] < _NUMBERS[room.name]


def imports(source: str, package: str) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imported(file: str) -> list[str]:
    name = module_name(file)
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
    return list(imports((ROOT / file).read_text(encoding="utf-8"), package))


@cache
def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for file in FILES:
        if room := room_of(module_name(file)):
            others = (room_of(other) for other in imported(file))
            found[room.name] |= {other.name for other in others if other is not None} - {room.name}
    return found
