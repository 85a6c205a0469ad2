"""The pattern language."""

from __future__ import annotations

from typing import Any

import pytest

from seqarch.models import LayerPattern, StackConfig, parse_pattern, tile_pattern
from tests.support.variants import VARIANTS


def shown(pattern: str) -> str:
    return " ".join(map(str, parse_pattern(pattern)))


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("attention", "attention"),
        ("3*mamba2 attention", "mamba2 mamba2 mamba2 attention"),
        ("3 * mamba2, attention", "mamba2 mamba2 mamba2 attention"),
        ("attention+mamba2", "attention+mamba2"),
        ("mamba2/moe attention/swiglu", "mamba2/moe attention/swiglu"),
        ("2*(delta_net mamba) attention", "delta_net mamba delta_net mamba attention"),
        ("2*(a 2*(b+c/mlp)) d", "a b+c/mlp b+c/mlp a b+c/mlp b+c/mlp d"),
        (" a\n  b ", "a b"),
        ("2*a(w=512), b (c d) a(b)", "a(w=512) a(w=512) b c d a b"),
        ("a (w=1,\n x=[1, -2.5, +3e-1,],)+b/moe(k=2)", "a(w=1, x=[1, -2.5, 0.3])+b/moe(k=2)"),
        ("a(x=True, y=false, z=None, w=null)", "a(x=true, y=false, z=null, w=null)"),
        ("a(x=none, y='null', z=\"it's, (so)\", w='2')", "a(x=none, y='null', z=\"it's, (so)\", w='2')"),
        ("a(x={kind: yarn, 'by 2': [1e3, {}], k: []})", "a(x={kind: yarn, 'by 2': [1000.0, {}], k: []})"),
        ("p.q:A(x=1) p.q:B/r:C(y=2)", "p.q:A(x=1) p.q:B/r:C(y=2)"),
    ],
)
def test_reads_like_a_sentence(pattern: str, layers: str):
    assert shown(pattern) == layers


def test_writing_a_pattern_and_reading_it_again_is_the_identity():
    pattern = "2*(a+b/moe c/none) d"
    assert parse_pattern(shown(pattern)) == parse_pattern(pattern)
    assert parse_pattern("a+b/moe") == [LayerPattern(("a", "b"), "moe")]
    layer = LayerPattern(("a", "b"), "moe", ({"w": 512, "x": "none", "y": None}, {}), {"z": [0.1, True, {"k": "a b"}]})
    assert str(layer) == "a(w=512, x=none, y=null)+b/moe(z=[0.1, true, {k: 'a b'}])"
    assert parse_pattern(f"3*{layer}") == [layer] * 3
    assert parse_pattern("a")[0] != parse_pattern("a(x=1)")[0] != parse_pattern("a(x=2)")[0]


def test_every_option_of_a_mixer_can_be_given_in_a_pattern():
    for name, variants in VARIANTS.items():
        for options in variants:
            assert parse_pattern(str(LayerPattern((name,), None, (options,)))) == [
                LayerPattern((name,), None, (options,))
            ]


@pytest.mark.parametrize("value", [float("nan"), "both ' and \"", {1: 2}, object()])
def test_a_value_that_no_pattern_can_have_is_named(value: Any):
    with pytest.raises(ValueError, match=r"a pattern cannot have the (value|text)"):
        str(LayerPattern(("a",), None, ({"x": value},)))


def test_options_belong_to_a_mixer_or_a_channel_mixer():
    with pytest.raises(ValueError, match="options of 1 mixers are given, expected 2"):
        LayerPattern(("a", "b"), None, ({},))
    with pytest.raises(ValueError, match="options of a channel mixer are given, and no channel mixer"):
        LayerPattern(("a",), None, (), {"x": 1})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "expected a mixer, found the end"),
        ("3*", "expected a mixer, found the end"),
        ("0*a", "expected a count of 1 to 10000, found '0[*]'"),
        ("99999999999*a", "expected a count of 1 to 10000, found '99999999999[*]'"),
        ("a +", "expected a mixer after '[+]', found the end"),
        ("a/", "expected a channel mixer after '/', found the end"),
        ("(a b", r"expected '\)', found the end"),
        ("a) b", r"expected a mixer, found '\)' after 1 tokens"),
        ("a*3 b", "expected a mixer, found '[*]' after 1 tokens"),
        ("a & b", "expected a mixer, found '&' after 1 tokens"),
        ("3mamba", "expected a mixer, found '3'"),
        ("(" * 5000 + "a" + ")" * 5000, "expected at most 100 parentheses within one another, found '[(]' after 100"),
        ("9999*(9999*(9999*a))", "expected at most 10000 layers in all"),
        ("9999*a 9999*b", "expected at most 10000 layers in all"),
        ("a(x=1", r"options of a: expected ',' or '\)', found the end after 'a\(x=1'"),
        ("b a(x=)", r"options of a: expected a value of the option x, found '\)' after 'b a\(x='"),
        ("a(x=1 y=2)", r"expected ',' or '\)', found 'y'"),
        ("a(x=1, 2)", r"expected an option, found '2'"),
        ("a(x=1, y)", r"expected '=' after the option y, found '\)'"),
        ("a(x=1, x=2)", "expected the option x once, found 'x'"),
        ("a(x=3q)", "expected a value of the option x, found '3'"),
        ("a(x=[1)", r"expected ',' or ']', found '\)'"),
        ("a(x={1: 2})", "expected a key, found '1'"),
        ("a(x={k=2})", "expected ':' after the key k, found '='"),
        ("a(x='q)", 'expected a value of the option x, found "\'"'),
        ("a(x=" + "[" * 5000 + ")", "expected at most 20 brackets within one another"),
        (f"a(x={'9' * 5000})", "expected a value of the option x, found '9'"),
        ("a(=1)", "expected a mixer, found '='"),
        ("a(x=1)(y=2)", "expected a mixer, found '='"),
        ("a/none(x=1)", "'none' is no channel mixer and has no options"),
        (5, "pattern is int 5, expected a string such as"),
        (None, "pattern is None, expected a string"),
    ],
)
def test_a_malformed_pattern_shows_where(pattern: Any, message: str):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


@pytest.mark.parametrize("depth", [10**9, 2**63, 1.5, "3", True, None])
def test_a_depth_that_no_stack_has_is_named(depth: Any):
    with pytest.raises(ValueError, match=f"depth is .*{str(depth)[:3]}.*, expected an int of at most 10000 layers"):
        tile_pattern("a", depth)
    with pytest.raises(ValueError, match="depth"):
        StackConfig(d_model=32, pattern="gla", depth=depth)


def test_a_pattern_is_tiled_over_the_depth():
    assert len(parse_pattern("100*(100*a)")) == 10_000
    assert parse_pattern("(" * 100 + "a" + ")" * 100) == parse_pattern("a")
    assert [str(layer) for layer in tile_pattern("mamba2 attention", 4)] == ["mamba2", "attention"] * 2


@pytest.mark.parametrize("depth", [0, 2, 6])
def test_a_depth_that_does_not_fit_shows_both(depth: int):
    message = rf"a depth of {depth} does not fit the pattern '3\*mamba2 attention' of 4 layers \(mamba2 .*multiple of 4"
    with pytest.raises(ValueError, match=message):
        tile_pattern("3*mamba2 attention", depth)
