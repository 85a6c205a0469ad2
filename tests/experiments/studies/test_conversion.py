"""The study of conversions: equal work, runs that wait for those they are made of, its page from made-up records."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.config.overrides import compose
from experiments.config.schema import run_config
from experiments.studies import conversion, plan, records
from experiments.studies.conversion import KEPT, MIXERS, SCRATCH_STEPS, STEPS, TEACHER, Conversion, equal_steps, work
from experiments.studies.page import how_to_run, recorded, results
from experiments.studies.protocol import Wanted, rate_of
from experiments.studies.records import Ledger
from experiments.studies.sweep import Composer, missing
from experiments.util import plot_style
from experiments.util.errors import RunnerError
from experiments.util.items import encode_items
from experiments.util.plot_style import figure
from seqarch import LanguageModel

STUDY = Conversion()
VERSION = STUDY.versions["recorded"]
RECALL = {"teacher": 0.95, "outputs": 0.2, "distilled": 0.9, "from scratch": 0.6}
BITS = {"teacher": 2.0, "outputs": 3.0, "distilled": 2.01, "from scratch": 2.2}


@cache
def composed(said: str) -> dict[str, Any]:
    found = compose(shlex.split(f"{VERSION.common} {said}"))
    return {key: value for key, value in found.items() if key != "retry"}


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """Each model of the study, without numbers."""
    made = {}
    for name in (TEACHER, *MIXERS, *KEPT):
        plain = composed(conversion.model_said(name))
        config = run_config({**plain, "train": {**plain["train"], "lr": 1.0}})
        with torch.device("meta"):
            made[name] = LanguageModel(config.model.options)
    return made


@pytest.mark.parametrize("name", SCRATCH_STEPS)
def test_models_from_nothing_have_as_much_work(models, name):
    base, steps = (name, STEPS) if name in models else (MIXERS[0], int(name.split()[-2]))
    assert SCRATCH_STEPS[name] == equal_steps(models[TEACHER], models[base], 128, steps)


def test_work_is_counted_by_what_runs(models):
    """Of outputs, only the mixers of three layers in four learn and are asked of the teacher again."""
    teacher, student = models[TEACHER], models["gated_delta_net, 1 in 4 kept"]
    flops = [[layer.mixers[0].flops(128) for layer in model.stack.layers] for model in (teacher, student)]  # type: ignore[index, union-attr, operator]
    assert work(teacher, student, "mixer_outputs", 128) == teacher.flops(128) + sum(flops[0][:3]) + 3 * sum(
        flops[1][:3]
    )
    assert work(teacher, student, "logits", 128) == teacher.flops(128) + 3 * student.flops(128)
    assert work(teacher, student, "targets", 128) == 3 * student.flops(128)


def lines(arms: Any, version: Any = VERSION) -> list[str]:
    """Records of arms, tuned and reported, whose middle rate is best."""
    made, generator = [], np.random.default_rng(0)
    rates = version.protocol.rates
    for arm in arms:
        way = arm.factors["way"]
        for stage, seeds in (
            ("tuning", version.protocol.tuning_seeds),
            ("reporting", version.protocol.reporting_seeds),
        ):
            for rate in rates if stage == "tuning" else rates[1:2]:
                for seed in seeds:
                    items = np.clip(RECALL[way] + 0.02 * generator.standard_normal(64), 0, 1)
                    score = float(items.mean()) - 0.1 * abs(rate - rates[1])
                    record = {
                        "status": "finished",
                        "study": {"arm": arm.name, "stage": stage, "plan": version.plan},
                        "results": {"validation": score, "test": score, "items": encode_items(items),
                                    "test_bits_per_byte": BITS[way] + 0.001 * seed},
                        "metric": {"name": "accuracy", "unit": "", "higher_is_better": True, "chance": 0.1},
                        "model": {"parameters": 1, "state_bytes": 1, "state_length": 1},
                        "cost": {"steps": 100, "processor_seconds": 9.0},
                        "code": {"commit": "0" * 40, "dirty": False},
                        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
                        "environment": {"python": "3", "torch": "2"},
                    }  # fmt: skip
                    objective = {"outputs": "mixer_outputs", "distilled": "logits"}.get(way, "targets")
                    plain = composed(conversion.model_said(arm.factors["model"]))
                    train = {"lr": rate_of(rate), "objective": objective, "steps": 100, "batch_size": 16}
                    config = {"experiment": "conversion", "seed": seed, "model": plain["model"], "task": plain["task"],
                              "train": train}  # fmt: skip
                    made.append(json.dumps({"format": 2, "run": f"{way}-{seed}", "config": config, "record": record}))
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(plot_style.RULES, "savefig.dpi", 40)
    text = "".join(f"{line}\n" for line in lines(VERSION.arms))
    (tmp_path / records.FILE).write_text(text, encoding="utf-8")
    plan.settle(VERSION, tmp_path, recorded=False)
    return tmp_path


def test_its_page(folder):
    runs = recorded(STUDY, VERSION, folder)
    assert not STUDY.unfinished(runs)
    page = results(STUDY, runs, STUDY.name) + how_to_run(STUDY, runs)
    assert "gated_delta_net, 1 in 4 kept" in page
    assert "| mamba2: from scratch | +10.0% (" in page
    assert "bits per byte within 2% of the transformer's: gated_delta_net yes" in page
    assert "more recall than from nothing for as much work: gated_delta_net yes" in page
    for each in STUDY.figures(runs):
        with figure([folder / f"{each.name}.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (folder / f"{each.name}.png").stat().st_size > 5_000


def test_runs_wait_for_those_they_are_made_of(tmp_path):
    """First the teacher and what starts from nothing; the first stage when the teacher is there; then the second."""
    (tmp_path / plan.FILE).write_text("{}")

    def wanted(arms: Any) -> set[str]:
        (tmp_path / records.FILE).write_text("".join(f"{line}\n" for line in lines(arms)), encoding="utf-8")
        return {VERSION_ARMS[each.arm].factors["way"] for each in missing(VERSION, Ledger(tmp_path))}

    teacher = [arm for arm in VERSION.arms if arm.factors["way"] == "teacher"]
    outputs = [arm for arm in VERSION.arms if arm.factors["way"] == "outputs"]
    assert wanted([]) == {"teacher", "from scratch"}
    assert wanted(teacher) == {"outputs", "from scratch"}
    assert wanted([*teacher, *outputs]) == {"distilled", "from scratch"}


VERSION_ARMS = {arm.name: arm for arm in VERSION.arms}


def test_a_run_is_made_of_those_of_its_seed(folder):
    composer = Composer(VERSION, Path("runs"), Ledger(folder))
    train = composer(Wanted("mamba2: distilled", "reporting", 0.003, 3))["train"]
    assert train["start_from"] == "runs/conversion/outputs-3"
    assert train["teacher"] == "runs/conversion/teacher-3"
    train = composer(Wanted("mamba2: outputs", "tuning", 0.003, 100))["train"]
    assert train["start_from"] == train["teacher"] == "runs/conversion/teacher-100"
    with pytest.raises(RunnerError, match=r"the arm 'mamba2: outputs' needs a run of 'attention' with the seed 77"):
        composer(Wanted("mamba2: outputs", "reporting", 0.003, 77))


def test_a_page_says_which_runs_are_missing_for_good_since_the_runs_before_them_failed(folder):
    """A teacher diverged with one seed: what learns of it, and what starts from that, has no record with this seed."""
    seed, file = VERSION.protocol.reporting_seeds[0], folder / records.FILE
    kept = []
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        study, arm = line["record"]["study"], line["record"]["study"]["arm"]
        its = study["stage"] == "reporting" and line["config"]["seed"] == seed
        if its and arm == conversion.TEACHER:
            line["record"] |= {"status": "failed", "reason": "not finite"}
            del line["record"]["results"]
        learns = next(each for each in VERSION.arms if each.name == arm).sources
        kept += [] if its and learns else [json.dumps(line)]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    runs = recorded(STUDY, VERSION, folder)
    learners = {arm.name: [*dict.fromkeys(arm.sources.values())] for arm in VERSION.arms if arm.sources}
    assert runs.stranded == learners
    said = STUDY.unfinished(runs)
    assert len(said) == len(learners)  # All others are done.
    name = f"{conversion.MIXERS[0]}: outputs"
    assert f"**Runs of {name} are missing for good**: they start from runs of attention, or learn of" in said[0]


def test_nothing_is_missing_for_good_while_the_runs_before_can_still_be_made(folder):
    file = folder / records.FILE
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
             if '"stage": "reporting"' not in line]  # fmt: skip
    file.write_text("".join(lines), encoding="utf-8")
    runs = recorded(STUDY, VERSION, folder)
    assert not runs.stranded
    assert len(STUDY.unfinished(runs)) == 1
