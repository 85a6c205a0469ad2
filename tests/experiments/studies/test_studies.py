"""Studies: from a plan to runs, records, verdicts and a page, each way that it can be stopped or spoilt."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from dataclasses import replace
from typing import ClassVar

import pytest
from PIL import Image

from experiments.config.schema import TrainConfig, run_config
from experiments.studies import STUDIES, plan, records, sweep
from experiments.studies.claims import decide
from experiments.studies.page import PAGES, RESULTS, how_to_run, recorded, results
from experiments.studies.protocol import Arm, Protocol, Wanted
from experiments.studies.publish import draw, train_and_record, write_page
from experiments.studies.records import rounded, shortened
from experiments.studies.study import VERSIONS, Figure, Table
from experiments.studies.sweep import Composer
from experiments.studies.trained import Claim, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.study import main
from experiments.sweeps.execute import resolve_composed
from experiments.util.errors import RunnerError
from experiments.util.plot_style import figure
from tests.support.paths import ROOT
from tests.support.runs import TINY, tiny_config, train_here

HOME = ROOT / RESULTS
RECORDED = [name for name in STUDIES if (HOME / name / records.FILE).exists()]
TRAINED = [name for name, study in STUDIES.items() if isinstance(study, TrainedStudy)]


MEASURED = ("offload", "small_states")
"""Pages of what a command measures of runs that are there."""


def test_every_study_has_its_page_and_no_page_is_left_over():
    assert {path.stem for path in HOME.glob("*.md")} - {"README", "audit", *MEASURED} == set(STUDIES)
    index = (HOME / "README.md").read_text(encoding="utf-8")
    assert all(f"]({page.name})" in index for page in PAGES.values())


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan_is_committed_and_is_the_studys(name):
    plan.check(STUDIES[name].versions["recorded"], HOME / name)


@pytest.mark.parametrize("name", [name for name in RECORDED if name in TRAINED])
def test_every_recorded_run_is_of_the_plan_and_of_code_without_changes(name):
    version = STUDIES[name].versions["recorded"]
    arms, keys = {arm.name for arm in version.arms}, []
    for run in records.read(HOME / name):
        study = run.record["study"]
        assert (study["plan"], run.record["code"]["dirty"]) == (version.plan, False)
        assert study["arm"] in arms
        keys.append((study["arm"], study["stage"], run.config["train"]["lr"], run.config["seed"]))
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", RECORDED)
def test_every_plot_was_drawn_from_the_committed_records(name):
    source = records.digest(HOME / name)
    drawn = STUDIES[name].figures(recorded(STUDIES[name], STUDIES[name].versions["recorded"], HOME / name))
    assert {path.name for path in (HOME / name).glob("*.png")} == {f"{figure.name}.png" for figure in drawn}
    for each in drawn:
        with Image.open(HOME / name / f"{each.name}.png") as image:
            assert image.info["Source"] == source, f"{each.name}: run python -m experiments.study {name} --draw"


@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_of_every_version_builds_its_model(name, tmp_path):
    """An arm of several versions once, and of each version the first."""
    built: set[str] = set()
    for version in VERSIONS:
        if chosen := STUDIES[name].versions.get(version):
            composer, first = Composer(chosen, tmp_path), chosen.arms[0]
            for arm in (each for each in chosen.arms if each is first or each.overrides not in built):
                built.add(arm.overrides)
                if arm.sources:  # Models of its kind are built in test_conversion.py.
                    with pytest.raises(RunnerError, match=r"the arm .* needs a run of"):
                        composer(Wanted(arm.name, "reporting", 1e-3, 0))
                    continue
                config = resolve_composed(composer(Wanted(arm.name, "doubled", 1e-3, 0, 600)))
                assert (config.experiment, config.train.steps) == (f"studies/{name}", 600)


@pytest.mark.parametrize(("name", "share"), [("needle", 0.2), ("recall_state", 1 / 6)])
def test_a_doubled_run_decays_as_long_as_the_run_that_it_doubles(name, share, tmp_path):
    """Relative to its stable phase: of a fixed schedule the same share, of ``until_converged`` that of all steps."""
    version = STUDIES[name].versions["recorded"]
    train = Composer(version, tmp_path)(Wanted(version.arms[0].name, "doubled", 1e-3, 0, 6000))["train"]
    assert (train["schedule"], train["steps"]) == ("wsd", 6000)
    assert train.get("decay_share", TrainConfig.decay_share) == pytest.approx(share)


def test_a_run_survives_its_line(tmp_path):
    """A line leaves out what is at its default: the same run comes back from it."""
    config = tiny_config(tmp_path / "runs", model__mixers={"attention": {"conv_width": 4}})
    _, folder = train_here(config)
    broken = tiny_config(tmp_path / "runs", seed=1, train__lr=1e30, train__grad_clip=0)
    _, failed = train_here(broken)
    (tmp_path / "tiny").mkdir()
    ledger, named = records.Ledger(tmp_path / "tiny"), {"arm": "a", "stage": "tuning", "plan": "p"}
    for each, where in ((config, folder), (broken, failed)):
        line = records.to_line(each, where, named, history=("validation_accuracy",))
        assert line is not None
        ledger.add(line)
    found = records.read(tmp_path / "tiny")
    assert [run.config for run in found] == [run.config for run in ledger.runs]
    assert [run.config for run in found] == [rounded(shortened(each)) for each in (config, broken)]
    device = {"threads": 1, "device": "cpu"}
    back = run_config({**found[0].config, "train": {**found[0].config["train"], **device}, "runs": config.runs})
    assert back == config
    assert [set(line) for line in found[0].metrics] == [{"step", "validation_accuracy"}] * 2
    assert found[0].record["study"] == named
    assert len(found[0].items()) == 32


def test_the_hash_of_the_records_is_in_the_figure(tmp_path):
    with figure([tmp_path / "a.png"], source="abc") as (_, (axes,)):
        axes.plot([0, 1])
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Source"] == "abc"


COMMON = " ".join(["experiment=mqar", *TINY, "train.steps=10", "train.grad_clip=0"])
TINY_VERSION = Version(
    COMMON,
    (Arm("plain", "model=attention"), Arm("wide", "model=attention model.embedding_std=1")),
    Protocol(rates=(-6, -5), most_rates=2, tuning_seeds=(7,), reporting_seeds=(0, 1)),
    (
        Claim("width", "A wide embedding recalls more", (("wide", "plain"),), "more", 0.05),
        Claim("both", "as much", (("wide", "plain"), ("plain", "wide")), "equal", 0.05),
        Claim("pace", "and takes half the steps", (("plain", "wide"),), "more", 1.0, threshold=0.9),
    ),
)


class Tiny(TrainedStudy):
    name = "tiny"
    title = "A tiny study"
    question = "Does it run?"
    history = ("validation_accuracy",)
    versions: ClassVar = {"small": TINY_VERSION}

    def answer(self, results):
        return f"With {len(results.runs)} runs."

    def figures(self, results):
        values = [run.record["results"].get("test", 0.0) for run in results.runs]
        return [Figure("values", "What came out.", lambda axes: axes[0].plot(values))]

    def tables(self, results):
        return [Table("Runs", [["run", "status"], *([run.path.name, run.status] for run in results.runs)])]


class InThisProcess:
    """In place of threads that start processes, which would take most of the time of these tests."""

    def __init__(self, jobs: int): ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, _, composed, status, job) -> Future[None]:
        train_here(resolve_composed(composed))
        status.update(job, status="finished", name="run")
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study from nothing to its page; the folders of results and runs."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ThreadPoolExecutor", InThisProcess)
        assert train_and_record(Tiny(), "small", root / "results", root / "runs", jobs=1) == 0
    draw(Tiny(), "small", root / "results")
    write_page(Tiny(), "small", root / "results")
    return root


@pytest.fixture
def root(done, tmp_path):
    """A copy of its results, and its runs gone: what somebody has who clones a repository."""
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for path in (done / "results" / "tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_study_runs_from_nothing_to_its_page(done):
    lines = (done / "results" / "tiny" / records.FILE).read_text(encoding="utf-8").splitlines()
    stages = [json.loads(line)["record"]["study"]["stage"] for line in lines]
    assert {stage: stages.count(stage) for stage in stages} == {"tuning": 4, "reporting": 4, "doubled": 2}
    page = (done / "results" / "tiny" / "index.md").read_text(encoding="utf-8")
    for part in (
        "**Answer.** With 10 runs.",
        "| A wide embedding recalls more | > 0.05 |",
        "at the edge",
        "No run failed",
    ):
        assert part in page
    assert str(done) not in "".join([page, *lines])
    assert not list((done / "runs" / ".sweeps").glob("*"))


def test_what_is_on_record_is_not_trained_again_though_its_folders_are_gone(root):
    before = (root / "results" / "tiny" / records.FILE).read_bytes()
    assert train_and_record(Tiny(), "small", root / "results", root / "runs", jobs=1) == 0
    assert (root / "results" / "tiny" / records.FILE).read_bytes() == before
    assert not list((root / "runs").rglob("run.json"))


def test_a_study_that_lost_lines_trains_these_runs_alone(root):
    """In a process of its own, which comes to the same results: what a study has is a function of its plan."""
    file = root / "results" / "tiny" / records.FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), encoding="utf-8")
    assert train_and_record(Tiny(), "small", root / "results", root / "runs", jobs=1) == 0
    again = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    was, now = (json.loads(each[-1])["record"] for each in (lines, again))
    assert (was["results"], was["study"]) == (now["results"], now["study"])


def edited(**changes):
    study = Tiny()
    study.versions = {"small": replace(TINY_VERSION, **changes)}  # type: ignore[misc]
    return study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"claims": (replace(TINY_VERSION.claims[0], margin=0.01), *TINY_VERSION.claims[1:])},
            "claims.width.margin is 0.05",
        ),
        (
            {"protocol": replace(TINY_VERSION.protocol, reporting_seeds=(0, 1, 2))},
            r"protocol.reporting_seeds is \[0, 1\]",
        ),
        ({"common": f"{COMMON} train.steps=12"}, "common is "),
    ],
    ids=["a_margin", "the_seeds", "the_budget"],
)
def test_a_plan_that_was_edited_after_its_first_run_is_refused(root, changes, message):
    files = {path: path.read_bytes() for path in (root / "results").rglob("*") if path.is_file()}
    for act in (lambda study: train_and_record(study, "small", root / "results", root / "runs", jobs=1),
                lambda study: draw(study, "small", root / "results")):  # fmt: skip
        with pytest.raises(RunnerError, match=message):
            act(edited(**changes))
    assert {path: path.read_bytes() for path in (root / "results").rglob("*") if path.is_file()} == files


def test_an_arm_whose_options_were_edited_is_refused(root):
    arms = (TINY_VERSION.arms[0], Arm("wide", "model=attention model.embedding_std=2"))
    with pytest.raises(
        RunnerError, match=r"model\.embedding_std is 1\.0 in the recorded runs of the arm 'wide' and 2\.0"
    ):
        train_and_record(edited(arms=arms), "small", root / "results", root / "runs", jobs=1)


def test_an_arm_may_be_added_and_is_trained_alone(root, monkeypatch):
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", InThisProcess)
    arms = (*TINY_VERSION.arms, Arm("wider", "model=attention model.embedding_std=2"))
    assert train_and_record(edited(arms=arms), "small", root / "results", root / "runs", jobs=1) == 0
    added = records.read(root / "results" / "tiny")[10:]
    assert {run.record["study"]["arm"] for run in added} == {"wider"}
    assert len(added) == 5


def test_an_arm_of_which_every_run_fails_is_on_record_and_unresolved(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", InThisProcess)
    broken = edited(arms=(TINY_VERSION.arms[0], Arm("wide", "model=attention model.embedding_std=1e38")))
    assert train_and_record(broken, "small", tmp_path / "results", tmp_path / "runs", jobs=1) == 0
    found = recorded(broken, broken.versions["small"], tmp_path / "results" / "tiny")
    assert all("every run of wide failed" in decision.verdict.reason for decision in decide(found))
    page = results(broken, found)
    assert re.search(r"\*\*Failed runs: \d+ of \d+\*\*", page)
    assert "training diverged at step" in page
    assert str(tmp_path) not in page + how_to_run(broken, found)


def test_a_plan_that_is_missing_or_not_committed(root, monkeypatch):
    (root / "results" / "tiny" / plan.FILE).unlink()
    with pytest.raises(RunnerError, match=r"plan\.json is missing, and there are records made by it"):
        draw(Tiny(), "small", root / "results")
    monkeypatch.setattr(plan, "ROOT", root)
    with pytest.raises(RunnerError, match=r"results/tiny/plan\.json has to be committed before the first run"):
        plan.check_committed(root / "results" / "tiny")


@pytest.mark.parametrize("name", ["index.md", "values.png", records.FILE])
def test_a_study_is_written_among_no_others_files(tmp_path, name):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).write_text("mine")
    with pytest.raises(RunnerError, match=rf"tiny holds {name} and is no study"):
        train_and_record(Tiny(), "small", tmp_path, tmp_path / "runs", jobs=1)
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {name: "mine"}


def test_a_version_that_a_study_lacks_and_records_that_are_not_there(tmp_path):
    with pytest.raises(RunnerError, match="tiny has no version 'large', expected one of small"):
        train_and_record(Tiny(), "large", tmp_path, tmp_path, jobs=1)
    with pytest.raises(RunnerError, match="run the study tiny first, in the same version"):
        draw(Tiny(), "small", tmp_path)


def test_records_that_are_cut_are_one_line(root):
    """In the middle of a line, or with lines that are something else."""
    file = root / "results" / "tiny" / records.FILE
    whole = file.read_text(encoding="utf-8")
    for text, message in (
        (whole[:-50], f"line 10 of {file} is no record of a run"),
        ('{"run": 3}\n', f"line 1 of {file} is no record of a run"),
        ("[]\n", f"line 1 of {file} is no record of a run"),
        (whole.replace('"format":2', '"format":1'), f"line 1 of {file} is of format 1, and this version"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RunnerError, match=re.escape(message)):
            draw(Tiny(), "small", root / "results")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no study is named"),
        (["initialisation", "--config-dir", "mine"], "--config-dir mine: a study composes no configurations"),
        (["initialisation", "--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["initialisatio"], "Did you mean 'initialisation'?"),
        (["initialisation", "--results", "~/x"], "--results: '~/x' begins with a ~"),
    ],
    ids=["no_name", "no_configurations", "no_jobs", "nobody_knows_it", "no_folder"],
)
def test_a_command_that_cannot_be(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["study", *arguments])
    assert main() == 1
    assert message in capsys.readouterr().err
