"""Build the site: ``python -m docs.site`` writes it into build/site/html, to be opened from there or put anywhere."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from docs.site import math_font, pictures
from docs.site.check import problems
from docs.site.chooser import data
from docs.site.links import BrokenLink
from docs.site.staging import stage
from experiments.util.paths import ROOT

BUILD = ROOT / "build" / "site"
HERE = Path(__file__).parent
EXPLORER = "experiments.report.explorer"


def build(folder: Path) -> list[str]:
    """Stage the sources below a folder and build its ``html``; what is wrong, a line each."""
    if folder.exists():
        return [f"{folder} is there already: `make site` removes it first"]
    sources, html = folder / "source", folder / "html"
    explorer = find_spec(EXPLORER) is not None
    try:
        stage(sources, explorer)
    except BrokenLink as error:
        return [str(error)]
    if wrong := misspelt(sources):
        return wrong
    options = ["-c", str(HERE), "-W", "--keep-going", "-q", "-j", "auto", "-d", str(folder / "doctrees")]
    if sphinx(["-b", "html", *options, str(sources), str(html)]):
        return ["Sphinx has found what is written above"]
    pictures.shrink(html / "_images")
    math_font.write(html, html / "_static" / "math.woff")
    data.write(html / "_static" / "chooser")
    if explorer:
        records = sorted((ROOT / "docs" / "results").glob("*/records.jsonl"))
        import_module(EXPLORER).write(records, html / "explorer.html")
    return list(problems(html))


def misspelt(sources: Path) -> list[str]:
    """Words of the pages that codespell knows as misspelt."""
    options = ["--ignore-words", str(HERE / "words.txt"), "--skip", "*/files/*"]
    command = [sys.executable, "-m", "codespell_lib", *options, str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout + done.stderr).replace(f"{sources}/", "").splitlines() if done.returncode else []


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser("python -m docs.site", description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    if wrong := build(BUILD):
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    print(BUILD / "html" / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
