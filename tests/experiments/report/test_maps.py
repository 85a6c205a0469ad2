from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.report import write as report_module
from experiments.report.checks import comparable_runs
from experiments.report.comparison import compare
from experiments.report.maps import COLOUR_MAP, cells_of, column_edges, draw_maps, maps
from tests.experiments.report.test_report import record_run

EDGES = [0, 0.25, 0.5, 0.75, 1]


def depth_test(length: int, values: list[float | None], counts: list[int], **more) -> dict:
    return {"length": length, "by": {"depth": {"edges": EDGES, "value": values, "count": counts}}, **more}


def record_tests(root: Path, model: str, seed: int, tests: dict[str, dict], trained_to: int = 128) -> Path:
    """A run with those test splits; its curve is as for a run that was tested at several lengths."""
    folder = record_run(root, model, seed, 0.5)
    record = json.loads((folder / "run.json").read_text())
    record["results"]["tests"] = tests
    lengths = sorted(test["length"] for test in tests.values())
    record["results"]["curve"] = {"x": lengths, "y": [0.5] * len(lengths), "x_end": lengths[-1],
                                  "x_label": "Length of the sequences", "x_unit": "tokens",
                                  "trained_to": trained_to}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_map_is_the_mean_over_the_answers_of_all_seeds(tmp_path):
    """Columns by increasing length; a seed's bin without answers adds nothing, one without any at all is empty."""
    first = {"test": depth_test(128, [1, None, None, 0.5], [3, 0, 0, 2]),
             "test_64": depth_test(64, [1, 1, 1, 1], [1, 1, 1, 1])}  # fmt: skip
    second = {"test": depth_test(128, [0, 1, None, 0.25], [1, 4, 0, 2]),
              "test_64": depth_test(64, [0, 1, 1, 1], [1, 1, 1, 1])}  # fmt: skip
    for seed, tests in enumerate((first, second)):
        other = depth_test(256, [0, 0, 0, 0], [1, 1, 1, 1], options={"length": 256, "pairs": 8})
        record_tests(tmp_path, "attention", seed, {**tests, "test_256_pairs_8": other})
    record_run(tmp_path, "mamba2", 0, 0.5)
    record_tests(tmp_path, "gla", 0, {"test": first["test"]})
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    (found,) = maps(comparison)
    assert found.setting.label == "attention"
    assert found.lengths == [64, 128]
    expected = [[0.5, 0.75], [1, 1], [1, math.nan], [1, 0.375]]
    np.testing.assert_allclose(found.values, expected)
    pooled = cells_of(found.setting.finished, pool=2)
    assert pooled is not None
    assert pooled.edges == [0, 0.5, 1]
    np.testing.assert_allclose(pooled.values, [[0.75, 7 / 8], [1, 1.5 / 4]])


@pytest.mark.parametrize(("trained_to", "line"), [(128, math.sqrt(128 * 512)), (64, None), (2048, None)])
def test_maps_are_drawn_with_one_scale_and_the_training_length(tmp_path, trained_to, line):
    tests = {f"test_{n}": depth_test(n, [0, 1, None, 0.5], [1, 2, 0, 1]) for n in (128, 512, 2048)}
    for model in ("attention", "mamba2"):
        record_tests(tmp_path, model, 0, tests, trained_to)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    drawing, panels = plt.subplots(1, 2)
    draw_maps(drawing, panels, comparison)
    for axes, setting in zip(panels, comparison.shown, strict=True):
        (mesh,) = axes.collections
        assert mesh.get_cmap().name == COLOUR_MAP
        assert mesh.get_clim() == (0, 1)
        drawn = mesh.get_array().filled(np.nan)
        np.testing.assert_allclose(drawn, np.repeat([[0], [1], [np.nan], [0.5]], 3, axis=1))
        assert axes.get_ylim() == (1, 0), "a text begins at the top"
        assert axes.get_title(loc="center") + axes.get_title(loc="left") == setting.label
        places = sorted({np.asarray(each.get_xdata())[0].item() for each in axes.lines})
        assert places == ([pytest.approx(line)] if line else [])
    bar = drawing.axes[-1]
    assert {np.asarray(each.get_ydata())[0].item() for each in bar.lines} == {0.125}
    assert "chance" in bar.get_ylabel()
    plt.close(drawing)


def test_the_best_map_comes_first(tmp_path):
    """By the mean over its cells, whatever the result on the first test."""
    for model, level in (("mamba2", 0.3), ("attention", 0.9), ("gla", 0.5)):
        tests = {f"test_{n}": depth_test(n, [level] * 3 + [None], [1, 1, 1, 0]) for n in (64, 128)}
        record_tests(tmp_path, model, 0, tests)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    assert [each.setting.label for each in maps(comparison)] == ["attention", "gla", "mamba2"]


def test_columns_meet_in_the_middle_on_a_logarithmic_axis():
    np.testing.assert_allclose(column_edges([64, 256, 4096]), [32, 128, 1024, 16384])


def test_a_report_shows_the_maps_of_runs_that_have_them(tmp_path):
    tests = {f"test_{n}": depth_test(n, [0, 1, None, 0.5], [1, 2, 0, 1]) for n in (128, 512)}
    for model in ("attention", "mamba2", "delta_net", "gla", "hybrid", "linear_attention"):
        record_tests(tmp_path, model, 0, tests)
    (comparison,) = compare(comparable_runs(tmp_path)[0])
    drawn = dict(report_module.draw(comparison, tmp_path))
    assert "by depth" in drawn["recall-depth"]
    image = plt.imread(tmp_path / "recall-depth.png")
    assert image[..., :3].std() > 0.05
    assert (tmp_path / "recall-depth.svg").exists()


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ([1], r"results.tests.odd is no test, test is \[1\]"),
        ({"length": 64, "by": 3}, "by is 3"),
        ({"by": {"depth": {}}}, "it lacks length"),
        (depth_test(64, [1, 1, 1], [1, 1, 1]), "5 edges for 3 bins"),
        (depth_test(64, [1, 1, 1, 1], [1, 1, 1]), "a value and a count for each bin"),
        (depth_test(64, [1, 1, 1, "x"], [1, 1, 1, 1]), "a value and a count for each bin"),  # type: ignore[list-item]
    ],
)
def test_damaged_tests_are_reported(tmp_path, test, says):
    folder = record_run(tmp_path, "attention", 0, 0.5)
    record = json.loads((folder / "run.json").read_text())
    record["results"]["tests"] = {"odd": test}
    (folder / "run.json").write_text(json.dumps(record))
    runs, (problem,) = comparable_runs(tmp_path)
    assert not runs
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(problem)
