"""What README.md and the pages of docs/ say: the code in them runs, what they name exists, and nothing is stale."""

from __future__ import annotations

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from docs import tables
from docs.costs import state_formula
from docs.docstrings import markdown, source
from docs.site import notebooks
from experiments.util.docstrings import entries, split_sections
from seqarch.layers import MIXERS, build_mixer
from seqarch.ops import OPS
from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES} | {
    path.relative_to(ROOT).as_posix(): notebooks.markdown(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("docs/**/*.ipynb"))
}
OF_OWN = ("docs/extending.md", "docs/tutorials/own_mixer.ipynb", "examples/own_mixer/README.md")
"""The pages with choices of a user's own."""
MATCHING = Path("docs/matching.md")
"""Takes as long as all other pages: 270 searches, of each kind of which ``config/test_matching.py`` has one."""


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "docs/guide.md", "docs/choosing.md", "docs/conversion.md"),
        *(pytest.param(page, marks=pytest.mark.slow) for page in ("docs/models.md", "docs/decoding.md")),
    ],
)
def test_the_code_on_the_page_runs(page, capsys):
    code = re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)
    assert code
    exec(compile("\n".join(code), page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page == MATCHING)) for page in tables.PAGES_WITH_PARTS],
    ids=str,
)
def test_generated_parts_are_up_to_date(page):
    assert (ROOT / page).read_text(encoding="utf-8") == tables.page(page), "stale: run `python -m docs.tables`"


@pytest.mark.parametrize("name", MIXERS)
def test_the_formula_of_a_state_gives_its_bytes(name):
    width, length = 7 * 1024, 2**23
    formula = re.sub(r"(?<=\w) (?=[DT])", " * ", state_formula(name)).replace("^", "**")
    with torch.device("meta"):
        mixer = build_mixer(name, d_model=width)
    assert eval(formula, {"D": width, "T": length}) == mixer.state_bytes(length)


def test_every_operation_has_a_page_and_no_page_is_left_over():
    assert {path.stem for path in (ROOT / "docs" / "ops").glob("*")} == set(OPS)


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE))
    named = re.findall(r"^make ([a-z-]+)", fenced, re.MULTILINE) + re.findall(r"`make ([a-z-]+)", TEXTS[page])
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", TEXTS)
def test_choices_of_configurations_exist(page):
    groups = "|".join(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())
    for group, names in re.findall(rf"(?<![\w.-])({groups})=([\w,]+)", TEXTS[page]):
        example = {"simple_gla", "learnt_retention", "running_mean", "majority", "printed"} if page in OF_OWN else set()
        for name in set(names.split(",")) - example:
            assert (ROOT / "configs" / group / f"{name}.yaml").exists(), f"{group}={name}"


@pytest.mark.parametrize("page", TEXTS)
def test_modules_that_are_to_be_run_exist(page):
    for module in re.findall(r"python -m ((?:experiments|docs|seqarch)[\w.]*)", TEXTS[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_paths_that_are_named_exist(page):
    """Paths in backquotes below the folders of the house; capitals such as NAME stand for any."""
    named = re.findall(r"`((?:seqarch|experiments|configs|tests|docs|csrc)/[\w./-]+)`", TEXTS[page])
    for path in named:
        if not re.search(r"[A-Z]{2}", path) and "simple_gla" not in path:
            assert (ROOT / path).exists(), f"{page} names {path}"


def defined(source: str) -> set[str]:
    """The dotted names that a Python file defines: functions, classes with what is in them, and what is assigned."""
    found: set[str] = set()
    inside = [("", ast.parse(source).body)]
    while inside:
        prefix, body = inside.pop()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                inside.append((f"{prefix}{node.name}.", node.body))
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {f"{prefix}{target.id}" for target in targets if isinstance(target, ast.Name)}
    return found


def test_what_a_file_defines():
    lines = "A, a = 1, 2", "B: int = 1", "def c(): d = 1", "class E:", "  f: int", "  def g(self): ...", "C = E"
    assert defined("\n".join(lines)) == {"B", "C", "c", "E", "E.f", "E.g"}


@pytest.mark.parametrize("page", TEXTS)
def test_names_in_files_are_defined_there(page):
    """``FILE::NAME``: of C++ and of Python, where a method is ``CLASS.METHOD``; a base class's is named in its file."""
    gone = []
    for path, name in re.findall(r"`((?:seqarch|experiments|tests|docs|csrc)/[\w./-]+)::([\w.]+)`", TEXTS[page]):
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else None
        if source is None:
            gone.append(f"{path}: there is no such file")
        elif name not in (defined(source) if path.endswith(".py") else re.findall(r"\w+(?=\()", source)):
            gone.append(f"{path}::{name}")
    assert not gone, f"{page} names what is gone"


def test_decisions_are_numbered_without_gaps():
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in pages] == list(range(1, len(pages) + 1))
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(path.name[:4])}. ")
        assert all(f"## {part}" in text for part in ("Context", "Decision", "Consequences")), path.name


def test_docstrings_become_markdown():
    text = "One.\n\n.. math::\n    a \\\\\n    b\n\nSee :func:`~x.y` and ``z``."
    assert markdown(text) == "One.\n\n```math\na \\\\\nb\n```\n\nSee `x.y` and `z`."


def test_sections_and_entries_of_a_docstring():
    prose, sections = split_sections(
        "Does.\n\nArgs:\n    a, b: first\n        and more.\n    c: last.\n\nReturns:\n    x.\n"
    )
    assert prose == "Does."
    assert entries(sections["Args"]) == {"a, b": "first and more.", "c": "last."}
    assert sections["Returns"] == "x."


def test_a_docstring_without_a_source_is_an_error():
    assert source('As in Gu and\nDao 2023, "Mamba", figure 3.', "mamba") == 'Gu and Dao 2023, "Mamba"'
    with pytest.raises(ValueError, match="docstring of nothing names no source"):
        source("A layer.", "nothing")


def test_every_row_about_the_runner_leads_to_its_test():
    lines = TEXTS["docs/runner.md"].splitlines()
    heads = [line for line, below in pairwise(lines) if below.startswith("| ---")]
    rows = [line for line in lines if line.startswith("| ") and "---" not in line and line not in heads]
    assert len(rows) > 30
    for row in rows:
        links = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)#([\w.]+)\)", row)
        assert links, row
        for file, name in links:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert all(re.search(rf"^\s*(def|class) {part}\b", source, re.MULTILINE) for part in name.split(".")), name


def test_scripts_for_a_cluster_are_read_by_a_shell():
    scripts = re.findall(r"^```sh\n(#!.*?)^```", TEXTS["docs/cluster.md"], re.DOTALL | re.MULTILINE)
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
