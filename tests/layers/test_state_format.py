"""Numbers of states as codes: how far rounding goes, that its mean is right, and what error feedback keeps."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from seqarch.layers.modules.state_format import FORMATS, Coded, StateFormat

ROUNDED = [name for name in FORMATS if name != "float32"]
STEPS = {"bfloat16": 2.0**-7, "int8": 1 / 127, "int4": 1 / 7}
"""The step between codes, as a share of the largest number of a group."""


def numbers(width: int) -> Tensor:
    """Of very different sizes by rows."""
    torch.manual_seed(0)
    return torch.randn(3, 5, width) * torch.logspace(-4, 4, 5)[:, None]


def decoded(form: StateFormat, coded: Coded, like: Tensor) -> Tensor:
    return form.decode(coded, like.shape[-1], torch.float32)


@pytest.mark.parametrize(("name", "width", "feedback"), [*product(ROUNDED, (1, 2, 17, 65, 130), (False, True))])
def test_rounding_to_the_nearest_is_near_and_done_once(name: str, width: int, feedback: bool):
    form = StateFormat(name, error_feedback=feedback)
    x = numbers(width)
    x = x.reshape(form.layout(x.shape))
    coded = form.encode(x)
    found, groups = decoded(form, coded, x), x.split(form.group, -1)
    largest = torch.cat([group.abs().amax(-1, keepdim=True).expand_as(group) for group in groups], -1)
    assert ((found - x).abs() <= largest * STEPS[name] / 2 * 1.02).all()
    again = form.encode(found)
    assert torch.equal(again.codes, coded.codes)
    if coded.scales is not None:
        assert again.scales is not None
        assert torch.equal(again.scales, coded.scales)
    if feedback:
        rest = (found + form.left_over(coded, x.shape[-1]) - x).abs()
        assert (rest <= largest * STEPS[name] / 2 / 14 * 1.1).all()


@pytest.mark.parametrize("name", ROUNDED)
def test_stochastic_rounding_has_the_right_mean(name: str):
    """The mean over 2000 positions is within what chance allows, of each number and of all together.

    Of numbers so near to a code that they seldom or never get another, chance says too little.
    """
    form, count = StateFormat(name, "stochastic", seed=5), 2000
    torch.manual_seed(0)
    x = torch.randn(1, 150)
    coded = form.encode(x.expand(count, -1), torch.arange(count))
    found = decoded(form, coded, x).double()
    often = found.std(0) > 0.2 * found.std(0).max() if FORMATS[name] else found.std(0) > 0.1 * x[0].abs() * STEPS[name]
    spread = found.std(0) / count**0.5
    z = ((found.mean(0) - x[0]) / spread)[often]
    assert len(z) > 100
    assert z.abs().max() < 4.5
    assert abs(z.mean()) * len(z) ** 0.5 < 4
    assert 0.8 < z.std() < 1.25
    nearest = decoded(StateFormat(name), StateFormat(name).encode(x), x)
    assert (nearest - x).abs().max() > 5 * spread.max()  # to the nearest the mean is wrong by more


def test_noise_is_of_seed_position_and_place_and_of_no_row():
    form = StateFormat("int8", "stochastic", seed=1)
    x = numbers(64)
    together = form.encode(x, torch.tensor([4, 9, 9]))
    for row, place in enumerate((4, 9, 9)):
        alone = form.encode(x[row : row + 1], torch.tensor([place]))
        assert torch.equal(alone.codes[0], together.codes[row])
    tokens = form.encode(x, torch.arange(15).view(3, 5))  # a place for each token
    assert torch.equal(tokens.codes[1, 2], form.encode(x[1:2, 2], torch.tensor([7])).codes[0])
    others = (
        form.encode(x, torch.tensor([4, 9, 9]), salt=1),
        StateFormat("int8", "stochastic", seed=2).encode(x, torch.tensor([4, 9, 9])),
        form.encode(x, torch.tensor([5, 10, 10])),
    )
    assert all(not torch.equal(other.codes, together.codes) for other in others)


@pytest.mark.parametrize(("name", "rounding"), [*product(ROUNDED, ("nearest", "stochastic"))])
def test_what_is_no_number_stays_none_and_zeros_stay_zeros(name: str, rounding: str):
    form, places = StateFormat(name, rounding, error_feedback=True), torch.tensor([1])
    zeros = torch.zeros(1, 64)
    coded = form.encode(zeros, places)
    assert not decoded(form, coded, zeros).any()
    assert not form.left_over(coded, 64).any()
    for odd in (torch.nan, torch.inf):
        x = torch.ones(1, 64)
        x[0, 3] = odd
        assert not decoded(form, form.encode(x, places), x)[0, 3].isfinite()


def test_the_operators_keep_torchs_rules():
    x, places = torch.randn(2, 3, 20), torch.arange(6).view(2, 3)
    for name in ROUNDED:
        codes, scales, residual = torch.ops.seqarch.encode_state(x, places, name, True, True, 8, 3)
        scales = scales if FORMATS[name] else codes
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.seqarch.encode_state, (x, places, name, True, True, 8, 3), test_utils=checks)
        torch.library.opcheck(torch.ops.seqarch.decode_state, (codes, scales, name, 8, 20), test_utils=checks)
        torch.library.opcheck(torch.ops.seqarch.decode_residual, (residual, scales, name, 8, 20, 1), test_utils=checks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "int5"}, "format of states"),
        ({"name": 8}, "format of states"),
        ({"name": "int8", "rounding": "up"}, "rounding"),
        ({"name": "int8", "error_feedback": 1}, "error_feedback is int 1"),
        ({"name": "int8", "group_size": 1}, "group_size is int 1, expected an int from 2"),
        ({"name": "bfloat16", "group_size": 64}, "share no scale"),
        ({"name": "int8", "seed": -1}, "seed is int -1"),
        ({"name": "float32", "rounding": "stochastic"}, "are not rounded"),
    ],
)
def test_wrong_options_are_refused(options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        StateFormat(**options)
