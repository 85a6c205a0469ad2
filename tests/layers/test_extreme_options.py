"""Options longer than any sequence mean all of it, at its cost."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from seqarch.layers import build_mixer

LENGTH, HUGE = 40, (10**9, 2**62, sys.maxsize)

# A mixer, its other options, the option that is huge, and a number of it that covers all tokens.
CASES: list[tuple[str, dict[str, Any], str, int]] = [
    ("attention", {}, "window", LENGTH),
    ("sliding_window", {}, "window", LENGTH),
    ("based", {}, "window", LENGTH),
    ("lolcats", {}, "window", LENGTH),
    ("longformer", {}, "window", LENGTH),
    ("longformer", {"block_size": 1}, "global_tokens", LENGTH),
    ("big_bird", {"block_size": 4}, "window_blocks", 10),
    ("big_bird", {"block_size": 4}, "global_blocks", 10),
    ("big_bird", {"block_size": 4}, "random_blocks", 10),
    ("big_bird", {}, "block_size", LENGTH),
    ("moba", {"block_size": 4}, "top_k", 10),
    ("moba", {}, "block_size", LENGTH),
    ("dsa", {}, "top_k", LENGTH),
    ("sparse_mla", {}, "top_k", LENGTH),
    ("nsa", {}, "window", LENGTH),
    ("nsa", {}, "selected_blocks", 40),
    ("nsa", {"compressed_length": 2, "compressed_stride": 1}, "block_size", LENGTH),
]


@pytest.mark.parametrize(("name", "others", "option", "covering"), CASES)
def test_a_number_that_nothing_reaches_is_all_there_is(name: str, others: dict[str, Any], option: str, covering: int):
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 32)
    mixer = build_mixer(name, d_model=32, **others, **{option: covering})
    expected, _ = mixer(x)
    for huge in HUGE:
        other = build_mixer(name, d_model=32, **others, **{option: huge})
        other.load_state_dict(mixer.state_dict())
        y, _ = other(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        y.square().mean().backward()
        with torch.no_grad():
            first, state = other(x[:, :37])
            steps = [first]
            for token in x[:, 37:].split(1, dim=1):
                y, state = other(token, state)
                steps.append(y)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
        assert other.state_bytes(LENGTH) <= 1.1 * mixer.state_bytes(LENGTH)  # a window of w keeps w - 1
        assert other.flops(LENGTH) <= mixer.flops(LENGTH)
