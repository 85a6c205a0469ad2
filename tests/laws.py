"""The laws that every mixer obeys, on every backend that runs here.

Each law is a function of a case; ``tests/layers/test_laws.py`` applies all of them to every case. A case is a mixer,
options of it, and one backend of one of the operations it uses. Kernel error is the RMS of the difference over the
RMS of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.layers import MIXERS, build_mixer, clone_state, measured_state_bytes
from seqarch.layers.mixer import Mixer
from seqarch.ops import OPS, Call

D_MODEL = 32
LENGTHS = (1, 2, 63, 64, 65, 130)
FLOAT64_ERROR = 1e-10
BFLOAT16_ERROR = 0.05
"""Parameters, inputs and states in bfloat16 (8 bits of mantissa) against the same rounded parameters in float32."""


def _transform(length: int, numbers: int) -> int:
    """A real transform of n numbers counts as 2.5 n log2 n."""
    return round(2.5 * length * math.log2(length)) * numbers // length


FFT_FLOPS: dict[Any, Any] = {
    torch.ops.aten._fft_r2c: lambda x, dims, *_, out_shape, **__: _transform(x[dims[0]], math.prod(x)),
    torch.ops.aten._fft_c2r: lambda x, dims, *_, out_shape, **__: _transform(out_shape[dims[0]], math.prod(out_shape)),
}
"""What torch's counter does not know."""

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"num_kv_heads": 1, "num_heads": 4, "qk_norm": True, "output_gate": True, "rotary_fraction": 0.5},
        {"conv_width": 4, "position": "none", "output_bias": True},
    ],
    "based": [{"num_heads": 2, "key_width": 4, "window": 16}],
    "big_bird": [{"block_size": 16, "num_heads": 2, "window_blocks": 2, "global_blocks": 1, "random_blocks": 2}],
    "moba": [{"block_size": 16, "num_heads": 4, "num_kv_heads": 2}],
    "dsa": [
        {"num_heads": 4, "num_kv_heads": 2, "top_k": 3},
        {"top_k": 2, "position": "none", "rotary_fraction": 0.5},
    ],
    "delta_net": [{"num_heads": 2, "negative_eigenvalues": True}, {"conv_width": 0}],
    "gated_delta_net": [{"num_heads": 2, "num_key_heads": 1, "key_width": 8, "negative_eigenvalues": True}],
    "gated_delta_net_2": [{"num_heads": 2, "num_key_heads": 1, "expand_v": 0.5, "negative_eigenvalues": True}],
    "gated_delta_product": [{"num_heads": 2, "num_key_heads": 1, "steps": 3, "negative_eigenvalues": False}],
    "gla": [{"num_heads": 2, "temperature": 1.0, "conv_width": 3, "negative_eigenvalues": True}],
    "hgrn": [{"lower_bound": 0.5, "complex_state": False}],
    "hgrn2": [{"num_heads": 2, "lower_bound": 0.5, "conv_width": 3}],
    "hyena": [{"order": 3, "length": 16, "filter_width": 8, "filter_features": 2}],
    "kda": [{"num_heads": 2, "key_width": 8, "expand_v": 2.0, "gate_rank": 3, "negative_eigenvalues": True}],
    "mla": [
        {"num_heads": 2, "latent_rank": 24, "query_rank": 5, "value_width": 8, "position": "none"},
        {"num_heads": 2, "latent_rank": 10},
    ],
    "linear_attention": [{"normaliser": "rms", "feature_map": "identity"}, {"num_heads": 2, "conv_width": 3}],
    "longformer": [{"window": 20, "global_tokens": 32, "num_heads": 2, "num_kv_heads": 1}],
    "mamba": [{"d_state": 4, "dt_rank": 1}, {"d_state": 3, "expand": 1, "negative_eigenvalues": True}],
    "mamba2": [
        {"d_state": 8, "head_dim": 16, "n_groups": 2, "negative_eigenvalues": True, "A_min": 8.0, "dt_min": 0.05},
        {"inner": 96, "head_dim": 32, "output_norm": "none"},
    ],
    "mamba3": [
        {"d_state": 8, "head_dim": 16, "n_groups": 2, "rotary_fraction": 1.0},
        {"d_state": 8, "head_dim": 16, "mimo_rank": 3, "output_norm": True},
    ],
    "min_gru": [{"expand": 2, "candidate": "positive", "negative_eigenvalues": True}],
    "mlstm": [{"num_heads": 2, "forget_gate": "exponential", "gate_cap": 0.0, "conv_width": 3}],
    "nsa": [
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "compressed_length": 8,
            "compressed_stride": 4,
            "block_size": 8,
            "selected_blocks": 3,
            "local_blocks": 1,
            "window": 16,
        }
    ],
    "retention": [{"num_heads": 2, "conv_width": 4}],
    "rwkv6": [{"num_heads": 2, "mix_rank": 3, "decay_rank": 5}],
    "rwkv7": [{"num_heads": 2, "decay_rank": 3, "rate_rank": 4, "gate_rank": 5}],
    "rg_lru": [{"inner": 48, "num_heads": 4, "scale_first": True, "negative_eigenvalues": True}],
    "s4d": [{"d_state": 4, "init": "legs"}],
    "sliding_window": [{"window": 2}, {"window": 16, "num_heads": 2}],
}
"""Options beyond the defaults under which a mixer is tried."""


@dataclass(frozen=True)
class Case:
    """A mixer with options, one of whose operations (``""`` if it uses none) is computed by ``backend``."""

    mixer: str
    op: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.mixer}({options})-{self.op}-{self.backend}"

    def build(self, dtype: torch.dtype = torch.float64) -> Mixer:
        torch.manual_seed(0)
        return build_mixer(self.mixer, d_model=D_MODEL, **self.options).to(dtype)

    def active(self) -> AbstractContextManager[None]:
        """The case's backend for its operation, the default for others."""
        return ops.use_backends(**({self.op: self.backend} if self.op else {}))


def reference() -> AbstractContextManager[None]:
    """Every operation by its reference."""
    return ops.use_backends(**{name: op.reference for name, op in OPS.items()})


def cases() -> Iterator[Case]:
    """Every mixer, with its defaults and its variants, on each backend of each operation that it uses."""
    for name in MIXERS:
        for options in ({}, *VARIANTS.get(name, [])):
            mixer = build_mixer(name, d_model=D_MODEL, **options)
            with ops.record_calls() as calls, torch.no_grad():
                mixer(inputs(40, dtype=torch.float32))
            used = dict.fromkeys(call.op for call in calls)
            if not used:
                yield Case(name, "", "", options)
            for op in used:
                own = [call for call in calls if call.op == op]
                for backend in OPS[op].backends:
                    if all(_serves(backend, call) for call in own):
                        yield Case(name, op, backend, options)


ON_A_GPU = ("_triton", "_mm", "_cuda", "_mamba_ssm", "parallel_causal_conv1d", "_flash_attn")
"""How the names of backends end that take tensors of a GPU."""


def available(op: str) -> list[str]:
    """The backends of an operation whose packages are here and that run on a CPU, where these tests' tensors are."""
    here = [name for name, backend in OPS[op].backends.items() if backend.unavailable() is None]
    return [name for name in here if not name.endswith(ON_A_GPU)]


def on_device(op: str) -> list[str]:
    """The backends of an operation whose kernels run on a CUDA device, and that run here."""
    here = [name for name, backend in OPS[op].backends.items() if backend.unavailable() is None]
    return [name for name in here if name.endswith(("_triton", "_cuda"))] if torch.cuda.is_available() else []


def _serves(backend: str, call: Call) -> bool:
    op = OPS[call.op]
    return op.backends[backend].refuse(*op.prepare(*call.args, **call.kwargs)) is None


def inputs(length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what was expected."""
    got, expected = got.detach().double(), expected.detach().double()
    difference, scale = (got - expected).square().mean(), expected.square().mean()
    return float((difference / scale.clamp(min=1e-30)).sqrt())


def assert_close(got: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    assert error(got, expected) <= bound, f"{what}: error {error(got, expected):.2e}, bound {bound:.0e}"


def float_leaves(state: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def causality(case: Case) -> None:
    """1. Changing token t changes no output before t, and some output from t on."""
    mixer, x = case.build(), inputs(70)
    with case.active(), torch.no_grad():
        y = mixer(x)[0]
        for t in (0, 1, 15, 16, 63, 64, 69):
            changed = x.clone()
            changed[:, t] += 1
            z = mixer(changed)[0]
            if t:
                assert_close(z[:, :t], y[:, :t], 1e-13, f"outputs before the change at {t}")
            assert error(z[:, t], y[:, t]) > 1e-6, f"token {t} does not see itself"


def split(case: Case) -> None:
    """2. Split anywhere and carry the state: the same outputs and the same state."""
    mixer, x = case.build(), inputs(70)
    with case.active(), torch.no_grad():
        y, last = mixer(x)
        for pieces in ((1, 69), (64, 6), (33, 1, 36), (2, 3, 0, 65), (1,) * 70):
            state = mixer.init_state(2)
            outputs = []
            for piece in x.split(pieces, dim=1):
                out, state = mixer(piece, state)
                outputs.append(out)
            assert_close(torch.cat(outputs, 1), y, FLOAT64_ERROR, f"outputs of the split {pieces[:5]}")
            _same_continuation(mixer, state, last, f"after the split {pieces[:5]}")


def _same_continuation(mixer: Mixer, state: Any, expected: Any, what: str) -> None:
    """Two states are the same if what follows them is: states of the same meaning may be laid out differently."""
    more = inputs(3, batch=2, seed=2)
    got, wanted = (mixer(more, clone_state(each))[0] for each in (state, expected))
    assert_close(got, wanted, FLOAT64_ERROR, what)


def packed(case: Case) -> None:
    """3. Packed sequences give what they give apart, from no state and from carried ones, and in steps after them."""
    mixer, lengths, more = case.build(), (5, 1, 64, 17), (3, 66, 1, 2)
    offsets, more_offsets = ([sum(sizes[:i]) for i in range(5)] for sizes in (lengths, more))
    x, x2, x3 = inputs(sum(lengths), 1), inputs(sum(more), 1, seed=2), inputs(1, 4, seed=3)
    with case.active(), torch.no_grad():
        y, state = mixer(x, None, torch.tensor(offsets))
        y2, state = mixer(x2, state, torch.tensor(more_offsets))
        y3, _ = mixer(x3, state)
        for i in range(4):
            first, second = slice(offsets[i], offsets[i + 1]), slice(more_offsets[i], more_offsets[i + 1])
            z, alone = mixer(x[:, first])
            assert_close(y[:, first], z, FLOAT64_ERROR, f"sequence {i}")
            z, alone = mixer(x2[:, second], alone)
            assert_close(y2[:, second], z, FLOAT64_ERROR, f"sequence {i} continued")
            assert_close(y3[i : i + 1], mixer(x3[i : i + 1], alone)[0], FLOAT64_ERROR, f"sequence {i}, a step")


def gradients(case: Case) -> None:
    """4. Gradients of inputs, parameters and states equal the reference's, and every parameter receives one."""
    with case.active():
        got = _gradients(case)
    with reference():
        expected = _gradients(case)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} receives no gradient"
        assert_close(got[name], gradient, FLOAT64_ERROR, f"gradient of {name}")


def _gradients(case: Case) -> dict[str, Tensor]:
    mixer, x = case.build(), inputs(70).requires_grad_()
    with reference(), torch.no_grad():
        _, before = mixer(inputs(40, seed=2))
    before = pytree.tree_map_only(Tensor, lambda m: m.requires_grad_() if m.is_floating_point() else m, before)
    starts = float_leaves(before)
    y, after = mixer(x, before)
    total = (y * inputs(70, seed=3)).sum() + (0 if (extra := mixer.auxiliary_loss()) is None else extra)
    for leaf in float_leaves(after):
        weights = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).cos().view_as(leaf)
        total = total + (leaf * weights).sum()
    named = {"x": x, **dict(mixer.named_parameters())} | {f"state {i}": leaf for i, leaf in enumerate(starts)}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def accounting(case: Case) -> None:
    """5. ``state_bytes`` equals the state's tensors, ``flops`` and ``step_flops`` what a counter sees."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mixer = case.build(dtype)
        for length in (1, 3, 70):
            with case.active(), torch.no_grad():
                _, state = mixer(inputs(length, dtype=dtype))
            assert measured_state_bytes(state) == mixer.state_bytes(length, 2), f"{length} tokens in {dtype}"
            reserved = mixer.init_state(2, max_length=length)
            assert measured_state_bytes(reserved) == mixer.state_bytes(length, 2), f"{length} reserved in {dtype}"
    mixer = case.build()
    for length in (1, 37):
        with reference(), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FFT_FLOPS) as counter:
            _, state = mixer(inputs(length))
        assert counter.get_total_flops() == mixer.flops(length, 2), f"FLOPs of {length} tokens"
        with reference(), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FFT_FLOPS) as counter:
            mixer(inputs(1, seed=2), state)
        assert counter.get_total_flops() == mixer.step_flops(length, 2), f"FLOPs of a token after {length}"


def lengths(case: Case) -> None:
    """6. Odd lengths, inputs that are not contiguous, and bfloat16."""
    mixer = case.build()
    for length in LENGTHS:
        x = inputs(length)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        with reference(), torch.no_grad():
            expected = mixer(x)[0]
        with case.active(), torch.no_grad():
            assert_close(mixer(x)[0], expected, FLOAT64_ERROR, f"length {length}")
            assert_close(mixer(strided)[0], expected, FLOAT64_ERROR, f"length {length}, not contiguous")
    x = inputs(65, dtype=torch.bfloat16)
    with case.active(), torch.no_grad():
        low = case.build(torch.bfloat16)(x)[0]
        assert low.dtype == torch.bfloat16
        assert_close(low, case.build(torch.bfloat16).float()(x.float())[0], BFLOAT16_ERROR, "bfloat16")


LAWS = (causality, split, packed, gradients, accounting, lengths)
"""The seventh law, that initialisation survives the stack, is about stacks: ``tests/models/test_stack.py``."""
