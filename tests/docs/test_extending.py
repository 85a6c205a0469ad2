"""docs/extending.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from seqarch.testing import LAWS
from tests.support.backends import available
from tests.support.paths import ROOT
from tests.support.variants import registered_cases

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FOLDERS = ("seqarch", "configs", "experiments")
TESTS = (
    *("__init__.py", "conftest.py", "support/__init__.py", "support/variants.py"),
    *("layers/__init__.py", "layers/test_laws.py"),
)
FILES = ("pyproject.toml", *(f"tests/{name}" for name in TESTS))
BACKEND = "causal_conv1d-recurrent_torch"
"""The backend that the page adds, as the cases of the laws name it."""

SITE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
"""
"""Run by Python as it starts: takes away an editable install, which would import this checkout and not the copy."""


def blocks(language: str, inside: bool) -> list[tuple[str, str]]:
    """The page's code blocks of a language whose first line is a comment with a path: that path, and what follows.

    Args:
        inside: those with a path in the checkout, or those for a repository of one's own.
    """
    found = re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found = [(path, content) for path, content in found if (path.split("/")[0] in FOLDERS) == inside]
    assert found, f"docs/extending.md has no {language} block that names its file"
    return found


def insert(text: str, patch: str) -> str:
    """Put each added line of a block behind the line above it, there exactly once; then take lines away."""
    context, removed = "", []
    for line in patch.splitlines():
        if line.startswith("+"):
            assert text.count(f"{context}\n") == 1, f"expected one line {context!r}"
            text = text.replace(f"{context}\n", f"{context}\n{line[1:]}\n")
        elif line.startswith("-"):
            removed.append(line[1:])
        context = line[1:]
    for line in removed:
        assert text.count(f"{line}\n") == 1, f"expected one line {line!r}"
        text = text.replace(f"{line}\n", "")
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with the page's mixer and backend."""
    root = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (root / "sitecustomize.py").write_text(SITE)
    for path, content in [*blocks("python", inside=True), *blocks("yaml", inside=True)]:
        assert not (root / path).exists(), f"the page's example is in the project already: {path}"
        (root / path).write_text(content)
    for path, patch in blocks("diff", inside=True):
        (root / path).write_text(insert((root / path).read_text(), patch))
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A repository of one's own, as the page's last part has it, which is the template word for word."""
    root = tmp_path_factory.mktemp("own")
    for path, content in [*blocks("python", inside=False), *blocks("yaml", inside=False)]:
        assert content == (ROOT / "examples" / "own_mixer" / path).read_text(encoding="utf-8"), path
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


def follow(root: Path, command: str, *more: str, paths: Sequence[Path] = ()) -> str:
    """Run a command of the page in a folder, with it and ``paths`` before what else Python imports from."""
    assert f"\n{command}\n" in PAGE, f"docs/extending.md does not say: {command}"
    words = [sys.executable, *shlex.split(command)[1:], *more]
    folders = os.pathsep.join(map(str, (root, *paths)))
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_new_mixer_and_the_new_backend_obey_the_laws(copy):
    """In one run of pytest, which takes longer to gather the laws' cases than to hold these to them."""
    mixer, backend = (f"python -m pytest tests/layers/test_laws.py -k {name}" for name in ("simple_gla", BACKEND))
    assert f"\n{backend}\n" in PAGE
    said = follow(copy, mixer, "-k", f"simple_gla or {BACKEND} and mamba2", "-p", "no:cacheprovider")
    here = [name for name in available("linear_attention") if not name.endswith("_cpp")]  # nothing is compiled there
    beside = "causal_conv1d-parallel_torch"
    cases = [case for name, case, quick in registered_cases() if quick and "mamba2" in name and beside in case.setting]
    assert f"{len(LAWS) * (len(here) + len(cases))} passed" in said


def test_what_is_added_passes_the_linter(copy):
    files = [path for path, _ in [*blocks("python", inside=True), *blocks("diff", inside=True)]]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=copy, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_new_mixer_trains_through_its_yaml(copy):
    command = "python -m experiments.run experiment=mqar model=simple_gla train.steps=1"
    follow(copy, command, "train.batch_size=2", "task.validation_examples=4", "task.test_examples=4")
    (record,) = copy.glob("runs/mqar/simple_gla-*seed0-*/run.json")
    run = json.loads(record.read_text())
    assert run["status"] == "finished"
    assert run["backends"].keys() == {"linear_attention"}


def test_a_mixer_of_ones_own_is_in_a_model(own):
    assert follow(own, "python use.py").startswith("own_mixer torch.Size([2, 50, 32]) ")


def test_a_mixer_of_ones_own_is_held_to_the_laws():
    """By the template's tests, which are the page's as all of its files are: ``tests/test_examples.py`` runs them."""
    assert "\npython -m pytest tests/test_own_mixer.py\n" in PAGE
    template = ROOT / "examples" / "own_mixer"
    for language, kind in (("python", "py"), ("yaml", "yaml")):
        files = {path.relative_to(template).as_posix() for path in template.rglob(f"*.{kind}")}
        assert {path for path, _ in blocks(language, inside=False)} == files


@pytest.mark.slow
def test_a_mixer_and_a_task_of_ones_own_are_in_the_runner(own):
    command = "python -m experiments.run --config-dir conf --multirun experiment=majority model=learnt_retention,mamba2"
    less = ("train.batch_size=2", "task.validation_examples=4", "task.test_examples=4")
    follow(own, f"{command} train.steps=1", *less, paths=[ROOT])
    files = {file.parent.name.split("-")[0]: file for file in own.glob("runs/majority/*/run.json")}
    records = {name: json.loads(file.read_text()) for name, file in files.items()}
    status = {name: record["status"] for name, record in records.items()}
    assert status == {"learnt_retention": "finished", "mamba2": "finished"}
    assert records["learnt_retention"]["backends"].keys() == {"linear_attention"}
    follow(own, "python -m experiments.report runs/majority", paths=[ROOT])


@pytest.mark.slow
def test_a_search_finds_what_is_of_ones_own_and_so_does_its_tracker(own):
    command = "python -m experiments.search --config-dir conf experiment=majority model=learnt_retention"
    small = ("train.steps=2", "train.batch_size=2", "task.validation_examples=4", "task.test_examples=4")
    more = ("search.trials=1", "tracker=printed", *small)
    assert "best: " in follow(own, f"{command} train.lr=1e-3,3e-3", *more, paths=[ROOT])
    assert any("step 2: " in log.read_text() for log in own.glob("runs/majority/*/train.log"))
