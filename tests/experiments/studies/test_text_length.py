"""The study of text beyond the training length: verdicts, tables and page from made-up records, and its programs."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest

from experiments.config.data import build_data
from experiments.studies import plan, records, text_length
from experiments.studies.page import how_to_run, recorded, results
from experiments.studies.protocol import Wanted, rate_of
from experiments.studies.sweep import Composer
from experiments.studies.text_programs import FILE, Program, between, measure
from experiments.sweeps.execute import resolve_composed
from experiments.tasks.byte_text import ByteText, position_bins
from experiments.util import plot_style
from experiments.util.errors import RunnerError
from experiments.util.items import encode_items
from experiments.util.plot_style import figure
from tests.support.compare_verdicts import compare

STUDY = text_length.TextLength()
VERSION = STUDY.versions["recorded"]
LENGTH, FILES, DATA = 32768, 12, "d" * 64
WIDTHS = np.diff(position_bins(LENGTH))
EASE = np.linspace(-0.3, 0.3, FILES).tolist()
"""What each file takes more than the mean."""

FAR = {"attention, rotary": 2.9, "sliding_window": 2.3, "mamba2": 2.25, "gated_delta_net": 2.2,
       "gated_delta_net, passed states": 2.15, "attention and gated_delta_net": 2.21}  # fmt: skip
"""Bits per byte from 1024 bytes on; before, all take 2.5."""


def along(arm: str) -> np.ndarray:
    return np.where(np.array(position_bins(LENGTH)[:-1]) < 1024, 2.5, FAR[arm])


def line(arm: str, stage: str, rate: int, seed: int) -> dict[str, object]:
    draws = np.random.default_rng([seed, len(arm)])
    curve = along(arm) + 0.05 * abs(rate + 5) + 0.004 * draws.standard_normal()
    items = np.average(curve, weights=WIDTHS) + np.array(EASE) + 0.002 * draws.standard_normal(FILES)
    shown = {"x": [*range(1, len(curve) + 1)], "y": curve.tolist(), "x_end": LENGTH, "trained_to": 1024}
    bits = {"test": float(items.mean()), "validation": float(curve[0]), "items": encode_items(items), "curve": shown}
    record = {
        "status": "finished",
        "study": {"arm": arm, "stage": stage, "plan": VERSION.plan},
        "results": bits,
        "metric": {"name": "bits_per_byte", "unit": "bits/byte", "higher_is_better": False},
        "data": {"hash": DATA},
        "model": {"parameters": 283_000, "state_bytes": 81_000},
        "cost": {"steps": 1000, "processor_seconds": 9.0},
        "code": {"commit": "0" * 40, "dirty": False},
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "environment": {"python": "3", "torch": "2"},
    }
    config = {
        "experiment": "x",
        "seed": seed,
        "model": {"pattern": "mamba2"},
        "task": {},
        "train": {"lr": rate_of(rate)},
    }
    return {"format": 2, "run": "run", "config": config, "record": record, "metrics": []}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(plot_style.RULES, "savefig.dpi", 40)
    protocol = VERSION.protocol
    lines = [line(arm.name, "tuning", rate, 100) for arm in VERSION.arms for rate in protocol.rates]
    lines += [line(arm.name, "reporting", -5, seed) for arm in VERSION.arms for seed in protocol.reporting_seeds]
    (tmp_path / records.FILE).write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    plan.settle(VERSION, tmp_path, recorded=False)
    programs = [asdict(Program(name, name, LENGTH, tuple((level + each,) * len(WIDTHS) for each in EASE)))
                for name, level in (("gzip", 2.4), ("ngram", 2.19))]  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps({"data": DATA, "programs": programs}), encoding="utf-8")
    return tmp_path


def test_the_page_and_the_verdicts_of_made_up_records(folder):
    assert compare(VERSION, folder) == {
        "a recurrence outlasts rotary positions": "yes",
        "so does Mamba-2": "yes",
        "the delta rule above Mamba-2": "yes",
        "a state tells more than a window": "yes",
        "passed states cost nothing": "yes",
        "passed states help": "yes",
        "a layer of attention helps": "no",
    }
    runs = recorded(STUDY, VERSION, folder)
    page = results(STUDY, runs, STUDY.name) + how_to_run(STUDY, runs)
    assert (
        "1 of 6 arms take fewer bits than every compressor and the n-grams, by more than 0.02; the best of these,"
        in page
    )
    assert "| ngram | 2.190 | 2.190 | 2.190 | 2.190 |" in page
    assert not STUDY.unfinished(runs)
    for each in STUDY.tables(runs):
        assert {len(row) for row in each.rows} == {len(each.rows[0])}, each.title
    for each in STUDY.figures(runs):
        with figure([folder / "drawn.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (folder / "drawn.png").stat().st_size > 5_000


def test_bands_and_programs_are_means_over_bytes(folder):
    runs = recorded(STUDY, VERSION, folder)
    bits, beside = STUDY.tables(runs)
    header, *rows = bits.rows
    assert header == ["", "0 to 1,024", "1,024 to 8,192", "8,192 to 32,768", "whole files"]
    found = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows}
    for arm, far in FAR.items():
        assert found[arm] == pytest.approx([2.5, far, far, (1024 * 2.5 + (LENGTH - 1024) * far) / LENGTH], abs=0.012)
    answers = {row[0]: [cell.rpartition(": ")[2].strip("*") for cell in row[1:]] for row in beside.rows[1:]}
    assert answers["gated_delta_net"] == ["yes", "no"]
    assert answers["attention, rotary"] == ["no", "no"]


def test_programs_of_other_files_than_the_runs_are_refused(folder):
    kept = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**kept, "data": "e" * 64}))
    with pytest.raises(RunnerError, match=r"programs.json is of the data e{16}, and there are runs of d{16}"):
        recorded(STUDY, VERSION, folder)


def test_what_programs_take_is_measured_once_and_on_the_files_of_the_runs(tmp_path):
    version = STUDY.versions["small"]
    measure(version, tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    config = resolve_composed(Composer(version, tmp_path)(Wanted(version.arms[0].name, "reporting", 1e-3, 0)))
    task = build_data(config).task
    assert isinstance(task, ByteText)
    assert kept["data"] == task.manifest()["hash"]
    programs = {each["name"]: Program(**each) for each in kept["programs"]}
    sizes = [len(gzip.compress(test.tobytes(), 9)) for test in task.held_out()]
    assert programs["gzip"].per_file == pytest.approx([8 * size / task.longest for size in sizes], rel=1e-5)
    assert "5,120 bytes of training text" in programs["ngram"].label  # 20 steps of 4 windows of 64 bytes.
    edges = position_bins(task.longest)
    halves = [between(programs["ngram"].along, task.longest, low, high) for low, high in pairwise([0, 64, 512])]
    assert np.average(halves, weights=[64, 448]) == pytest.approx(programs["ngram"].per_file.mean())
    assert len(programs["ngram"].along) == len(edges) - 1
    before = (tmp_path / FILE).stat().st_mtime_ns
    measure(version, tmp_path)
    assert (tmp_path / FILE).stat().st_mtime_ns == before
