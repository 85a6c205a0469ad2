"""A mixer from outside the package is held to the laws by one call, and a broken one is caught by the right law."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqarch.layers import CHANNEL_MIXERS, Mixer
from seqarch.layers.channel.mlp import Mlp
from seqarch.ops import OPS
from seqarch.testing import (
    CHANNEL_LAWS,
    LAWS,
    LawBroken,
    channel_mixer_cases,
    check_channel_mixer,
    check_mixer,
    mixer_cases,
)

FILE = '''
"""Linear attention with a fixed decay and one head."""

from dataclasses import dataclass

import torch
from torch import nn

from seqarch import ops
from seqarch.layers import LayerConfig
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState


@dataclass(frozen=True, kw_only=True)
class FadingConfig(LayerConfig):
    decay: float = 0.9


class Fading(LinearMixer):
    Config = FadingConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.d_model
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.state_shape = (1, width, width)

    def mix(self, x, state, cu_seqlens):
        q, k, v = self.qkv_proj(x).unsqueeze(2).chunk(3, dim=-1)
        log_decay = torch.full((1,), self.config.decay, dtype=self.state_dtype).log()
        o, after = ops.linear_attention(q, k, v, log_decay, state=state.recurrent, cu_seqlens=cu_seqlens)
        return self.out_proj(o.squeeze(2)), RecurrentState(None, after)
'''


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file above, as a module from outside the package."""
    (tmp_path / "fading.py").write_text(FILE)
    spec = importlib.util.spec_from_file_location("fading", tmp_path / "fading.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fading", module)
    spec.loader.exec_module(module)
    return module


def test_a_mixer_from_outside_is_held_to_the_laws_on_every_backend(outsider: ModuleType):
    held = check_mixer(outsider.Fading, d_model=16, options=[{}, {"decay": 0.5}])
    backends = {case.backend for case in held}
    assert len(held) == 2 * len(backends)
    assert {OPS["linear_attention"].reference, "recurrent_torch"} <= backends
    assert str(held[0]).startswith("Fading()-linear_attention-")
    assert held == mixer_cases(outsider.Fading, d_model=16, options=[{}, {"decay": 0.5}])


OWN_TESTS = """
import pytest
from fading import Fading

from seqarch.testing import LAWS, mixer_cases


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", mixer_cases(Fading, d_model=16), ids=str)
def test_case(case, law):
    law(case)
"""


def test_a_pytest_of_ones_own_needs_nothing_else(tmp_path: Path, outsider: ModuleType):
    (tmp_path / "test_fading.py").write_text(OWN_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "test_fading.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(LAWS) * len(mixer_cases(outsider.Fading))} passed" in done.stdout


def test_the_random_numbers_of_the_caller_are_left_alone(outsider: ModuleType):
    before = torch.get_rng_state()
    case = mixer_cases(outsider.Fading)[0]
    assert torch.equal(case.build().qkv_proj.weight, case.build().qkv_proj.weight)
    assert torch.equal(torch.get_rng_state(), before)


def acausal(original: Callable) -> Callable:
    return lambda self, x, state, cu_seqlens: original(self, x + x.mean(1, keepdim=True), state, cu_seqlens)


def blind(original: Callable) -> Callable:
    return lambda self, x, state, cu_seqlens: original(self, 0 * x, state, cu_seqlens)


def forgets_its_state(original: Callable) -> Callable:
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        empty = state._replace(recurrent=torch.zeros_like(state.recurrent))
        return original(self, x, empty, cu_seqlens)

    return mix


def returns_another_state(original: Callable) -> Callable:
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        y, after = original(self, x, state, cu_seqlens)
        return y, after if x.shape[1] < 69 else after._replace(recurrent=2 * after.recurrent)

    return mix


def mixes_packed_sequences(original: Callable) -> Callable:
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        if cu_seqlens is not None:
            x = x + 0.1 * x.cumsum(1)
        return original(self, x, state, cu_seqlens)

    return mix


def keeps_gradients_from_its_state(original: Callable) -> Callable:
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        return original(self, x, state._replace(recurrent=state.recurrent.detach()), cu_seqlens)

    return mix


def widens_bfloat16(original: Callable) -> Callable:
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        y, after = original(self, x, state, cu_seqlens)
        return (y.float() if y.dtype == torch.bfloat16 else y), after

    return mix


BROKEN_MIX = {
    acausal: ("causality", "outputs before the change at 1: error"),
    blind: ("causality", "token 0 does not see itself"),
    forgets_its_state: ("split", r"outputs of the split \(1, 69\): error .*, bound 1e-10"),
    returns_another_state: ("split", r"after the split \(64, 6\): error"),
    mixes_packed_sequences: ("packed", "sequence 0: error"),
    keeps_gradients_from_its_state: ("gradients", "state 0 receives no gradient"),
    widens_bfloat16: ("lengths", "outputs of bfloat16 inputs are torch.float32"),
}


@pytest.mark.parametrize("broken", BROKEN_MIX, ids=lambda broken: broken.__name__)
def test_a_broken_mixer_is_caught_by_the_law_that_it_breaks(outsider: ModuleType, broken: Callable):
    law, detail = BROKEN_MIX[broken]
    kind = type("Broken", (outsider.Fading,), {"mix": broken(outsider.Fading.mix)})
    with pytest.raises(LawBroken, match=f"Broken breaks the law of {law}: {detail}") as raised:
        check_mixer(kind, d_model=16)
    found = raised.value
    assert (found.layer, found.law) == ("Broken", law)
    assert found.case in map(str, mixer_cases(kind, d_model=16))


def with_spare_parameter(self: Any, config: Any) -> None:
    type(self).__base__.__init__(self, config)
    self.spare = nn.Parameter(torch.zeros(3))


BROKEN_METHODS = {
    "state_bytes": (lambda self, length, batch_size=1: 8 * batch_size * length, "state_bytes after 1 tokens in .*: co"),
    "flops": (lambda self, length, batch_size=1: 7, "flops of 1 tokens: counted [0-9]+, the layer says 7"),
    "step_flops": (lambda self, length, batch_size=1: 7, "step_flops after 1 tokens: counted [0-9]+, the layer says 7"),
}


@pytest.mark.parametrize("method", BROKEN_METHODS)
def test_wrong_accounts_are_caught(outsider: ModuleType, method: str):
    wrong, detail = BROKEN_METHODS[method]
    kind = type("Broken", (outsider.Fading,), {method: wrong})
    with pytest.raises(LawBroken, match=f"Broken breaks the law of accounting: {detail}"):
        check_mixer(kind, d_model=16)


def test_a_parameter_that_nothing_depends_on_is_caught(outsider: ModuleType):
    kind = type("Broken", (outsider.Fading,), {"__init__": with_spare_parameter})
    with pytest.raises(LawBroken, match="the law of gradients: spare receives no gradient"):
        check_mixer(kind, d_model=16)


def test_what_a_mixer_raises_itself_names_law_and_case(outsider: ModuleType):
    def mix(self: Any, x: Tensor, state: Any, cu_seqlens: Any) -> Any:
        if cu_seqlens is not None:
            raise NotImplementedError("no packing yet")
        return outsider.Fading.mix(self, x, state, cu_seqlens)

    kind = type("Unfinished", (outsider.Fading,), {"mix": mix})
    with pytest.raises(NotImplementedError, match="no packing yet") as raised:
        check_mixer(kind, d_model=16)
    (note,) = raised.value.__notes__
    assert note.startswith("in the law of packed, on the case Unfinished()-linear_attention-")
    others = [law for law in LAWS if law.__name__ != "packed"]
    assert check_mixer(kind, d_model=16, laws=others)


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        (Mlp, [{}], "expected a subclass of Mixer, the class itself, got <class .*Mlp"),
        (None, [{}], "expected a subclass of Mixer, the class itself, got None"),
        ("own", {"decay": 0.5}, "options: expected mappings, one for each setting to try, got 'decay'"),
        (Mixer, [{}], "expected a subclass of Mixer, the class itself, got <class .*Mixer"),
        ("own", {}, r"options: expected at least one mapping, as \[\{\}\] for the defaults, got none"),
        ("own", [], "options: expected at least one mapping"),
        ("own", [{"decoy": 0.5}], "mixer 'Fading' has no option 'decoy': .*Did you mean 'decay'"),
    ],
)
def test_wrong_arguments_are_named(outsider: ModuleType, mixer: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check_mixer(outsider.Fading if mixer == "own" else mixer, options=options)


def test_a_mixer_is_not_held_to_nothing(outsider: ModuleType):
    with pytest.raises(ValueError, match="laws: expected at least one, got none"):
        check_mixer(outsider.Fading, laws=())


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_the_channel_mixers_obey_their_laws_on_every_backend(name: str):
    held = check_channel_mixer(CHANNEL_MIXERS[name])
    assert {case.op for case in held} == ({"experts"} if name == "moe" else {""})


class Mean(Mlp):
    """Mixes tokens, which a channel mixer must not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.mean(1, keepdim=True)


class Last(Mlp):
    """Mixes tokens, in a way that their order shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.roll(1, 1)


class Cheap(Mlp):
    """Costs more than it says."""

    def flops(self, length: int, batch_size: int = 1) -> int:
        return 1


class Spare(Mlp):
    """Has a parameter that nothing depends on."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.spare = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("kind", "law", "detail"),
    [
        (Mean, "tokens_alone", r"a change of token \[0, 4\] changes the outputs at \[\[0, 0\], \[0, 1\]"),
        (Last, "tokens_alone", "outputs of the tokens in reverse order: they differ by"),
        (Cheap, "channel_flops", "flops of 10 tokens: counted [0-9]+, the layer says 1"),
        (Spare, "channel_gradients", "spare receives no gradient"),
    ],
)
def test_a_broken_channel_mixer_is_caught(kind: type[Mlp], law: str, detail: str):
    with pytest.raises(LawBroken, match=f"{kind.__name__} breaks the law of {law}: {detail}"):
        check_channel_mixer(kind)
    with pytest.raises(ValueError, match="expected a subclass of ChannelMixer"):
        channel_mixer_cases(Mixer)  # pyright: ignore[reportArgumentType]


def test_every_law_says_what_it_is():
    for law in (*LAWS, *CHANNEL_LAWS):
        assert law.__doc__


def test_the_library_imports_neither_the_laws_nor_pytest():
    program = "import sys, seqarch, seqarch.layers, seqarch.models\nassert 'seqarch.testing' not in sys.modules\n"
    program += "import seqarch.testing\nassert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
