"""The examples: the template of a repository of one's own, used from a copy as somebody outside would, and images."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from seqarch.testing import LAWS
from tests.support.backends import available
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "own_mixer"
SMALL = ("train.steps=2", "train.batch_size=4", "task.validation_examples=4", "task.test_examples=4", "train.threads=1")
MINE = ("--config-dir", "conf", "experiment=majority", "model=learnt_retention")


def test_each_cell_of_a_scanned_image_sees_all_others():
    torch.manual_seed(0)
    scan = runpy.run_path(str(ROOT / "examples" / "scan_2d.py"))["Scan2d"](16, "mamba2", d_state=4, head_dim=8)
    x = torch.randn(1, 3, 4, 16, requires_grad=True)
    y = scan(x)
    assert y.shape == x.shape
    for row, column in ((0, 0), (1, 2), (2, 3)):
        (seen,) = torch.autograd.grad(y[0, row, column].sum(), x, retain_graph=True)
        assert (seen.abs().amax(-1) > 0).all()


@pytest.mark.slow
def test_scans_tell_gratings_apart():
    assert runpy.run_path(str(ROOT / "examples" / "scan_2d.py"))["train"]("mamba2", 75) > 0.5


def test_a_client_reads_its_text_in_order_and_sends_weights_alone(monkeypatch):
    """What of the federated example needs no Flower: ``tests/check_federated.py`` has the rest."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "federated")
    texts, training = (importlib.import_module(name) for name in ("texts", "training"))
    sizes = [len(texts.text(name)) for name in texts.CLIENTS]
    assert max(sizes) == 10 * min(sizes)
    reader = texts.Reader("calendar")
    pieces = [reader.piece() for _ in range(reader.pieces)]
    assert torch.equal(torch.cat([pieces[0][:, :1], *(piece[:, 1:] for piece in pieces)], 1), reader.rows)
    assert reader.rows.numel() <= min(sizes) - texts.TEST_BYTES
    model = training.new_model()
    assert training.shared(model, own_norms=False).keys() == dict(model.named_parameters()).keys()
    kept = training.shared(model, own_norms=False).keys() - training.shared(model, own_norms=True).keys()
    norms = {f"{name}.weight" for name, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    assert kept == norms
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert training.train(model, [reader] * 2) < 9
    assert reader.state is not None
    assert not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(reader.state))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reader.at = 0
    reader.piece()
    assert reader.state is None  # from the first piece on anew


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__")))


def call(*arguments: str, cwd: Path, paths: tuple[Path, ...] = (), code: int = 0) -> str:
    """Run Python's modules in a folder, with the checkout in its path; all that is printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def records(root: Path) -> Iterator[dict]:
    for path in sorted(root.glob("runs/*/*/run.json")):
        yield json.loads(path.read_text())


@pytest.mark.slow
def test_its_own_tests_pass(copy):
    said = call("pytest", "-q", "-p", "no:cacheprovider", cwd=copy)
    assert f"{2 + len(LAWS) * len(available('linear_attention'))} passed" in said


@pytest.mark.slow
def test_an_edit_of_the_mixer_is_named_and_nothing_is_lost(copy):
    """As ``tests/experiments/runs/test_other_code.py`` has it within one process, by commands."""
    sweep = ("experiments.run", *MINE, *SMALL, "tracker=printed")
    call(*sweep, cwd=copy)
    (record,) = records(copy)
    assert record["status"] == "finished"
    assert record["plugins"]["own_mixer"]["sources"].keys() == {
        f"own_mixer/{name}.py" for name in ("__init__", "mixers", "tasks", "trackers")
    }
    assert "step 2: " in next(copy.glob("runs/*/*/train.log")).read_text()
    mixer = copy / "own_mixer" / "mixers.py"
    mixer.write_text(mixer.read_text().replace("forget: float = 0.1", "forget: float = 0.2"))
    said = call(*sweep, cwd=copy, code=1)
    assert "finished with other code" in said
    assert "own_mixer/mixers.py changed" in said
    assert list(records(copy)) == [record]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_every_worker_knows_it(copy, launcher):
    """From a folder elsewhere, with what is the user's own named by its path."""
    elsewhere = copy.parent / "elsewhere"
    elsewhere.mkdir()
    own = ("--config-dir", str(copy / "conf"), "experiment=majority", "model=learnt_retention,mamba2")
    said = call("experiments.run", "--multirun", *own, *SMALL, f"launcher={launcher}", cwd=elsewhere, paths=(copy,))
    assert "2 runs: 2 finished" in said
    assert {record["status"] for record in records(elsewhere)} == {"finished"}
    assert {bool(record["plugins"]["own_mixer"]["sources"]) for record in records(elsewhere)} == {True}


@pytest.mark.slow
def test_every_rank_of_torchrun_knows_it(copy):
    said = call("experiments.run", *MINE, *SMALL, "machine.processes=2", cwd=copy)
    (record,) = records(copy)
    assert (record["status"], record["cost"]["processes"]) == ("finished", 2), said


@pytest.mark.slow
def test_installed_it_needs_no_naming(copy):
    """By its entry point: neither a plug-in is named nor its folder in the path."""
    site = copy.parent / "site"
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site))
    call("pip", "install", *options, str(copy), cwd=copy.parent)
    for folder in ("own_mixer", "build"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    call("experiments.run", *MINE, *SMALL, "plugins=[]", cwd=copy, paths=(site,))
    (record,) = records(copy)
    assert record["plugins"]["own_mixer"]["version"] == "0.1.0"
    assert record["plugins"]["own_mixer"]["path"] == str(site / "own_mixer")


def test_what_is_missing_or_raises_is_one_error(copy):
    for text, told in ((None, "cannot import 'own_mixer'"), ("1 / 0", "raises ZeroDivisionError: division by zero")):
        shutil.rmtree(copy / "own_mixer", ignore_errors=True)
        if text is not None:
            (copy / "own_mixer").mkdir()
            (copy / "own_mixer" / "__init__.py").write_text(text)
        said = call("experiments.run", "--multirun", *MINE, *SMALL, "seed=0,1", cwd=copy, code=1)
        assert said.count("error: ") == 1
        assert told in said
        assert not list(copy.glob("runs/*/*"))
