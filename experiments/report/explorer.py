"""The explorer: recorded runs as one HTML file in which a reader chooses what is plotted. It needs no network.

The page is assembled from the files of ``explorer_page``, and Vega and Vega-Lite, which draw.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.config.schema import without
from experiments.report.drawing_library import drawing_library
from experiments.report.explorer_fields import FIELDS, Row
from experiments.report.explorer_records import read_records
from experiments.report.explorer_table import Records
from experiments.util.files import write_atomic
from experiments.util.plot_style import COLOURS

FILE = "explorer.html"
"""Its name in the folder of a report."""

PAGE = Path(__file__).parent / "explorer_page"
SCRIPTS = ("data.js", "fragment.js", "views.js", "chart.js", "details.js", "controls.js", "page.js")
"""The scripts of the page, each using those before it."""

FAMILIES = {
    "light": COLOURS | {"sparse attention": "#2380BA", "linear attention": "#A87400", "delta rule": "#B3578B"},
    "dark": COLOURS | {"attention": "#4FA3DC", "recurrence": "#D96C9F", "convolution": "#9A8CF0", "hybrid": "#F07C2E",
                       "state space": "#1DB88C"},
}  # fmt: skip
"""The colours of families by theme: those of the plots, where they stand out from the page by 3 to 1 (WCAG 1.4.11)."""

OTHERS = {
    "light": ("#0072B2", "#B45309", "#00805E", "#B3578B", "#882255", "#332288", "#6B6B00", "#8C564B", "#4F6D7A"),
    "dark": ("#4FA3DC", "#E69F00", "#1DB88C", "#CC79A7", "#F07C2E", "#9A8CF0", "#B5B548", "#C49A8C", "#8FA9B8"),
}
"""Those of everything else that colours tell apart."""


def write(records: Sequence[Path], target: Path, title: str | None = None) -> Records:
    """Write the explorer of recorded runs, and return what it shows.

    Args:
        records: folders of runs, and files of records: those of a study (``records.jsonl``), of ``seqarch
            small-states``, and ``decode.json`` of ``seqarch bench decode``. Of a folder without runs, the
            ``records.jsonl`` files below it.
        title: of the page; by default it names the folder or file.

    Raises:
        RunnerError: the page cannot be written. What cannot be read is no error: the page says so, and shows the rest.
    """
    read = read_records(records)
    places = " ".join(read.sources)
    write_page(read, target, f"seqarch report --explorer {target.name} {places}", title)
    return read


def write_page(read: Records, target: Path, command: str, title: str | None = None) -> None:
    """Write the page of what was read; ``command`` is the one that does so."""
    named = f"Runs of {read.sources[0]}" if len(read.sources) == 1 else "Recorded runs"
    write_atomic(target, page(read, title or named, command))


def page(read: Records, title: str, command: str) -> str:
    """The whole page: its template with each ``{{name}}`` replaced."""
    data = json.dumps(page_data(read), separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title),
        "css": _asset("page.css"),
        "command": html.escape(command),
        "licence": html.escape(_asset("licences.txt")),
        "data": packed(data),
        "drawing": packed(_alone(drawing_library())),
        "scripts": _script("\n".join(map(_asset, SCRIPTS))),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def packed(text: str) -> str:
    """A text as the page holds it: compressed, the same each time, and in letters that no element ends at."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """An element with a script, which nothing within it ends."""
    inner = _alone(text).replace("</script", "<\\/script")
    return f"<script>\n{inner}\n</script>"


def _alone(text: str) -> str:
    """A script whose names are its own."""
    return f"(() => {{\n{text}\n}})();"


def page_data(read: Records) -> dict[str, Any]:
    """What the scripts of the page read."""
    return {
        "count": len(read.rows),
        "fields": {name: without(asdict(field), ("path",)) for name, field in FIELDS.items()},
        "columns": {name: column(name, read.rows) for name in (*FIELDS, "setting")},
        "metrics": read.metrics,
        "series": {kind: asdict(series) for kind, series in read.series.items()},
        "maps": read.maps,
        "problems": read.problems,
        "sources": read.sources,
        "palette": {theme: {"families": FAMILIES[theme], "others": OTHERS[theme]} for theme in FAMILIES},
    }  # fmt: skip


def column(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The values of a column, or of text its distinct values and the place of each run's among them, -1 for none.

    Of settings the values are numbers: a page only asks which are equal.
    """
    given = [row.get(name) for row in rows]
    if name in FIELDS and FIELDS[name].number:
        return {"values": given}
    distinct = list(dict.fromkeys(value for value in given if value is not None))
    place = {value: number for number, value in enumerate(distinct)}
    places = [-1 if value is None else place[value] for value in given]
    return {"values": list(range(len(distinct))) if name == "setting" else distinct, "places": places}
