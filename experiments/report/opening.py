"""Opens a page in the browser of the person at this machine."""

from __future__ import annotations

import webbrowser
from collections.abc import Iterable
from os.path import commonpath
from pathlib import Path

from experiments.report import explorer
from experiments.report.write import report
from experiments.util.errors import RunnerError


def open_page(page: Path) -> str:
    """Open a page; a sentence that says so, or that there is no browser to open it in."""
    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        opened = False
    return f"opened {page}" if opened else f"there is no browser here to open {page} in; it needs no network elsewhere"


def report_and_open(runs: Iterable[str]) -> str:
    """Write the report on the experiments of some runs, by their folders, and open its explorer; what was done.

    Raises:
        RunnerError: none of them is finished, or the report cannot be written.
    """
    folders = sorted({str(Path(run).parent) for run in runs})
    if not folders:
        raise RunnerError("--open: no run was trained, so there is no report to open")
    target, _, _ = report(Path(commonpath(folders)))
    return open_page(target / explorer.FILE)
