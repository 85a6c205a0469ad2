"""The pages of docs/results follow from their committed records, and say what these show."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from PIL import Image

from experiments.config.build import build_model
from experiments.config.overrides import compose
from experiments.config.schema import run_config
from experiments.report.comparison import compare
from experiments.studies import STUDIES, records
from experiments.studies.page import PAGES, RESULTS, not_run
from experiments.studies.publish import draw, train_and_record, write_page
from experiments.studies.records import rounded, shortened
from experiments.studies.study import VERSIONS, Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.study import main
from experiments.sweeps.execute import resolve_composed
from experiments.util.errors import RunnerError
from experiments.util.plot_style import figure
from seqarch.layers import measured_state_bytes
from tests.support.paths import ROOT
from tests.support.runs import TINY, tiny_config, train_here

HOME = ROOT / RESULTS
OWN = [name for name, study in STUDIES.items() if study.sweeps]
HEADLINES: dict[str, dict[str, bool]] = {
    "state_tracking": {
        "without negative eigenvalues parity stays at chance": True,
        "with them parity is learnt": True,
        "and carried over to six times the length": True,
        "S3 takes two delta steps and negative eigenvalues": False,
        "S3 beyond the length of training": False,
    },
    "recall_and_state": {
        "attention recalls all": True,
        "more state, more recall": True,
        "delta rule above gated linear attention": True,
        "delta rule above Mamba-2": True,
        "looking at the input": False,
        "the gated delta rule is no worse": False,
    },
    "hybrids": {
        "attention brings recall": True,
        "text hardly depends on the ratio": True,
        "at equal state": False,
        "the place hardly matters": True,
        "the order of pure models is not that of hybrids": False,
    },
    "learning_rate": {
        "recurrent models have narrower bands": False,
        "the rate moves a model from chance to its best": True,
        "one layer of attention fails": False,
    },
    "selective_copying": {
        "fixed dynamics fall short": False,
        "gates above fixed dynamics": False,
        "the delta rule solves it": False,
    },
    "length": {
        "full attention fails beyond its training length": False,
        "recurrent states extrapolate": True,
        "far out the cheap models win": True,
    },
    "efficiency": {
        "attention is cheapest at short lengths": True,
        "only attention's state grows": True,
    },
    "experts": {
        "experts beat dense": True,
        "loss and bias balance": True,
        "the bias costs no quality": False,
        "balancing is nearly free": True,
    },
}
"""By study and finding, whether the recorded runs agree: what the prose of the pages was written for."""


@cache
def recorded(name: str) -> Runs:
    return STUDIES[name].read(HOME)


def test_every_study_has_its_page_and_no_page_is_left_over():
    assert {path.stem for path in HOME.glob("*.md")} - {"README"} == set(STUDIES)
    index = (HOME / "README.md").read_text(encoding="utf-8")
    assert all(f"]({page.name})" in index for page in PAGES.values())


@pytest.mark.parametrize("name", STUDIES)
def test_the_headlines_are_those_that_the_page_was_written_for(name):
    findings = STUDIES[name].findings(recorded(name))
    assert {finding.name: finding.holds for finding in findings} == HEADLINES[name]


@pytest.mark.parametrize("name", OWN)
def test_all_runs_of_the_published_sweep_are_recorded(name):
    wanted = {tuple(sorted(arguments)) for arguments in STUDIES[name].sweeps["recorded"].arguments()}
    assert len(recorded(name).by_study[name]) == len(wanted)


@pytest.mark.parametrize("name", OWN)
def test_every_point_has_at_least_three_seeds(name):
    for comparison in compare(recorded(name).by_study[name]):
        for setting in comparison.settings:
            assert len(setting.runs) >= 3, setting.label


@pytest.mark.parametrize("name", OWN)
def test_rates_are_chosen_by_validation_alone(name):
    """Taking the test results away changes no choice, and each choice has the best median on validation."""
    runs = recorded(name).by_study[name]
    blind = [replace(run, record=without_test(run.record)) for run in runs]
    chosen, again = ({(comparison.name, setting.label): setting.runs[0].config["train"]["lr"]
                      for comparison in compare(kind) for setting in comparison.settings}
                     for kind in (runs, blind))  # fmt: skip
    assert chosen == again


def without_test(record: dict) -> dict:
    return {**record, "results": {**record["results"], "test": 0.0}} if record["results"] else record


@pytest.mark.parametrize("name", OWN)
def test_recorded_states_are_those_measured(name):
    """Every recorded model is built again: its formula gives the bytes of a real state, and the recorded number."""
    seen = {}
    for run in recorded(name).by_study[name]:
        seen.setdefault(repr(run.config["model"]), run)
    for run in seen.values():
        device = {"device": "cpu", "threads": 1}
        config = run_config({**run.config, "train": {**run.config["train"], **device}})
        model, length = build_model(config).eval(), 48
        with torch.no_grad():
            _, state = model(torch.zeros(1, length, dtype=torch.int64))
        assert measured_state_bytes(state) == model.state_bytes(length)
        assert model.state_bytes(run.record["model"]["state_length"]) == run.record["model"]["state_bytes"]
        assert model.num_parameters() == run.record["model"]["parameters"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_plot_was_drawn_from_the_committed_records(name):
    study = STUDIES[name]
    source = records.digest(study.folders(HOME))
    figures = {f"{figure.name}.png" for figure in study.figures(recorded(name))}
    assert {path.name for path in (HOME / name).glob("*.png")} == figures
    for file in figures:
        with Image.open(HOME / name / file) as image:
            assert image.info["Source"] == source, f"{file}: run python -m experiments.study {name} --draw"


@pytest.mark.parametrize("name", STUDIES)
def test_every_page_says_what_a_reader_needs(name):
    page = (ROOT / PAGES[name]).read_text(encoding="utf-8")
    for part in ("**Question.**", "## What the literature says", "## What it shows", "## What it does not show"):
        assert part in page
    assert f"python -m experiments.study {name}" in page


def test_a_study_without_records_is_said_to_be_missing(tmp_path):
    assert STUDIES["length"].missing(tmp_path) == ["length"]
    assert "**Not run yet**: no runs of length are recorded" in not_run(["length"])
    assert not STUDIES["length"].missing(HOME)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OWN)
def test_every_version_composes(name, version):
    """The first run of every row of a grid: the large versions have too many runs to build them all."""
    sweep = STUDIES[name].sweeps.get(version)
    if sweep is None:
        assert version != "recorded"
        return
    first = [next(iter(Sweep(sweep.common, (row,)).arguments())) for row in sweep.grid]
    for arguments in first:
        assert resolve_composed(compose(arguments)).experiment.startswith("results/")


def test_choices_multiply_within_a_row_and_the_last_of_a_key_counts():
    sweep = Sweep(
        "seed=0,1 train.lr=1e-3", ("model=gla train.lr=1,2", "model.name=a 'model.pattern=\"gla attention\"'")
    )
    assert list(sweep.arguments()) == [
        ["seed=0", "train.lr=1", "model=gla"],
        ["seed=0", "train.lr=2", "model=gla"],
        ["seed=1", "train.lr=1", "model=gla"],
        ["seed=1", "train.lr=2", "model=gla"],
        ["seed=0", "train.lr=1e-3", "model.name=a", 'model.pattern="gla attention"'],
        ["seed=1", "train.lr=1e-3", "model.name=a", 'model.pattern="gla attention"'],
    ]


def test_a_run_survives_its_line(tmp_path):
    """A line leaves out what is at its default: the same run comes back from it."""
    config = tiny_config(tmp_path / "runs", model__mixers={"attention": {"conv_width": 4}})
    train_here(config)
    broken = tiny_config(tmp_path / "runs", seed=1, train__lr=1e30, train__grad_clip=0)
    train_here(broken)
    never = tiny_config(tmp_path / "runs", seed=2)
    lines = records.collect([config, broken, never], history=("validation_accuracy",))
    (tmp_path / "tiny").mkdir()
    records.write(lines, tmp_path / "tiny")
    found = records.read(tmp_path / "tiny")
    assert [run.config for run in found] == [rounded(shortened(each)) for each in (config, broken)]
    device = {"threads": 1, "device": "cpu"}
    back = run_config({**found[0].config, "train": {**found[0].config["train"], **device}, "runs": config.runs})
    assert back == config
    assert [set(line) for line in found[0].metrics] == [{"step", "validation_accuracy"}] * 2
    assert found[0].record["results"]["test"] == pytest.approx(lines[0]["record"]["results"]["test"])


def test_the_hash_of_the_records_is_in_the_figure(tmp_path):
    with figure([tmp_path / "a.png"], source="abc") as (_, (axes,)):
        axes.plot([0, 1])
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Source"] == "abc"


class Tiny(Study):
    name = "tiny"
    title = "A tiny study"
    common = " ".join(["experiment=mqar model=attention seed=0,1", *TINY, "train.steps=10", "train.grad_clip=0"])
    sweeps: ClassVar = {"small": Sweep(common, ("train.lr=1e-3", "train.lr=1e30"))}

    def figures(self, runs):
        values = [run.record["results"].get("test", 0.0) for run in runs.all]
        return [Figure("values", "What came out.", lambda axes: axes[0].plot(values))]

    def tables(self, runs):
        return [Table("Runs", [["run", "status"], *([run.path.name, run.status] for run in runs.all)])]

    def findings(self, runs):
        return [Finding("two", "There are runs", f"{len(runs.all)} of them", len(runs.all) == 4)]


def test_from_nothing_to_a_page_and_again(tmp_path):
    """Runs that diverge stay on record; the second time what is finished is kept as it is."""
    root, runs, study, before = tmp_path / "results", tmp_path / "runs", Tiny(), None
    for _ in range(2):
        assert train_and_record(study, "small", root, runs, jobs=2) == 1
        lines = (root / "tiny" / records.FILE).read_text(encoding="utf-8").splitlines()
        assert before in (None, lines[:2])
        before = lines[:2]
    assert [path.name for path in draw(study, root)] == ["values.png"]
    page = write_page(study, root).read_text(encoding="utf-8")
    for part in ("| There are runs | 4 of them | yes |", "**Failed runs: 2 of 4**", "training diverged at step 2"):
        assert part in page
    assert str(tmp_path) not in "".join([page, *lines])
    assert not list((runs / ".sweeps").glob("*"))


@pytest.mark.parametrize("name", ["index.md", "values.png", records.FILE])
def test_a_study_is_written_among_no_others_files(tmp_path, name):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).write_text("mine")
    with pytest.raises(RunnerError, match=rf"tiny holds {name} and is no study"):
        train_and_record(Tiny(), "small", tmp_path, tmp_path / "runs", jobs=1)
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {name: "mine"}


@pytest.mark.parametrize("name", ["recall_and_state", "hybrids"])
def test_a_model_without_a_state_is_named(tmp_path, name):
    for folder in STUDIES[name].folders(HOME):
        (tmp_path / folder.name).mkdir()
        text = (folder / records.FILE).read_text(encoding="utf-8")
        text = re.sub(r'("pattern":"gla".*"state_bytes":)\d+', r"\g<1>0", text)
        (tmp_path / folder.name / records.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(RunnerError, match=r"the record of gla.* has a state of 0 bytes, expected more than 0"):
        draw(STUDIES[name], tmp_path)


def test_a_version_that_a_study_lacks(tmp_path):
    with pytest.raises(RunnerError, match="tiny has no version 'large', expected one of small"):
        train_and_record(Tiny(), "large", tmp_path, tmp_path, jobs=1)
    with pytest.raises(RunnerError, match="run the study tiny first, in the same version"):
        draw(Tiny(), tmp_path)


def test_records_that_are_cut_are_one_line(tmp_path):
    """In the middle of a line or after one, or with lines that are something else."""
    whole = (HOME / "length" / records.FILE).read_text(encoding="utf-8")
    file = tmp_path / "length" / records.FILE
    file.parent.mkdir()
    for text, message in (
        (whole[:-50], f"line 30 of {file} is no record of a run"),
        ('{"run": 3}\n', f"line 1 of {file} is no record of a run"),
        ("[]\n", f"line 1 of {file} is no record of a run"),
        (whole.replace('"format":2', '"format":1'), f"line 1 of {file} is of format 1, and this version"),
        ("", "the records hold nothing where finished runs of results/length"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RunnerError, match=re.escape(message)):
            draw(STUDIES["length"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no study is named"), (["length", "--jobs", "0"], "--jobs is 0, expected at least 1")],
    ids=["no_name", "no_jobs"],
)
def test_a_command_that_says_too_little(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["study", *arguments])
    assert main() == 1
    assert message in capsys.readouterr().err


def test_a_study_that_nobody_knows(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "recall_and_stat"])
    assert main() == 1
    assert "Did you mean 'recall_and_state'?" in capsys.readouterr().err
