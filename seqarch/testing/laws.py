"""The laws of mixers: functions of a case, which raise :class:`~seqarch.testing.LawBroken` where one does not hold.

They follow from the contract of :class:`seqarch.layers.Mixer`. Differences are measured as the RMS of the difference
over the RMS of the reference, and compared in float64 but where a law says otherwise. The seventh law, that
initialisation survives the stack, is about stacks and not about a mixer: ``tests/models/test_stack.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from seqarch.layers import Mixer, clone_state, measured_state_bytes
from seqarch.ops import OPS
from seqarch.testing.cases import Case, reference_backends
from seqarch.testing.compare import LawBroken, assert_close, assert_same_count, error, require

LENGTHS = (1, 2, 63, 64, 65, 130)
"""Around the blocks of chunked algorithms, which are of 16 to 64 tokens."""

FLOAT64_ERROR = 1e-10
BFLOAT16_ERROR = 0.05
"""Parameters, inputs and states in bfloat16 (8 bits of mantissa) against the same rounded parameters in float32."""


def causality(case: Case) -> None:
    """No output before token t depends on token t (to 1e-13), and that at t does (by more than 1e-6)."""
    mixer, x = case.build(), case.inputs(70)
    with case.active(), torch.no_grad():
        y = mixer(x)[0]
        for t in (0, 1, 15, 16, 63, 64, 69):
            changed = x.clone()
            changed[:, t] += 1
            z = mixer(changed)[0]
            if t:
                assert_close(z[:, :t], y[:, :t], 1e-13, f"outputs before the change at {t}")
            require(error(z[:, t], y[:, t]) > 1e-6, f"token {t} does not see itself")


def split(case: Case) -> None:
    """Any split of a sequence into calls that hand on the state gives the same outputs and state (to 1e-10).

    Pieces of 0 and 1 token included. States are compared by what follows from them.
    """
    mixer, x = case.build(), case.inputs(70)
    with case.active(), torch.no_grad():
        y, last = mixer(x)
        for pieces in ((1, 69), (64, 6), (33, 1, 36), (2, 3, 0, 65), (1,) * 70):
            state = mixer.init_state(2)
            outputs = []
            for piece in x.split(pieces, dim=1):
                out, state = mixer(piece, state)
                outputs.append(out)
            assert_close(torch.cat(outputs, 1), y, FLOAT64_ERROR, f"outputs of the split {pieces[:5]}")
            _same_continuation(case, mixer, state, last, f"after the split {pieces[:5]}")


def _same_continuation(case: Case, mixer: Mixer, state: Any, expected: Any, what: str) -> None:
    """Two states are the same if what follows them is: states of the same meaning may be laid out differently."""
    more = case.inputs(3, seed=2)
    got, wanted = (mixer(more, clone_state(each))[0] for each in (state, expected))
    assert_close(got, wanted, FLOAT64_ERROR, what)


def packed(case: Case) -> None:
    """Sequences packed into one row by ``cu_seqlens`` give what they give apart (to 1e-10).

    From no state, from the states of an earlier packed call, and in steps of one token after them.
    """
    mixer, lengths, more = case.build(), (5, 1, 64, 17), (3, 66, 1, 2)
    cu_seqlens, cu_seqlens_more = ([sum(sizes[:i]) for i in range(5)] for sizes in (lengths, more))
    x, x2, x3 = case.inputs(sum(lengths), 1), case.inputs(sum(more), 1, seed=2), case.inputs(1, 4, seed=3)
    with case.active(), torch.no_grad():
        y, state = mixer(x, None, torch.tensor(cu_seqlens))
        y2, state = mixer(x2, state, torch.tensor(cu_seqlens_more))
        y3, _ = mixer(x3, state)
        for i in range(4):
            own, following = (slice(*bounds[i : i + 2]) for bounds in (cu_seqlens, cu_seqlens_more))
            z, alone = mixer(x[:, own])
            assert_close(y[:, own], z, FLOAT64_ERROR, f"sequence {i}")
            z, alone = mixer(x2[:, following], alone)
            assert_close(y2[:, following], z, FLOAT64_ERROR, f"sequence {i} continued")
            assert_close(y3[i : i + 1], mixer(x3[i : i + 1], alone)[0], FLOAT64_ERROR, f"sequence {i}, a step")


def gradients(case: Case) -> None:
    """Every parameter, the input and the state receive a gradient, equal to that of the references (to 1e-10)."""
    with case.active():
        got = _gradients(case)
    expected = _reference_gradients(case)
    require(got.keys() == expected.keys(), f"gradients of {sorted(got.keys() ^ expected.keys())} on one backend alone")
    for name, gradient in expected.items():
        require(bool(gradient.abs().max() > 0), f"{name} receives no gradient")
        assert_close(got[name], gradient, FLOAT64_ERROR, f"gradient of {name}")


def _reference_gradients(case: Case) -> dict[str, Tensor]:
    with reference_backends():
        return _gradients(case)


def _gradients(case: Case) -> dict[str, Tensor]:
    """Of a weighted sum of the outputs and the last state, by the names of parameters, ``x`` and ``state I``."""
    mixer, x = case.build(), case.inputs(70).requires_grad_()
    with reference_backends(), torch.no_grad():
        _, before = mixer(case.inputs(40, seed=2))
    before = pytree.tree_map_only(Tensor, lambda m: m.requires_grad_() if m.is_floating_point() else m, before)
    starts = float_leaves(before)
    y, after = mixer(x, before)
    total = (y * case.inputs(70, seed=3)).sum() + (0 if (extra := mixer.auxiliary_loss()) is None else extra)
    for leaf in float_leaves(after):
        weights = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).cos().view_as(leaf)
        total = total + (leaf * weights).sum()
    named = {"x": x, **dict(mixer.named_parameters())} | {f"state {i}": leaf for i, leaf in enumerate(starts)}
    return differentiate(total, named)


def differentiate(total: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of ``total``, by name.

    Raises:
        LawBroken: it does not depend on one of them.
    """
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    unused = [name for name, gradient in zip(named, found, strict=True) if gradient is None]
    require(not unused, f"{', '.join(unused)} receives no gradient")
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def float_leaves(state: Any) -> list[Tensor]:
    """The tensors of a state that hold real numbers, empty ones left out."""
    leaves = pytree.tree_leaves(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def accounting(case: Case) -> None:
    """``state_bytes`` equals the bytes of real states, ``flops`` and ``step_flops`` what a FLOP counter sees: exactly.

    States after some tokens and those reserved for as many, in float32, float64 and bfloat16. FLOPs are those of the
    references, whose products the counter sees: they are counted in the cases of references alone.
    """
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mixer = case.build(dtype)
        for length in (1, 3, 70):
            with case.active(), torch.no_grad():
                _, state = mixer(case.inputs(length, dtype=dtype))
            formula, reserved = mixer.state_bytes(length, 2), mixer.init_state(2, max_length=length)
            assert_same_count(measured_state_bytes(state), formula, f"state_bytes after {length} tokens in {dtype}")
            assert_same_count(measured_state_bytes(reserved), formula, f"state_bytes of {length} reserved in {dtype}")
    if case.op and case.backend != OPS[case.op].reference:
        return
    mixer = case.build()
    for length in (1, 37):
        with reference_backends(), torch.no_grad(), flop_counter() as counter:
            _, state = mixer(case.inputs(length))
        assert_same_count(counter.get_total_flops(), mixer.flops(length, 2), f"flops of {length} tokens")
        with reference_backends(), torch.no_grad(), flop_counter() as counter:
            mixer(case.inputs(1, seed=2), state)
        assert_same_count(counter.get_total_flops(), mixer.step_flops(length, 2), f"step_flops after {length} tokens")


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also knows real transforms: of n numbers they count as ``2.5 n log2 n``."""
    return FlopCounterMode(display=False, custom_mapping=FFT_FLOPS)


def _transform(length: int, numbers: int) -> int:
    return round(2.5 * length * math.log2(length)) * numbers // length


FFT_FLOPS: dict[Any, Any] = {
    torch.ops.aten._fft_r2c: lambda x, dims, *_, out_shape, **__: _transform(x[dims[0]], math.prod(x)),
    torch.ops.aten._fft_c2r: lambda x, dims, *_, out_shape, **__: _transform(out_shape[dims[0]], math.prod(out_shape)),
}


def lengths(case: Case) -> None:
    """Odd lengths and inputs that are not contiguous equal the references (to 1e-10), bfloat16 the same in float32.

    The latter to 0.05: of 65 tokens, parameters rounded to bfloat16 in both; outputs come in bfloat16.
    """
    mixer = case.build()
    for length in LENGTHS:
        x = case.inputs(length)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        expected = _reference_outputs(case, length)
        with case.active(), torch.no_grad():
            assert_close(mixer(x)[0], expected, FLOAT64_ERROR, f"length {length}")
            assert_close(mixer(strided)[0], expected, FLOAT64_ERROR, f"length {length}, not contiguous")
    x = case.inputs(65, dtype=torch.bfloat16)
    with case.active(), torch.no_grad():
        low = case.build(torch.bfloat16)(x)[0]
        require(low.dtype == torch.bfloat16, f"outputs of bfloat16 inputs are {low.dtype}")
        assert_close(low, case.build(torch.bfloat16).float()(x.float())[0], BFLOAT16_ERROR, "bfloat16")


def _reference_outputs(case: Case, length: int) -> Tensor:
    with reference_backends(), torch.no_grad():
        return case.build()(case.inputs(length))[0]


Law = Callable[[Case], None]

LAWS: tuple[Law, ...] = (causality, split, packed, gradients, accounting, lengths)
"""The laws of mixers."""


def hold(case: Case, laws: tuple[Law, ...]) -> None:
    """Hold a case to the laws.

    Raises:
        LawBroken: one does not hold; it names the layer, the law and the case.
        ValueError: there are no laws.
    """
    if not laws:
        raise ValueError("laws: expected at least one, got none, which every mixer obeys")
    for law in laws:
        try:
            law(case)
        except LawBroken as broken:
            names = {"layer": case.layer.__name__, "law": law.__name__, "case": str(case)}
            raise LawBroken(broken.detail, **names) from None
        except Exception as failure:
            failure.add_note(f"in the law of {law.__name__}, on the case {case}")
            raise
