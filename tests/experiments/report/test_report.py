from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.config.schema import FORMAT, TrainConfig
from experiments.report import write as report_module
from experiments.report.__main__ import main
from experiments.report.checks import comparable_runs
from experiments.report.comparison import compare
from experiments.report.figures import bytes_text, curves, draw_cost, draw_curve, line_style, strokes
from experiments.report.page import table_rows
from experiments.report.write import report
from experiments.util.errors import RunnerError
from experiments.util.plot_style import (
    COLOURS,
    RESERVE,
    RULES,
    family,
    pattern_channels,
    pattern_mixers,
    spread,
)
from seqarch.layers import FAMILIES, MIXERS


def record_run(root: Path, model: str, seed: int, test: float, *, pattern=None, experiment="recall", lr=3e-3,
               validation=None, status="finished", curve=None, depth=2, decay=0.1, mixers=None,
               **task) -> Path:  # fmt: skip
    """A run folder as the runner leaves it."""
    folder = root / experiment / f"{model}-seed{seed}-{lr}-{depth}-{decay}-{mixers}-{task}"
    folder.mkdir(parents=True)
    higher = curve is None
    metric = {
        "name": "accuracy" if higher else "bits_per_byte",
        "label": "Recall accuracy" if higher else "Bits per byte",
        "unit": "" if higher else "bits/byte",
        "higher_is_better": higher,
        "chance": 0.125 if higher else 4.7,
        "chance_label": "guessing",
    }
    config = {
        "format": FORMAT,
        "experiment": experiment,
        "seed": seed,
        "runs": str(root),
        "model": {"name": model, "pattern": pattern or model, "d_model": 64, "depth": depth} | {"mixers": mixers or {}},
        "task": {"name": "mqar", "length": 64, **task},
        "train": {"lr": lr, "weight_decay": decay},
    }
    record = {
        "format": FORMAT,
        "status": status,
        "name": folder.name,
        "command": "python -m experiments.run --multirun experiment=recall",
        "code": {"commit": "a" * 40, "dirty": False},
        "environment": {"python": "3.11.7", "packages": {"torch": "2.13.0"}},
        "hardware": {"cpu": "A CPU", "cores": 2, "threads": 1},
        "data": {"task": "mqar", "source": "generated", "hash": "ab" * 32},
        "task": {"title": "Associative recall", "reading": "Read it like this."},
        "metric": metric,
        "model": {"parameters": 67264, "state_bytes": 70144 if "attention" in model else 20000, "state_length": 64},
        "cost": {"steps": 20, "flops": 2.9e10, "flops_formula": "three forwards", "tokens_per_second": 31000.0},
    }
    if status == "finished":
        record["results"] = {"test": test, "validation": test if validation is None else validation}
        if curve:
            record["results"]["curve"] = curve
    else:
        record["reason"] = "the loss is nan"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, f"validation_{metric['name']}": test * step / 20} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def curve(level: float) -> dict:
    x = [float(2**power) for power in range(13)]
    y = [level - 0.1 * power for power in range(13)]
    return {"x": x, "y": y, "x_end": 4096, "x_label": "Position in the file", "x_unit": "bytes", "trained_to": 512}


@pytest.fixture
def recorded(tmp_path) -> Path:
    for seed in (0, 1, 2):
        record_run(tmp_path, "attention", seed, 0.99 + seed / 300)
        record_run(tmp_path, "hybrid", seed, 0.95 + seed / 100, pattern="attention mamba2/moe")
        record_run(tmp_path, "linear_attention", seed, 0.12 + seed / 100)
    for model, level in (("attention", 3.5), ("mamba2", 3.4), ("delta_net", 3.39)):
        record_run(tmp_path, model, 0, level, experiment="text", curve=curve(level))
    return tmp_path


def test_the_whole_report(recorded, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(recorded)])
    assert main() == 0
    target = recorded / "report"
    stems = ["overview"]
    stems += [f"recall-{kind}" for kind in ("ranking", "training", "state")]
    stems += [f"text-{kind}" for kind in ("position", "ranking", "training", "state")]
    expected = {
        "owner.json",
        "index.md",
        "results.csv",
        "explorer.html",
        *(f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")),
    }
    assert {path.name for path in target.iterdir()} == expected
    image = plt.imread(target / "overview.png")
    assert image.shape[1] > 1500
    assert image[..., :3].std() > 0.05
    page = (target / "index.md").read_text()
    for words in ("![", "| attention | 0.993 (0.990 to 0.997) | 3 of 3 |", "ab" * 32, "python -m experiments.run",
                  "Read it like this.", "A CPU, 2 cores", "0.125 (guessing)", "68.5 KiB"):  # fmt: skip
        assert words in page
    plots = [part.partition(")")[0] for part in page.split("](")[1:]]
    assert all((target / plot).exists() for plot in plots)
    shown = capsys.readouterr().out
    assert "attention" in shown
    assert "0.993 (0.990 to 0.997)" in shown
    assert str(target / "index.md") in shown


def test_the_same_runs_draw_the_same_bytes(recorded, tmp_path):
    before = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (comparison,) = compare([run for run in comparable_runs(recorded)[0] if run.config["experiment"] == "text"])
        report_module.draw(comparison, tmp_path / name)
        drawn = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert drawn == (before or drawn)
        before = drawn
    assert len(before) == 8


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take seconds, and some tests read the text alone."""
    monkeypatch.setattr(report_module, "draw", lambda comparison, target: [(comparison.name, "nothing")])
    monkeypatch.setattr(report_module, "draw_overview", lambda comparisons, target: None)


@pytest.mark.usefixtures("undrawn")
def test_results_csv_has_a_line_a_run_with_failures(recorded):
    record_run(recorded, "mamba2", 1, 0.0, status="failed")
    report(recorded)
    rows = list(csv.DictReader((recorded / "report" / "results.csv").read_text().splitlines()))
    assert len(rows) == 13
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert (failed["model"], failed["reason"], failed["test"]) == ("mamba2", "the loss is nan", "")
    assert {row["state_bytes"] for row in rows if row["model"] == "hybrid"} == {"20000"}


@pytest.mark.usefixtures("undrawn")
def test_missing_failed_and_damaged_runs_are_reported(recorded, capsys, monkeypatch):
    record_run(recorded, "delta_net", 0, 0.9)
    record_run(recorded, "delta_net", 1, 0.9, status="failed")
    record_run(recorded, "retention", 0, 0.9, status="running")
    damaged = record_run(recorded, "mamba", 0, 0.9)
    (damaged / "run.json").write_text("{")
    hollow = record_run(recorded, "mamba", 1, 0.9)
    (hollow / "run.json").write_text(json.dumps({"format": FORMAT, "status": "finished", "results": {"test": 1}}))
    foreign = recorded / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"a": 1}')
    untitled = record_run(recorded, "rwkv", 0, 0.9)
    record = json.loads((untitled / "run.json").read_text())
    (untitled / "run.json").write_text(json.dumps({**record, "task": None}))
    rateless = record_run(recorded, "rwkv", 1, 0.9)
    (rateless / "config.json").write_text((rateless / "config.json").read_text().replace('"lr"', '"rate"'))
    garbled = record_run(recorded, "rwkv", 2, 0.9)
    with open(garbled / "metrics.jsonl", "a") as file:
        file.write('{"step": 5 oops}\n{"step": 6}\n')
    (recorded / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    folder = record_run(recorded, "rwkv", 3, 0.9)
    (folder / "config.json").write_text("[1]")
    odd = record_run(recorded, "rwkv", 4, 0.9, curve={**curve(1.0), "y": [1.0]})
    monkeypatch.setattr("sys.argv", ["report", str(recorded)])
    assert main() == 1
    terminal = capsys.readouterr().out
    target = recorded / "report"
    page = (target / "index.md").read_text()
    for words in ("delta_net, seed 1: failed, the loss is nan", "delta_net, seed 2: missing", "1 of 3, 1 failed",
                  "retention, seed 0: running", "| retention | none finished", str(damaged), str(hollow),
                  f"{foreign}: its config.json is not that of a run"):  # fmt: skip
        assert words in page
    for words in (f"cannot read {damaged}", f"{hollow}: its record is damaged, it lacks results.validation",
                  f"{untitled}: its record is damaged, it lacks task.title", f"{rateless}: its config.json is not that",
                  f"line 3 of {garbled}", f"cannot read {recorded / 'closed'}: Permission denied",
                  f"cannot read {folder / 'config.json'}: expected a JSON object",
                  f"{odd}: its record is damaged, results.curve is no curve: x and y are not"):  # fmt: skip
        assert words in page
        assert f"not read: {words}" in terminal


def test_the_learning_rate_is_chosen_on_validation(tmp_path):
    for lr, validation, test in ((1e-3, 0.5, 0.9), (3e-3, 0.8, 0.7)):
        for seed in (0, 1):
            record_run(tmp_path, "attention", seed, test, lr=lr, validation=validation)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    (setting,) = comparison.settings
    assert [run.config["train"]["lr"] for run in setting.runs] == [3e-3, 3e-3]
    assert table_rows(comparison)[1][-1] == "0.003 (of 0.001, 0.003)"
    assert table_rows(comparison)[1][1] == "0.700 (0.700 to 0.700)"


@pytest.mark.usefixtures("undrawn")
def test_every_grid_is_shown_and_every_failure_reported(tmp_path, capsys, monkeypatch):
    """Those of the settings that were not chosen, too: they are half of the selection."""
    for decay in (0.0, 0.1):
        for lr in (1e-3, 1e-2):
            failed = {"status": "failed"} if (lr, decay) == (1e-2, 0.1) else {}
            for seed in (0, 1):
                record_run(tmp_path, "attention", seed, 0.5 + lr + decay, lr=lr, decay=decay, **failed)
    for index in range(9):
        record_run(tmp_path, "mamba2", 0, 0.5, lr=index / 1000)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    assert main() == 0
    terminal, page = capsys.readouterr().out, (tmp_path / "report" / "index.md").read_text()
    assert "| 0.001 (of 0.001, 0.01) | 0.1 (of 0, 0.1) |" in page
    assert "| 0 (of 9 values from 0 to 0.008) | 0.1 |" in page
    assert "chose among them (learning rate 10 values from 0 to 0.01; weight decay 0, 0.1)" in page
    for seed in (0, 1):
        remark = f"attention, not chosen: learning rate 0.01, weight decay 0.1, seed {seed}: failed, the loss is nan"
        assert remark in page
        assert remark in " ".join(terminal.split())
    assert " LR " in terminal
    assert " WD" in terminal
    assert "…" not in terminal


@pytest.mark.usefixtures("undrawn")
def test_each_task_of_a_folder_is_a_comparison_of_its_own(tmp_path):
    """With its own title, chance level and choice of rates; equal options count as equal however they are given."""
    for seed, given in ((0, {}), (1, {"power": 0.01, "pairs": 4})):
        record_run(tmp_path, "attention", seed, 0.9, **given)
    other = record_run(tmp_path, "attention", 0, 0.6, pairs=8)
    parity = record_run(tmp_path, "attention", 0, 0.7, name="parity")
    for folder, title, chance in ((other, "Associative recall", 0.125), (parity, "Parity of a stream of bits", 0.5)):
        record = json.loads((folder / "run.json").read_text())
        record["metric"]["chance"], record["task"]["title"] = chance, title
        (folder / "run.json").write_text(json.dumps(record))
    comparisons = compare(comparable_runs(tmp_path)[0])
    assert [(each.name, each.title, each.seeds, each.sample["metric"]["chance"], each.remarks)
            for each in comparisons] == [
        ("recall, mqar (pairs=4)", "Associative recall (pairs=4)", [0, 1], 0.125, []),
        ("recall, mqar (pairs=8)", "Associative recall (pairs=8)", [0], 0.125, []),
        ("recall, parity", "Parity of a stream of bits", [0], 0.5, []),
    ]  # fmt: skip
    page = (report(tmp_path)[0] / "index.md").read_text()
    assert page.startswith("# Associative recall (pairs=4) and Associative recall (pairs=8) and Parity of")
    assert "chance is 0.5 (guessing)" in page
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").read_text().splitlines()))
    assert [row["task"] for row in rows].count("parity") == 1


def test_no_two_comparisons_share_their_plots(tmp_path):
    for experiment in ("a/b", "a-b"):
        record_run(tmp_path, "attention", 0, 0.9, experiment=experiment)
    assert {each.name: each.stem for each in compare(comparable_runs(tmp_path)[0])} == {"a-b": "a-b", "a/b": "a-b-2"}


def test_equal_options_are_one_setting_and_a_run_counts_once(tmp_path):
    given = [(0, {}), (1, {"attention": {"rotary_base": 10000}}), (1, {"attention": {"rotary_base": 1e4}})]
    folders = [record_run(tmp_path, "attention", seed, 0.9, mixers=mixers) for seed, mixers in given]
    record_run(tmp_path, "attention", 2, 0.9, mixers={"attention": {"rotary_base": 500}})
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    assert {setting.label: len(setting.runs) for setting in comparison.settings} == {
        "attention (rotary_base=10000.0)": 2,
        "attention (rotary_base=500.0)": 1,
    }
    (twice,) = [remark for remark in comparison.remarks if "twice" in remark]
    assert all(str(folder) in twice for folder in folders[1:])


def test_a_rate_that_fails_on_most_seeds_is_not_chosen_for_the_seed_it_survives(tmp_path):
    for seed in (0, 1, 2):
        record_run(tmp_path, "attention", seed, 0.6, lr=1e-3)
        record_run(tmp_path, "attention", seed, 0.9, lr=1e-2, status="finished" if seed == 1 else "failed")
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    assert {run.config["train"]["lr"] for run in comparison.settings[0].runs} == {1e-3}


def test_results_that_are_no_numbers_count_as_failures(tmp_path):
    """JSON of this kind says NaN; nothing is drawn of it, and no rate is chosen for the seeds on which it is not."""
    for seed in (0, 1, 2):
        record_run(tmp_path, "attention", seed, 0.6, lr=1e-3)
        record_run(tmp_path, "attention", seed, 0.9 if seed == 1 else float("nan"), lr=1e-2)
        record_run(tmp_path, "mamba2", seed, 0.5 if seed else float("inf"))
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    assert [setting.tuned("train.lr") for setting in comparison.settings] == [1e-3, 3e-3]
    assert table_rows(comparison)[2][1:3] == ["0.500 (0.500 to 0.500)", "2 of 3, 1 failed"]
    assert "mamba2, seed 0: finished, its results are {'test': inf, 'validation': inf}" in comparison.remarks
    report_module.draw(comparison, tmp_path)


def test_an_option_of_training_at_its_default_is_as_one_that_is_left_out(tmp_path):
    """As in runs from before there was the option, which their configuration does not name."""
    folders = [record_run(tmp_path, "attention", seed, 0.9) for seed in (0, 1)]
    folders.append(record_run(tmp_path, "attention", 0, 0.5, depth=4))
    file = folders[1] / "config.json"
    config = json.loads(file.read_text())
    given = {"bptt": TrainConfig.bptt, "schedule": TrainConfig.schedule, "log_every": 3}
    file.write_text(json.dumps({**config, "train": {**config["train"], **given}}))
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    runs = {setting.label: len(setting.runs) for setting in comparison.settings}
    assert runs == {"attention (depth=2)": 2, "attention (depth=4)": 1}
    file.write_text(json.dumps({**config, "train": {**config["train"], "schedule": "wsd"}}))
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    labels = {each.label for each in comparison.settings}
    assert {"attention (depth=2, schedule=cosine)", "attention (depth=2, schedule=wsd)"} < labels


def test_settings_of_a_model_are_kept_apart_by_what_differs(tmp_path):
    for depth in (2, 4):
        record_run(tmp_path, "attention", 0, depth / 10, depth=depth)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    assert [setting.label for setting in comparison.settings] == ["attention (depth=4)", "attention (depth=2)"]


def test_what_a_run_was_trained_on_is_its_setting_and_what_it_is_tested_on_its_task(tmp_path):
    mixture = {"train_on": [{"pairs": 1}, {"pairs": 2}], "order": "mixture"}
    for number, given in enumerate(({}, mixture, {"test_on": [{"pairs": 8}]})):
        record_run(tmp_path, "attention", 0, number / 10, **given)
    one, other = compare(comparable_runs(tmp_path)[0])
    assert [setting.label for setting in one.settings] == [
        "attention (order=mixture, train_on=[{'pairs': 1}, {'pairs': 2}])",
        "attention",
    ]
    assert [setting.label for setting in other.settings] == ["attention"]
    assert other.distinction == "test_on=[{'pairs': 8}]"


def test_less_is_better_where_the_metric_says_so(recorded):
    recall, text = compare(comparable_runs(recorded)[0])
    assert [setting.label for setting in recall.settings] == ["attention", "hybrid", "linear_attention"]
    assert [setting.label for setting in text.settings] == ["delta_net", "mamba2", "attention"]


@pytest.mark.parametrize("prepare", ["nothing", "empty", "unfinished"])
def test_nothing_to_report_is_one_clear_error(tmp_path, prepare, capsys, monkeypatch):
    root = tmp_path / "runs"
    if prepare != "nothing":
        root.mkdir()
    if prepare == "unfinished":
        record_run(root, "attention", 0, 0.5, status="interrupted")
    monkeypatch.setattr("sys.argv", ["report", str(root)])
    assert main() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(root) in message
    expected = {"nothing": "is no folder", "empty": "no recorded run", "unfinished": "seed 0: interrupted"}
    assert expected[prepare] in message


def test_a_report_that_cannot_be_written_is_named(recorded):
    (recorded / "report").write_text("mine")
    with pytest.raises(RunnerError, match=r"cannot write .*report"):
        report(recorded)


@pytest.mark.parametrize("name", ["index.md", "recall-state.png", "notes.txt"])
def test_a_report_is_written_among_no_others_files(recorded, name):
    (recorded / "report").mkdir()
    (recorded / "report" / name).write_text("mine")
    with pytest.raises(RunnerError, match=rf"report holds {name} and is no report"):
        report(recorded)
    assert {path.name: path.read_text() for path in (recorded / "report").iterdir()} == {name: "mine"}


def test_no_report_is_written_through_a_link(recorded, tmp_path):
    (tmp_path / "mine").mkdir()
    (recorded / "report").symlink_to(tmp_path / "mine")
    with pytest.raises(RunnerError, match="report is a link"):
        report(recorded)
    assert not list((tmp_path / "mine").iterdir())


def test_a_report_is_written_again_whoever_wrote_it_before(recorded, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(b"drawn"))
    target = report(recorded)[0]
    marker, page = target / "owner.json", (target / "index.md").read_bytes()
    for left in (marker, target / "index.md"):  # As reports were before, or as one that was killed left it.
        left.unlink()
        report(recorded)
        assert marker.exists()
        assert (target / "index.md").read_bytes() == page


def test_models_without_a_state_and_without_a_curve_are_drawn(tmp_path):
    """0 bytes have no place on a logarithmic axis, and a run of another version may lack its curve."""
    for seed in (0, 1):
        record_run(tmp_path, "mamba2", seed, 3.4, curve=curve(3.4))
        record_run(tmp_path, "attention", seed, 3.5, curve=curve(3.5))
    for path in tmp_path.glob("recall/*seed0*/run.json"):
        record = json.loads(path.read_text())
        record["model"]["state_bytes"] = 0 if "mamba2" in str(path) else 4096
        if "mamba2" in str(path):
            del record["results"]["curve"]
        path.write_text(json.dumps(record))
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    drawing, axes = plt.subplots()
    draw_cost(axes, comparison)
    drawing.draw_without_rendering()
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks()]
    assert "0 B" in shown
    assert "4 KiB" in shown
    assert [(setting.label, len(own)) for setting, own in curves(comparison)] == [("mamba2", 1), ("attention", 2)]
    draw_curve(axes, comparison)
    plt.close(drawing)


def test_no_text_covers_another(recorded, monkeypatch):
    """In every figure, among the texts that are shown; ticks beyond the axes are not."""
    overlapping = []

    def ticks(axis):
        low, high = sorted(axis.get_view_interval())
        shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        return [tick.label1 for tick in shown if tick.label1.get_visible()]

    def check(drawing, *_, **__):
        renderer = drawing.canvas.get_renderer()
        drawing.draw(renderer)
        texts = [text for axes in drawing.axes for text in (*axes.texts, axes._left_title)]
        texts += [text for axes in drawing.axes for axis in (axes.xaxis, axes.yaxis) for text in ticks(axis)]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
        for index, (one, box) in enumerate(boxes):
            for other, second in boxes[index + 1 :]:
                if box.padded(-1).overlaps(second.padded(-1)):
                    overlapping.append((one, other))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", check)
    report_module.report(recorded)
    assert overlapping == []


def test_every_mixer_has_a_family_and_every_family_its_colour():
    listed = [mixer for members in FAMILIES.values() for mixer in members]
    assert sorted(listed) == sorted(MIXERS)
    assert {*FAMILIES, "hybrid"} == set(COLOURS)
    assert len({*COLOURS.values(), *RESERVE}) == len(COLOURS) + len(RESERVE)
    assert RULES["savefig.dpi"] >= 150
    assert family("3*mamba2 attention") == "hybrid"
    assert family("2*(mamba2/moe)") == "state space"
    assert family("sliding_window") == "attention"
    assert family("brand_new") == "other"
    assert family("sliding_window(window=512)/moe(num_experts=4)") == "attention"
    assert pattern_mixers("a(x={k: ')'}, y=(1)) 2*(b c(z='/q')/moe(v=w))+d (e f)") == set("abcdef")
    assert pattern_channels("a(x='/q')/moe(v=w) b/mlp") == {"moe", "mlp"}


def test_a_mixer_of_no_family_has_a_colour_of_its_own_throughout_a_report(tmp_path):
    for experiment, models in (("one", ["b_new", "attention"]), ("two", ["a_new", "b_new", "mamba2"])):
        for model in models:
            record_run(tmp_path, model, 0, 0.5, experiment=experiment)
    comparisons = compare(comparable_runs(tmp_path)[0])
    found = {(setting.pattern, setting.colour) for comparison in comparisons for setting in comparison.settings}
    expected = {"a_new": RESERVE[0], "b_new": RESERVE[1], "attention": COLOURS["attention"]}
    assert found == {*expected.items(), ("mamba2", COLOURS["state space"])}


def test_no_two_lines_of_a_figure_look_alike(tmp_path):
    for depth in range(7):
        record_run(tmp_path, "linear_attention", 0, 0.5, depth=depth)
        record_run(tmp_path, "hybrid", 0, 0.5, depth=depth, pattern="attention mamba2")
        record_run(tmp_path, "brand_new", 0, 0.5, depth=depth)
    record_run(tmp_path, "retention", 0, 0.5)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    numbers = strokes(comparison)
    looks = {(setting.colour, str(line_style(numbers[setting.label]))) for setting in comparison.shown}
    assert len(looks) == len(comparison.shown) == 22
    assert numbers["retention"] == FAMILIES["linear attention"].index("retention")
    assert numbers["linear_attention (depth=0)"] == FAMILIES["linear attention"].index("linear_attention")


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_which_checkpoint_was_tested(tmp_path):
    def page():
        return (report(tmp_path)[0] / "index.md").read_text()

    def choose(folder, select):
        config = json.loads((folder / "config.json").read_text())
        config["train"]["eval_checkpoint"] = select
        (folder / "config.json").write_text(json.dumps(config))

    folders = [record_run(tmp_path, model, 0, 0.5) for model in ("attention", "mamba2")]
    choose(folders[0], "best")
    assert "with the checkpoint that validation chose;" in page()
    choose(folders[1], "last")
    assert "with the checkpoint that validation chose, or its last checkpoint (mamba2);" in page()
    choose(folders[0], "last")
    assert "with its last checkpoint;" in page()


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_how_models_began(tmp_path):
    folders = [record_run(tmp_path, model, 0, 0.5) for model in ("attention", "mamba2")]
    page = report(tmp_path)[0] / "index.md"
    assert "All models began with embedding 0.02, gates as released." in page.read_text()
    config = json.loads((folders[1] / "config.json").read_text())
    config["model"]["init"] = "slow_gates"
    (folders[1] / "config.json").write_text(json.dumps(config))
    report(tmp_path)
    assert (
        "Models began with embedding 0.02, gates as released (attention); embedding 0.02, gates slow (mamba2"
        in page.read_text()
    )


def test_spread_keeps_order_and_distance():
    wanted = [0.5, 0.5, 0.51, 0.9, 0.0]
    placed = spread(wanted, 0.1, 0.0, 1.0)
    assert np.diff(sorted(placed)).min() > 0.1 - 1e-6
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert min(placed) >= 0
    assert max(placed) <= 1
    assert spread([0.2, 0.8], 0.1, 0.0, 1.0) == [0.2, 0.8]


@pytest.mark.parametrize(("value", "text"), [(512, "512 B"), (65536, "64 KiB"), (4 * 2**20, "4 MiB"), (2**30, "1 GiB")])
def test_bytes(value, text):
    assert bytes_text(value) == text
