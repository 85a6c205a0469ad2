"""The study of rates over widths: regrets and verdicts from made-up records, by code of its own too."""

from __future__ import annotations

import json
import statistics
from itertools import product

import pytest

from experiments.studies import plan, records
from experiments.studies.mup import KINDS, MARGIN, MODELS, WIDTHS, Mup, transfers
from experiments.studies.page import how_to_run, recorded, results
from experiments.studies.protocol import rate_of
from experiments.util import plot_style
from experiments.util.plot_style import figure

STUDY = Mup()
VERSION = STUDY.versions["recorded"]
SEEDS = VERSION.protocol.tuning_seeds


def bits(kind: str, width: int, rate: int, seed: int) -> float:
    """A parabola around the best rate, which falls with the width unless muP carries it over."""
    best = -4 if kind == "muP" or width == WIDTHS[0] else -5
    return 3 - width / 1000 + 0.2 * (rate - best) ** 2 + 0.01 * seed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(plot_style.RULES, "savefig.dpi", 40)
    lines = []
    for arm, rate, seed in product(VERSION.arms, VERSION.protocol.rates, SEEDS):
        value = bits(arm.factors["kind"], int(arm.factors["width"]), rate, seed)
        failed = arm.name == "rg_lru, standard, 256" and rate == -4
        record = {
            "status": "failed" if failed else "finished",
            "study": {"arm": arm.name, "stage": "tuning", "plan": VERSION.plan},
            **({"reason": "not finite"} if failed else {"results": {"validation": value, "test": value}}),
            "metric": {"name": "bits", "unit": "bits", "higher_is_better": False},
            "cost": {"steps": 200, "processor_seconds": 9.0},
            "code": {"commit": "0" * 40, "dirty": False},
            "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
            "environment": {"python": "3", "torch": "2"},
        }  # fmt: skip
        config = {"experiment": "x", "seed": seed, "model": {}, "task": {}, "train": {"lr": rate_of(rate)}}
        lines.append({"format": 2, "run": "run", "config": config, "record": record, "metrics": []})
    (tmp_path / records.FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    plan.settle(VERSION, tmp_path, recorded=False)
    return tmp_path


def test_what_the_narrow_rate_costs_the_wide_model(folder):
    found = {(each.model, each.kind): each for each in transfers(recorded(STUDY, VERSION, folder))}
    assert [*found] == [*product(MODELS, KINDS)]
    for (model, kind), each in found.items():
        if (model, kind) == ("rg_lru", "standard"):
            assert each.verdict.answer == "unresolved"
            assert "was not tried, or failed, at 0.01" in each.verdict.reason
            continue
        best = {width: min(VERSION.protocol.rates, key=lambda rate: sum(bits(kind, width, rate, s) for s in SEEDS))
                for width in WIDTHS}  # fmt: skip
        assert each.rates == tuple(best.values())
        wide = WIDTHS[-1]
        costs = [bits(kind, wide, best[WIDTHS[0]], s) / bits(kind, wide, best[wide], s) - 1 for s in SEEDS]
        assert each.regret.estimate == pytest.approx(statistics.fmean(costs))
        assert each.verdict.answer == ("yes" if statistics.fmean(costs) < MARGIN else "no")


def test_its_page(folder):
    runs = recorded(STUDY, VERSION, folder)
    assert not STUDY.unfinished(runs)
    page = results(STUDY, runs, STUDY.name) + how_to_run(STUDY, runs)
    assert "muP: the narrow model's rate costs the wide one less than 2% for 6 of 6 models" in page
    assert "| attention | standard | 0.01, 0.003, 0.003 | +7.3% " in page, page
    assert "Failed runs: 3 of" in page
    for each in STUDY.figures(runs):
        with figure([folder / f"{each.name}.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (folder / f"{each.name}.png").stat().st_size > 5_000
