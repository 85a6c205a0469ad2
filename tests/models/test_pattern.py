"""The pattern language."""

from __future__ import annotations

from typing import Any

import pytest

from seqarch.models import LayerPattern, StackConfig, parse_pattern, tile_pattern


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
    ],
)
def test_reads_like_a_sentence(pattern: str, layers: str):
    assert shown(pattern) == layers


def test_writing_a_pattern_and_reading_it_again_is_the_identity():
    pattern = "2*(a+b/moe c/none) d"
    assert parse_pattern(shown(pattern)) == parse_pattern(pattern)
    assert parse_pattern("a+b/moe") == [LayerPattern(("a", "b"), "moe")]


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
