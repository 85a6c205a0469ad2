"""Coordinate checks: changes by width, measured once, and the study of rates on what is on record."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import coordinate_check
from experiments.studies.coordinate_check import RECORDS, Line, exponents, read_records
from experiments.studies.coordinate_check_page import coordinate_check_table


def test_changes_do_not_grow_with_mup_and_are_measured_once(tmp_path, capsys):
    given = ["gla", "--widths", "64", "128", "256", "--seeds", "0", "--steps", "3", "--folder", str(tmp_path)]
    assert coordinate_check.main(given) == 0
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    lines = read_records(tmp_path)
    assert [(line.kind, line.width) for line in lines] == [(k, w) for k in ("standard", "mup") for w in (64, 128, 256)]
    assert all(values[0] == 0 and len(values) == 4 for line in lines for values in line.sizes.values())
    assert lines[0].sizes == lines[3].sizes  # at the base width both are the same model
    found = exponents(lines)
    for name in ("mixer", "channel mixer", "logits"):
        assert found["gla", "standard", name] > found["gla", "mup", name] + 0.1, found
        assert found["gla", "mup", name] < 0.1, found
    before = (tmp_path / RECORDS).read_bytes()
    capsys.readouterr()
    assert coordinate_check.main(given) == 0
    assert (tmp_path / RECORDS).read_bytes() == before
    assert coordinate_check_table(tmp_path).count("\n") == 2


def test_an_exponent_is_a_slope_of_medians():
    line = Line("m", "mup", 64, 64, 0, 0.1, {"logits": [0.0, 1.0]}, "c")
    lines = [replace(line, width=64 * 2**i, seed=seed, sizes={"logits": [0.0, 2.0**i * (100 if seed == 2 else 1)]})
             for i in range(3) for seed in range(3)]  # fmt: skip
    assert np.isclose(exponents(lines)["m", "mup", "logits"], 1)
    assert not exponents([each for each in lines if each.width < 256])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gla", "--widths", "64", "128"], "--widths: growth is seen from three widths on, got [64, 128]"),
        (["gla", "--steps", "0"], "--steps must be positive, got 0"),
        (["glaa", "--widths", "64", "128", "256"], "'glaa' of width 64: unknown mixer"),
        (["gla", "--widths", "64", "65", "256"], "'gla' of width 65"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given, said, tmp_path, capsys):
    assert coordinate_check.main([*given, "--folder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error, error
    assert not (tmp_path / RECORDS).exists()


def test_a_damaged_record_is_named(tmp_path, capsys):
    (tmp_path / RECORDS).write_text(json.dumps({"model": "gla"}) + "\n")
    assert coordinate_check.main(["gla", "--folder", str(tmp_path)]) == 1
    assert "line 1 is no record of a coordinate check" in capsys.readouterr().err
