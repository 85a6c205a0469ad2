"""The rooms of the house: a table of them, and pictures of who imports whom, as SVG that is the same everywhere.

An arrow from a room to each that it imports, but for those that follow from others: where a path of arrows leads there
already, none is drawn. Colours are such that the picture can be read on a light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from docs.docstrings import cell, first_sentence, module_docstring
from experiments.util.blocks import table
from tests.support.house import FLOORS, Room, arrows
from tests.support.paths import ROOT

HEIGHT, STEP, FLOOR, GAP = 26, 62, 16, 18
"""Of a room; from row to row; more of it between floors; between rooms of a row."""

LEFT, LETTER = 170, 8
"""Width of the floors' names, and of a letter."""

SWEEPS = 8
"""How often rows are ordered after their neighbours."""

STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #1f2328 }",
    ".floor { fill: #818b98; fill-opacity: 0.12 }",
    ".name { fill: #6e7781 }",
    ".room { fill: #ddf4ff; stroke: #54aeff }",
    ".arrow { fill: none; stroke: #818b98; stroke-width: 1.3; marker-end: url(#head) }",
)
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="#818b98"/></marker>'
)


@dataclass(eq=False)
class Node:
    """A room in its row, or a place that a long arrow passes."""

    row: int
    name: str = ""
    x: float = 0.0
    up: list[Node] = field(default_factory=list)
    down: list[Node] = field(default_factory=list)

    @property
    def width(self) -> int:
        return LETTER * len(self.name) + 20 if self.name else 8


def picture(top: str) -> str:
    """The SVG of the floors of ``seqarch`` or ``experiments``."""
    floors = {name: floor for name, floor in FLOORS.items() if floor[0].holds[0].split(".")[0] == top}
    rows = {name: _rows(floor) for name, floor in floors.items()}
    nodes, paths = _graph([row for each in rows.values() for row in each])
    lines = [[node for node in nodes if node.row == row] for row in range(max(node.row for node in nodes) + 1)]
    _arrange(lines)
    return _svg(top, {name: len(each) for name, each in rows.items()}, nodes, paths)


def _rows(floor: Iterable[Room]) -> list[list[str]]:
    """The rooms of a floor, each above those on it that it imports."""
    levels: dict[str, int] = {}
    for room in floor:
        levels[room.name] = 1 + max((levels[name] for name in room.beside), default=-1)
    return [[name for name in levels if levels[name] == level] for level in range(max(levels.values()) + 1)]


def _graph(rows: list[list[str]]) -> tuple[list[Node], list[list[Node]]]:
    """The nodes, from the lowest row up, and the path of each arrow."""
    rooms = {name: Node(row, name) for row, names in enumerate(rows) for name in names}
    nodes, paths = list(rooms.values()), []
    for name, node in rooms.items():
        for other in sorted(_needed(name, rooms)):
            passed = [Node(row) for row in range(node.row - 1, rooms[other].row, -1)]
            path = [node, *passed, rooms[other]]
            for above, below in pairwise(path):
                above.down.append(below)
                below.up.append(above)
            nodes += passed
            paths.append(path)
    return nodes, paths


def _needed(name: str, rooms: Iterable[str]) -> set[str]:
    """The rooms that a room imports, without those that another of them leads to."""
    direct = arrows()[name] & set(rooms)
    return direct - {other for between in direct for other in _reached(between)}


def _reached(name: str) -> set[str]:
    direct = arrows()[name]
    return direct.union(*(_reached(other) for other in direct))


def _arrange(lines: list[list[Node]]) -> None:
    """Order each row after its neighbours, then place its nodes as near below and above them as they fit."""
    for line in lines:
        _place(line, [float(i) for i in range(len(line))])
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for line in reversed(lines) if down else lines:
            line.sort(key=lambda node: _mean(node.up if down else node.down, node.x))
            _place(line, [node.x for node in line])
    for _ in range(4 * SWEEPS):
        for line in lines:
            _place(line, [_mean([*node.up, *node.down], node.x) for node in line])


def _mean(nodes: list[Node], otherwise: float) -> float:
    return sum(node.x for node in nodes) / len(nodes) if nodes else otherwise


def _place(line: list[Node], wanted: list[float]) -> None:
    """Set the centres of a row: in its order, without overlap, as near to what is wanted as that allows.

    With the widths before each node taken off, the centres only may not fall: neighbours that would are given their
    mean, which is the least-squares answer (pool adjacent violators).
    """
    starts, at = [], 0.0
    for node in line:
        starts.append(at + node.width / 2)
        at += node.width + GAP
    blocks: list[tuple[float, int]] = []
    for x, start in zip(wanted, starts, strict=True):
        mean, count = x - start, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    shifts = [mean for mean, count in blocks for _ in range(count)]
    for node, start, shift in zip(line, starts, shifts, strict=True):
        node.x = start + shift


def _svg(top: str, floors: dict[str, int], nodes: list[Node], paths: list[list[Node]]) -> str:
    least = min(node.x - node.width / 2 for node in nodes)
    for node in nodes:
        node.x += LEFT + GAP - least
    width = round(max(node.x + node.width / 2 for node in nodes) + GAP)
    bands, heights, y = [], [], 0
    for name, rows in reversed(floors.items()):
        tall = rows * STEP - (STEP - HEIGHT) + 2 * FLOOR
        bands.append((name, y, tall))
        heights += [y + FLOOR + row * STEP for row in range(rows)]
        y += tall + STEP - HEIGHT - 2 * FLOOR + 8
    heights.reverse()
    total = bands[-1][1] + bands[-1][2]
    title = f"The rooms of {top} by floors, and who imports whom"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" viewBox="0 0 {width} {total}">',
            f"<title>{title}</title>",
            "<!-- Generated by `python -m docs.tables` from the imports and tests/support/house.py. -->",
            "<style>",
            *STYLE,
            "</style>",
            f"<defs>{HEAD}</defs>",
            *(f'<rect class="floor" y="{y}" width="{width}" height="{tall}" rx="6"/>' for _, y, tall in bands),
            *(f'<text class="name" x="12" y="{y + tall // 2 + 5}">{escape(name)}</text>' for name, y, tall in bands),
            *(f'<path class="arrow" d="{_curve(path, heights)}"/>' for path in paths),
            *(line for node in nodes if node.name for line in _box(node, heights[node.row])),
            "</svg>\n",
        ]
    )


def _curve(path: list[Node], heights: list[int]) -> str:
    """From the lower side of the first room through the places between to the upper side of the last."""
    x, y = path[0].x, heights[path[0].row] + HEIGHT
    parts = [f"M{x:.0f} {y}"]
    for node in path[1:]:
        top = heights[node.row]
        middle = (y + top) // 2
        parts.append(f"C{x:.0f} {middle} {node.x:.0f} {middle} {node.x:.0f} {top}")
        x, y = node.x, top
        if not node.name:
            y += HEIGHT
            parts.append(f"V{y}")
    return " ".join(parts)


def _box(node: Node, y: int) -> tuple[str, str]:
    left = node.x - node.width / 2
    text = f'<text x="{node.x:.0f}" y="{y + 17}" text-anchor="middle">{escape(node.name)}</text>'
    return f'<rect class="room" x="{left:.0f}" y="{y}" width="{node.width}" height="{HEIGHT}" rx="5"/>', text


def room_table() -> str:
    """What is in every room, from the top floor down, as its own docstrings say."""
    rows = []
    for floor, rooms in reversed(FLOORS.items()):
        for package in (package for room in rooms for package in room.holds):
            path = Path(package.replace(".", "/"))
            file = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
            link = f"[`{path if file.stem == '__init__' else file}`](../{file})"
            rows.append((floor, link, cell(first_sentence(module_docstring(ROOT / file)))))
    return table(("floor", "room", "what is in it"), rows)
