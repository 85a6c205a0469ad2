"""The study of scaling: exponents, verdicts and page from made-up records of known power laws."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from experiments.config.data import build_data
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import RecordedRun
from experiments.studies import plan, records, scaling
from experiments.studies.page import how_to_run, recorded, results
from experiments.studies.protocol import Arm, Wanted, rate_of
from experiments.studies.records import shortened
from experiments.studies.sweep import Composer
from experiments.sweeps.execute import resolve_composed
from experiments.util import plot_style
from experiments.util.items import encode_items
from experiments.util.plot_style import figure
from tests.support.compare_verdicts import compare

STUDY = scaling.Scaling()
VERSION = STUDY.versions["recorded"]
EXPONENTS = {"attention": 0.1, "mamba2": 0.105, "gated_delta_net": 0.13, "attention and gated_delta_net": 0.09}
LEVELS = {"attention": 6.0, "mamba2": 6.6, "gated_delta_net": 8.4, "attention and gated_delta_net": 6.2}


def bits(model: str, size: int, seed: int) -> float:
    draw = np.random.default_rng([seed, size, len(model)]).standard_normal()
    return LEVELS[model] * size ** -EXPONENTS[model] * (1 + 0.002 * draw)


def line(arm: Arm, config: dict[str, Any], stage: str, rate: int, seed: int) -> dict[str, Any]:
    width = int(arm.factors["width"])
    value = bits(arm.factors["model"], 32 * width**2, seed) + 0.1 * abs(rate + 5)
    record = {
        "status": "finished",
        "study": {"arm": arm.name, "stage": stage, "plan": VERSION.plan},
        "results": {"test": value, "validation": value, "items": encode_items(value + np.linspace(-0.2, 0.2, 64))},
        "metric": {"name": "bits_per_byte", "unit": "bits/byte", "higher_is_better": False},
        "model": {"parameters": 1, "state_bytes": 1},
        "cost": {"steps": 90, "processor_seconds": 9.0},
        "code": {"commit": "0" * 40, "dirty": False},
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "environment": {"python": "3", "torch": "2"},
    }
    own = {**config, "seed": seed, "train": {**config["train"], "lr": rate_of(rate)}}
    return {"format": 2, "run": "run", "config": own, "record": record, "metrics": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every arm with layers of attention, which is what a law sees of them: their number of parameters."""
    where, protocol, lines = tmp_path_factory.mktemp("scaling"), VERSION.protocol, []
    given = shortened(resolve_composed(Composer(VERSION, where)(Wanted(VERSION.arms[0].name, "reporting", 1e-3, 0))))
    for arm in VERSION.arms:
        width = int(arm.factors["width"])
        wider = {"d_model": width, "channels": {"swiglu": {"hidden": 4 * width}}, "mixers": {}}
        config = {**given, "model": {**given["model"], **wider}}
        lines += [line(arm, config, "tuning", rate, 100) for rate in protocol.rates]
        lines += [line(arm, config, "reporting", -5, seed) for seed in protocol.reporting_seeds]
    (where / records.FILE).write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    plan.settle(VERSION, where, recorded=False)
    return where


@pytest.mark.parametrize("name", ["mamba2, 16", "attention and gated_delta_net, 96"])
def test_an_arm_has_its_parameters_and_reads_in_proportion(name, tmp_path):
    config = resolve_composed(Composer(VERSION, tmp_path)(Wanted(name, "reporting", 1e-3, 0)))
    run = RecordedRun(RunFolder(tmp_path), shortened(config), {})
    asked = scaling.PER_WIDTH * config.model.options.d_model**2
    assert scaling.size_of(run) == pytest.approx(asked, rel=0.03)
    read = config.train.steps * config.train.batch_size * build_data(config).task.length
    assert read == pytest.approx(scaling.READ * asked, rel=0.01)


def test_the_exponents_and_what_follows_from_them(folder):
    runs = recorded(STUDY, VERSION, folder)
    found = {law.model: law for law in scaling.laws(runs)}
    for model, exponent in EXPONENTS.items():
        assert found[model].interval.estimate == pytest.approx(exponent, abs=0.002)
        assert 0 < found[model].interval.high - found[model].interval.low < 0.01
        assert found[model].worst < 0.01
        assert not found[model].lacking
    answers = {law.model: decided.answer for law, _, decided in scaling.steeper(runs)}
    assert answers == {"mamba2": "no", "gated_delta_net": "yes", "attention and gated_delta_net": "no"}


def test_its_verdicts_and_its_page(folder, monkeypatch):
    monkeypatch.setitem(plot_style.RULES, "savefig.dpi", 40)
    compare(VERSION, folder)
    runs = recorded(STUDY, VERSION, folder)
    assert not STUDY.unfinished(runs)
    page = results(STUDY, runs, STUDY.name) + how_to_run(STUDY, runs)
    assert (
        "by more than 0.01: mamba2 no faster; gated_delta_net faster; attention and gated_delta_net no faster." in page
    )
    for each in STUDY.tables(runs):
        assert {len(row) for row in each.rows} == {len(each.rows[0])}, each.title
    for each in STUDY.figures(runs):
        with figure([folder / "drawn.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (folder / "drawn.png").stat().st_size > 5_000


def test_before_three_sizes_are_there_nothing_is_said_of_a_model(folder, tmp_path):
    """Of attention two sizes are on record; of the others all, which cannot be compared with it."""
    lines = (folder / records.FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    gone = [f'"arm": "attention, {width}"' for width in scaling.WIDTHS[2:]]
    kept = [each for each in lines if not any(name in each for name in gone)]
    (tmp_path / records.FILE).write_text("".join(kept), encoding="utf-8")
    plan.settle(VERSION, tmp_path, recorded=False)
    runs = recorded(STUDY, VERSION, tmp_path)
    assert [law.model for law in scaling.laws(runs)] == [model for model in EXPONENTS if model != "attention"]
    assert not scaling.steeper(runs)
    assert "nothing is known yet" in STUDY.answer(runs)
