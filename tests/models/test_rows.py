"""Rows of states: after any call, some of them go on as their prompts alone would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqarch.layers import MIXERS, build_mixer, clone_state
from seqarch.layers.rows import join_rows, leave_rows
from seqarch.models import LanguageModel, LMConfig, state_rows
from seqarch.testing import assert_close
from seqarch.testing.laws import FLOAT64_ERROR
from tests.support.variants import VARIANTS

LENGTHS = (5, 1, 40, 17)
CHOICES = ([1, 1, 3], [2], [3, 2, 0, 0, 1], torch.tensor([0, 3]))
"""Repeated, alone, in another order; without the longest row, too."""


def offsets(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def states(mixer: Any, rows: list[Tensor]) -> dict[str, Any]:
    """The prompts' state as it may be: after a packed call, one with room, a step after it, packed calls in turn."""
    packed, at = torch.cat(rows, dim=1), offsets(LENGTHS)
    halves = [piece for row in rows for piece in row.tensor_split(2, dim=1)]
    first, second = (torch.cat(halves[i::2], dim=1) for i in range(2))
    sizes = [tuple(half.shape[1] for half in halves[i::2]) for i in range(2)]
    rest, last = (torch.cat(part, dim=1) for part in ([row[:, :-1] for row in rows], [row[:, -1:] for row in rows]))
    found = {
        "packed": mixer(packed, None, at)[1],
        "with room": mixer(packed, mixer.init_state(4, max_length=60), at)[1],
        "packed twice": mixer(second, mixer(first, None, offsets(sizes[0]))[1], offsets(sizes[1]))[1],
    }
    before = mixer(rest, None, offsets(tuple(length - 1 for length in LENGTHS)))[1]
    found["a step later"] = mixer(last.transpose(0, 1), before)[1]
    return found


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in MIXERS for options in VARIANTS.get(name, [{}])[-1:]], ids=str
)
def test_chosen_rows_go_on_as_their_prompts_alone(name: str, options: dict[str, Any]):
    mixer = build_mixer(name, d_model=32, **options).double()
    rows = [torch.randn(1, length, 32, dtype=torch.float64) for length in LENGTHS]
    more = torch.randn(5, 9, 32, dtype=torch.float64)
    alone = [mixer(row)[1] for row in rows]
    pairs = {(row, int(i)) for index in CHOICES for row, i in enumerate(index)}
    expected = {(row, i): mixer(more[row : row + 1], clone_state(alone[i]))[0][0] for row, i in pairs}
    for how, state in states(mixer, rows).items():
        kept = clone_state(state)
        for index in CHOICES:
            numbers = [int(i) for i in index]
            chosen = state_rows(state, index)
            first, chosen = mixer(more[: len(numbers), :1], chosen)
            y = torch.cat([first, mixer(more[: len(numbers), 1:], chosen)[0]], dim=1)
            for row, i in enumerate(numbers):
                assert_close(y[row], expected[row, i], FLOAT64_ERROR, f"{how}, row {row} of {numbers}")
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(kept), strict=True)), how
        none = state_rows(state, [])
        assert mixer(more[:0], none)[0].shape == (0, 9, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_rows_join_and_leave_while_others_decode(name: str):
    """And each goes on as its prompt alone: of states of different lengths, with room, without, and of no token yet."""
    mixer = build_mixer(name, d_model=32, **VARIANTS.get(name, [{}])[-1]).double()
    rows = [torch.randn(1, length, 32, dtype=torch.float64) for length in LENGTHS]
    more = torch.randn(4, 9, 32, dtype=torch.float64)
    packed = mixer(torch.cat(rows[1:3], dim=1), None, [0, 1, 41])[1]
    roomy = mixer(torch.cat(rows, dim=1), mixer.init_state(4, max_length=60), offsets(LENGTHS))[1]
    # the long row from a packed call, one of 1 and one of 17 tokens with room, and one of none, which joins later
    parts = [state_rows(packed, [1]), state_rows(roomy, [1, 3]), mixer.init_state(1, max_length=1)]
    prompts = [rows[2], rows[1], rows[3], more[:1, :0]]
    kept = clone_state(parts)
    state = join_rows([mixer.init_state(0, max_length=50), *parts[:2]])
    running, outputs = [0, 1, 2], [[], [], [], []]
    for step in range(9):
        if step == 3:
            state, running = join_rows([state, parts[2]]), [0, 1, 2, 3]
        if step == 5:
            state, running = leave_rows(state, [0]), [1, 2, 3]
        if step == 7:
            state, running = join_rows([leave_rows(state, [2])]), [1, 2]
        y, state = mixer(torch.stack([more[row, len(outputs[row]) :][:1] for row in running]), state)
        for row, own in zip(running, y, strict=True):
            outputs[row].append(own)
    assert all(torch.equal(a, b) for a, b in zip(tensors(parts[:2]), tensors(kept[:2]), strict=True))
    for row, prompt in enumerate(prompts):
        got = torch.cat(outputs[row])
        expected = mixer(more[row : row + 1, : len(got)], mixer(prompt)[1])[0][0]
        assert_close(got, expected, 1e-12, f"row {row} of {len(got)} steps")


@pytest.mark.parametrize("name", MIXERS)
def test_rows_share_no_memory_and_pass_gradients_on(name: str):
    mixer = build_mixer(name, d_model=32)
    x = torch.randn(2, 40, 32, requires_grad=True)
    for given, packed in ((x, None), (x.flatten(0, 1)[None], [0, 40, 80])):
        _, state = mixer(given, None, packed)
        before = {leaf.untyped_storage().data_ptr() for leaf in tensors(state) if leaf.numel()}
        chosen = state_rows(state, [1, 1])
        after = {leaf.untyped_storage().data_ptr() for leaf in tensors(chosen) if leaf.numel()}
        assert not before & after
        (gradient,) = torch.autograd.grad(mixer(torch.randn(2, 1, 32), chosen)[0].sum(), x)
        assert gradient[1].abs().max() > 0
        assert gradient[0].abs().max() == 0


def test_beams_of_a_model():
    """Prompts of different lengths, and each continued by two tokens side by side."""
    torch.manual_seed(0)
    pattern = "mamba attention+gated_delta_net/moe nsa"
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern=pattern, depth=3))
    prompts, beams = [[3, 1, 4], [1, 5]], [[2, 6], [5, 3], [8, 9], [7, 9]]
    with torch.no_grad():
        _, state = model(torch.tensor([prompts[0] + prompts[1]]), None, [0, 3, 5])
        after = state_rows(state, [0, 0, 1, 1])
        for step in range(2):
            logits, after = model(torch.tensor(beams)[:, step : step + 1], after)
            for beam, row in enumerate((0, 0, 1, 1)):
                expected = model(torch.tensor([prompts[row] + beams[beam][: step + 1]]))[0]
                torch.testing.assert_close(logits[beam, 0], expected[0, -1], rtol=0, atol=1e-5)
        kept = state_rows(after, [3])
        assert model(torch.tensor([[1]]), kept)[0].shape == (1, 1, 11)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 2], "row 2 was asked for, expected 0 to 1: the state has 2"),
        ([-1], "row -1 was asked for, expected 0 to 1"),
        (1, "index is int 1, expected a list of row numbers"),
        ([True], r"index is list \[True\], expected a list of row numbers"),
        ([0.0], r"index is list \[0.0\]"),
        ("01", "index is str '01'"),
        (None, "index is None"),
        (torch.tensor([True, False]), r"index is torch.bool \[2\], .*mask.nonzero\(\).flatten\(\)"),
        (torch.tensor([[0]]), r"index is torch.int64 \[1, 1\]"),
        (torch.tensor([0.0]), r"index is torch.float32 \[1\]"),
    ],
)
def test_a_wrong_index_is_named(index: Any, message: str):
    state = build_mixer("nsa", d_model=32)(torch.randn(1, 5, 32), None, [0, 2, 5])[1]
    with pytest.raises(ValueError, match=f"state_rows: {message}"):
        state_rows(state, index)


def test_what_is_no_state_is_named():
    mixer = build_mixer("gla", d_model=32)
    one, two = (mixer(torch.randn(rows, 3, 32))[1] for rows in (1, 2))
    for state, what in (
        (None, "None"),
        ((), r"tuple \(\)"),
        (((one,), (two,)), r"parts of \[1, 2\] rows"),
        ("state", "str 'state'"),
    ):
        with pytest.raises(ValueError, match=f"state_rows: the state is {what}, expected one that a mixer"):
            state_rows(state, [0])
