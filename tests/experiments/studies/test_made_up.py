"""Pages and verdicts of studies that train, from made-up records of all their arms."""

from __future__ import annotations

import pytest

from experiments.config.data import build_data
from experiments.studies import hybrid_ratio, needle, recall_state
from experiments.studies.page import how_to_run, recorded, results
from experiments.studies.protocol import Wanted
from experiments.studies.sweep import Composer
from experiments.sweeps.execute import resolve_composed
from experiments.util import plot_style
from experiments.util.plot_style import figure
from tests.support.compare_verdicts import compare
from tests.support.made_up import write_records

RECALL = {"8": 0.35, "20": 0.6, "64": 0.9}
BETTER = {"sliding_window": -0.2, "gla": -0.1, "mamba2": -0.12, "rwkv7": -0.1}
"""How much more a mixer recalls than others of its size."""

FAR = {"attention, rotary": 0.1, "attention, no positions": 0.5, "sliding_window": 0.1, "mamba2": 0.2,
       "delta_net": 0.7, "gated_delta_net": 0.66, "attention and mamba2": 0.85,
       "attention and gated_delta_net": 0.45}  # fmt: skip
"""The share of digits in texts longer than those of training."""


def recall(arm, split):
    if split == recall_state.LEARNT.split:
        return 0.27 if arm.name in ("mamba2, 20 KiB", "gla, 8 KiB") else 0.97
    if arm.name == "attention":
        return 0.3 if split == recall_state.BY_LENGTH[4096] else 0.95
    lost = 0.4 if split in (recall_state.BY_PAIRS[256], recall_state.MOST) else 0.0
    return max(RECALL[arm.factors["state"]] + BETTER.get(arm.factors["mixer"], 0.0) - lost, 0.01)


def recall_model(arm):
    width = {"grows": 64, "8": 32, "20": 64, "64": 128}[arm.factors["state"]]
    return {"name": arm.factors["mixer"], "pattern": arm.factors["mixer"], "d_model": width, "depth": 2}


def digits(arm, split):
    short = split in ("test", "test_512", "test_1024")
    return 0.99 if short and arm.name != "sliding_window" else FAR[arm.name]


def hybrid(arm, split):
    """Mamba-2 needs a layer of attention and the delta rule none; four are too many for it in long texts."""
    if split in (hybrid_ratio.LEARNT.split, "test"):
        return 0.97
    count, mixer = int(arm.factors["count"]), arm.factors["recurrence"]
    if count == hybrid_ratio.LAYERS:
        return 0.8
    if mixer == "mamba2":
        return (0.3 if count == 0 else 0.82) - 0.2 * (arm.factors["place"] == "before")
    return 0.75 if split == hybrid_ratio.BY_LENGTH[4096] else 0.85 + 0.03 * count


CASES = {
    "hybrid_ratio": (
        hybrid_ratio.HybridRatio(),
        (hybrid, {**dict.fromkeys(recall_state.BY_PAIRS.values(), 256),
                  **{split: length for length, split in recall_state.BY_LENGTH.items()}, recall_state.MOST: 4096},
         lambda arm: {"name": "x", "pattern": "attention"}, "mamba2, 4 of 8 behind"),
        {"mamba2: one layer helps": "yes", "mamba2: one layer is enough": "yes", "mamba2: far away, too": "yes",
         "mamba2: four are better": "unresolved", "mamba2: the place": "unresolved",
         "gated_delta_net: one layer is enough": "yes", "gated_delta_net: far away, too": "no",
         "gated_delta_net: four are better": "yes", "gated_delta_net: the place": "no"},
        ("Beside mamba2 that one layer of eight recalls as much of 256 pairs as eight is so, and that it stands better"
         " behind unresolved; beside gated_delta_net", "mamba2, 4 of 8 behind has 2 of 5 seeds",
         "sign flips against no difference"),
    ),
    "recall_state": (
        recall_state.RecallState(),
        (recall, {**dict.fromkeys(recall_state.BY_PAIRS.values(), 256),
                  **{split: length for length, split in recall_state.BY_LENGTH.items()}, recall_state.MOST: 4096},
         recall_model, "kda, 20 KiB"),
        {"gla: recall follows the state": "unresolved", "delta_net: recall follows the state": "yes",
         "the delta rule above GLA": "yes", "the gate above the delta rule": "no",
         "a decay per channel no worse": "unresolved", "the delta rule above Mamba-2": "unresolved",
         "as good as attention": "no", "a state above a window": "yes"},
        ("5 of 6 mixers recall more of 64 pairs", "kda, 20 KiB has 2 of 5 seeds", "| attention | 256 KiB | 1 x 64 | ",
         "Runs that did not learn (below 0.5 on test_64_pairs_4), whose scores decide nothing in favour of others: gla,"
         " 8 KiB (5 of 5), mamba2, 20 KiB (5 of 5).", "5 of 5 seeds of mamba2, 20 KiB did not learn",
         "| delta_net less gla | +0."),
    ),
    "needle": (
        needle.Needle(),
        (digits, {needle.split_of(length): length for length in needle.LENGTHS},
         lambda arm: {"name": "x", "pattern": "attention"}, "delta_net", True),
        {"no positions reach farther": "yes", "a layer of attention helps mamba2": "yes",
         "a layer of attention helps gated_delta_net": "no", "and is enough with mamba2": "yes",
         "the delta rule keeps what Mamba-2 loses": "unresolved", "as attention where trained": "yes"},
        ("more without positions than with rotary ones is so", "delta_net has 2 of 5 seeds",
         "| attention and mamba2 | 5 of 5 | 0 of 5 |"),
    ),
}  # fmt: skip
"""The study, its records, some of its verdicts, and what its page says."""


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Figures of few pixels, which take less time."""
    monkeypatch.setitem(plot_style.RULES, "savefig.dpi", 40)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    study, made, answers, said = CASES[request.param]
    write_records(study.versions["recorded"], tmp_path, *made)
    return study, answers, said, tmp_path


def test_the_page_and_the_verdicts_of_made_up_records(case):
    """Each verdict by code of its own too, every figure drawn, every table as wide as its header."""
    study, answers, said, folder = case
    version = study.versions["recorded"]
    found = compare(version, folder)
    assert {name: found[name] for name in answers} == answers
    runs = recorded(study, version, folder)
    page = results(study, runs, study.name) + how_to_run(study, runs)
    assert all(part in page for part in said), page
    for each in (*study.tables(runs), study.verdicts(runs)):
        assert {len(row) for row in each.rows} == {len(each.rows[0])}, each.title
    for each in study.figures(runs):
        with figure([folder / f"{each.name}.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (folder / f"{each.name}.png").stat().st_size > 5_000


@pytest.mark.parametrize("study", [case[0] for case in CASES.values()], ids=CASES)
def test_before_its_last_runs_a_study_has_a_page_too(study, tmp_path):
    """With tuning alone on record: nothing is decided, and the figures are empty."""
    made = next(case[1] for case in CASES.values() if case[0] is study)
    write_records(study.versions["recorded"], tmp_path, *made)
    file = tmp_path / "records.jsonl"
    tuning = [line for line in file.read_text().splitlines(keepends=True) if '"tuning"' in line]
    file.write_text("".join(tuning[:-1]))
    runs = recorded(study, study.versions["recorded"], tmp_path)
    assert "0 of " in study.unfinished(runs)[0]
    assert set(compare(study.versions["recorded"], tmp_path).values()) == {"unresolved"}
    for each in study.figures(runs):
        with figure([tmp_path / f"{each.name}.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)


@pytest.mark.parametrize("name", CASES)
def test_what_the_splits_are_called_and_who_is_tested_on_them(name, tmp_path):
    """Reporting runs alone are tested beyond the task's own options."""
    study, (_, splits, *_), *_ = CASES[name]
    composer = Composer(study.versions["recorded"], tmp_path)
    arm = study.versions["recorded"].arms[0].name
    tested = {stage: set(build_data(resolve_composed(composer(Wanted(arm, stage, 1e-3, 0, 600)))).tests)
              for stage in ("tuning", "reporting", "doubled")}  # fmt: skip
    assert tested == {"tuning": {"test"}, "reporting": set(splits), "doubled": {"test"}}
