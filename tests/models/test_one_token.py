"""One decoded token in a single compiled call: the numbers of torch, and only where nobody would miss a thing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from seqarch import ops
from seqarch.decoding.alike import are_alike
from seqarch.decoding.capture import capture
from seqarch.decoding.program import Program
from seqarch.layers import clone_state
from seqarch.layers.state_space.mamba import Mamba
from seqarch.models import LanguageModel, LMConfig, Stack
from seqarch.ops.native import tape
from seqarch.testing import assert_close
from tests.support.one_token import CAPTURED, PARTLY_CAPTURED, Runs, in_torch, make
from tests.support.paths import ROOT

BOUND = 3e-6


@torch.no_grad()
def compare(stack: Stack, rows: int, runs: Runs, programs: int = 1, tokens: int = 6, context: int = 7) -> None:
    """Some tokens after a context, against the same in torch."""
    width = stack.config.d_model
    _, state = stack(torch.randn(rows, context, width), stack.init_state(rows, context + tokens + 1))
    other = clone_state(state)
    for _ in range(tokens):
        x, before = torch.randn(rows, 1, width), runs.count
        y, state = stack(x, state)
        assert runs.count == before + programs
        before = runs.count
        expected, other = in_torch(stack, x, other)
        assert runs.count == before
        assert_close(y, expected, BOUND, "y")
        for own, theirs in zip(pytree.tree_leaves(state), pytree.tree_leaves(other), strict=True):
            if isinstance(own, Tensor) and own.numel():
                assert_close(own, theirs, BOUND, "state")
            elif not isinstance(own, Tensor):
                assert own == theirs


@pytest.mark.parametrize("name", CAPTURED)
def test_every_mixer_equals_torch(name: str, runs: Runs):
    stack = make(name, depth=1, width=64)
    compare(stack, 2, runs, context=40)
    assert stack.token_programs.known[2].captures == 1  # lengths are data
    (said,) = stack.explain_one_token()
    assert said.startswith("compiled; torch: ") if name in PARTLY_CAPTURED else said == "compiled"


def test_torch_gives_numbers_with_gaps_another_shape(runs: Runs):
    """Blocks of several rows, whose count has room to grow."""
    compare(make("moba", depth=1, width=256), 4, runs, context=512)


@pytest.mark.usefixtures("isa")
def test_it_equals_torch_on_every_instruction_set(runs: Runs):
    for pattern in ("mamba/swiglu", "gated_delta_net+attention/mlp", "rwkv7/moe"):
        stack = make(pattern, channels={"mlp": {"activation": "gelu"}}, branch_norm=True)
        for rows in (1, 8):
            compare(stack, rows, runs)


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 5, "expand": 3, "conv_width": 2, "dt_bc_norm": "rms"},
        {"dt_rank": 1, "negative_eigenvalues": True},
        {"d_state": 40, "dt_bc_norm": "rms_without_weights"},
    ],
)
def test_odd_sizes_and_options(options: dict[str, int | str], runs: Runs):
    compare(make(channel="none", mixers={"mamba": options}), 3, runs)


def test_without_the_compiled_library_the_layers_say_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tape, "unavailable", lambda: "it is not installed")
    assert make("mamba attention").explain_one_token() == ["it is not installed"] * 2


def test_what_cannot_be_captured_stands_between(runs: Runs):
    stack = make("2*mamba hyena", depth=6)
    compare(stack, 2, runs, programs=2)
    said = stack.explain_one_token()
    assert said[:2] == ["compiled"] * 2
    assert "cannot be captured" in said[2]
    assert said[3:] == said[:3]


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "both", "norm": "layer"},
        {"norm_placement": "sum", "residual_factors": {"mamba": 2.0}},
        {"parallel": "one_norm"},
        {"residual_streams": 3},
        {"residual_streams": 2, "stream_mixing": "manifold", "stream_output": "weighted"},
        {"pattern": "rwkv7(value_residual=give) 2*rwkv7(value_residual=take)", "depth": 3},
    ],
    ids=str,
)
def test_layers_of_every_form_are_compiled(options: dict[str, Any], runs: Runs):
    stack = make(channel="swiglu", **options)
    compare(stack, 2, runs)
    assert all(said.startswith("compiled") for said in stack.explain_one_token())


def test_constants_beside_the_weights_are_served(runs: Runs):
    options: dict[str, Any] = {
        "output_factors": {"mamba": 0.5, "swiglu": 2.0},
        "input_factors": {"mamba": 3.0},
        "channels": {"swiglu": {"gate_factor": 0.5}},
    }
    compare(make(**options), 1, runs)


def test_a_mixer_of_ones_own_is_compiled(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "own_mixer"))
    stack = make("own_mixer.mixers:LearntRetention", width=32)
    compare(stack, 2, runs)
    assert stack.explain_one_token() == ["compiled"] * 2


class Odd(nn.Module):
    """Operators with options, truths of numbers, and a division by 0, after a norm of its own."""

    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        y = F.softplus(x, beta=20) + F.softplus(x) + F.elu(x, alpha=0.5) + F.elu(x)
        return y + (x > 0).to(x.dtype) * x.relu().bool().to(x.dtype) + torch.nan_to_num(x / 0), (state[0] + y,)


@torch.no_grad()
def test_operators_with_options(runs: Runs):
    layer, x, state = Odd(), torch.randn(2, 1, 16), (torch.zeros(2, 1, 16),)
    program = Program([capture(layer, x, state)], layer.modules(), x, [state])
    expected, (after,) = layer(x, state)
    y, ((found,),) = program.run(x, [(state[0].clone(),)])
    assert_close(y, expected, BOUND)
    assert_close(found, after, BOUND)


class LogSums(nn.Module):
    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        both = x.unflatten(-1, (2, 3)).logsumexp((-2, -1)).unsqueeze(-1)
        return torch.cat([x.logsumexp(-1, keepdim=True), both], -1), (state[0] + 1,)


@torch.no_grad()
def test_logarithms_of_sums_with_infinities_and_without(runs: Runs):
    """Over one axis, which is kept, and over two."""
    layer, x, state = LogSums(), torch.randn(6, 1, 6), (torch.zeros(1),)
    x[1:, 0, :3] = torch.tensor([-torch.inf, 1e4, torch.inf, torch.nan, -1e4])[:, None]
    x[5, 0], x[1, 0, 5] = -torch.inf, 3.0
    program = Program([capture(layer, x, state)], layer.modules(), x, [state])
    assert program.explain() == [[]]
    torch.testing.assert_close(program.run(x, [state])[0], layer(x, state)[0], rtol=BOUND, atol=BOUND, equal_nan=True)


class Functions(nn.Module):
    """Each function that has vector code of its own, one after the other, of ``x [1, 1, 6 n]``."""

    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        functions = (torch.sin, torch.cos, torch.tanh, torch.expm1, torch.log, torch.log1p)
        parts = [function(part) for function, part in zip(functions, x.chunk(6, -1), strict=True)]
        return torch.cat(parts, -1), (state[0] + 1,)


@pytest.mark.usefixtures("isa")
@torch.no_grad()
def test_functions_are_right_over_their_range(runs: Runs):
    """Each number by itself, within some ulp of float64; angles beyond what vector code takes, too."""
    spread = 10.0 ** torch.linspace(-30, 1.9, 300)
    for least, most in ((1.0, 1.0), (1.0, 1e9)):
        angles = torch.cat([spread * least, -spread * most])
        x = torch.cat([angles, angles, *[torch.cat([spread, -spread])] * 2, *[torch.cat([spread, 1 / spread])] * 2])
        layer, state = Functions(), (torch.zeros(1),)
        program = Program([capture(layer, x[None, None], state)], layer.modules(), x[None, None], [state])
        y, _ = program.run(x[None, None], [state])
        expected, _ = layer(x[None, None].double(), state)
        error = (y.double() - expected).abs()
        relative = error / expected.abs()
        waves = 2 * len(angles)  # of sines and cosines the error beside 1 counts
        assert error[..., :waves].max() < 2e-7
        assert relative[..., waves:].max() < 4e-7


@torch.no_grad()
def test_functions_of_what_is_no_number(runs: Runs):
    odd = torch.tensor([0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-44])
    x = torch.cat([odd] * 6)[None, None]
    layer, state = Functions(), (torch.zeros(1),)
    y, _ = Program([capture(layer, x, state)], layer.modules(), x, [state]).run(x, [state])
    expected, _ = layer(x, state)
    finite = expected.isfinite()
    assert_close(y[finite], expected[finite], BOUND)
    assert torch.equal(y.isnan(), expected.isnan())
    large = expected.isinf() & ~torch.isin(torch.arange(x.shape[-1]) // len(odd), torch.tensor(3))
    assert torch.equal(y[large], expected[large])  # exponentials end at exp(87.3), others where they do


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 12])
def test_heads_that_share_keys(kv_heads: int, runs: Runs):
    heads = {"num_heads": 12, "num_kv_heads": kv_heads, "head_dim": 56}  # some vectors, and a rest
    stack = make("attention sliding_window", mixers={"attention": heads, "sliding_window": {**heads, "window": 9}})
    compare(stack, 3, runs, context=70)
    compare(stack, 1, runs, context=2100)  # in all parts that there may be
    assert stack.explain_one_token() == ["compiled"] * 2


def test_lengths_are_data(runs: Runs):
    """One capture serves all lengths up to the cache's capacity; a longer one begins anew, and is right."""
    stack = make("attention sliding_window", mixers={"sliding_window": {"window": 8}})
    compare(stack, 2, runs, tokens=30)
    known = stack.token_programs.known[2]
    assert 1 <= known.captures <= 3


def test_prompts_and_room_of_any_length_need_one_program(runs: Runs):
    model = LanguageModel(LMConfig(vocab_size=50, d_model=64, pattern="attention gated_delta_net", depth=2))
    for length, new in ((5, 6), (9, 3), (30, 20)):
        model.generate([list(range(length))], new)
    assert runs.count == 5 + 2 + 19
    assert model.greedy_token.programs.known[1].captures == 1


def test_a_state_that_takes_ever_other_forms_is_left_to_torch(runs: Runs):
    stack = make("attention")
    with torch.no_grad():
        _, state = stack(torch.randn(1, 5, 96))  # no room reserved
        for _ in range(20):
            _, state = stack(torch.randn(1, 1, 96), state)
    assert runs.count == 0


def test_what_changes_in_a_layer_changes_its_program(runs: Runs):
    stack = make()
    mixer = stack.layers[0].mixers[0]  # type: ignore[union-attr, index]
    compare(stack, 1, runs)
    with torch.no_grad():
        mixer.A_log += 1  # in place, as an optimizer does
    compare(stack, 1, runs)
    mixer.out_proj.weight = nn.Parameter(torch.randn_like(mixer.out_proj.weight))
    compare(stack, 1, runs)
    stack.load_state_dict({name: 2 * value for name, value in stack.state_dict().items()}, assign=True)
    compare(stack, 1, runs)
    stack.layers[1].norm.eps = 0.5  # type: ignore[union-attr]
    compare(stack, 1, runs)


@pytest.mark.parametrize("name", CAPTURED)
def test_layers_that_are_alike_are_captured_once(name: str):
    """After they have run, too, whatever they keep from call to call."""
    stack = make(name, width=64)
    with torch.no_grad():
        stack(torch.randn(1, 3, 64))
    first, second = stack.layers
    assert are_alike([first], [second])
    second.norm.eps = 0.5  # type: ignore[union-attr]
    assert not are_alike([first], [second])


@torch.no_grad()
def warmed(stack: Stack, rows: int = 1) -> object:
    """A state for which the stack has a program."""
    _, state = stack(torch.randn(rows, 3, stack.config.d_model), stack.init_state(rows, 16))
    for _ in range(2):
        _, state = stack(torch.randn(rows, 1, stack.config.d_model), state)
    return state


def test_a_program_keeps_the_memory_that_it_runs_on(runs: Runs):
    """What another thread does between the question whether a program holds and its run."""
    stack = make()
    state = warmed(stack)
    other = clone_state(state)
    ((_, program),) = stack.token_programs.known[1].variants[0]
    x = torch.randn(1, 1, 96)
    expected, _ = program.run(x, state)
    memory = program.watch.hold()
    assert memory is not None
    for parameter in stack.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    torch.testing.assert_close(program.run(x, other)[0], expected, rtol=0, atol=0)
    assert program.watch.hold() is None


def test_hooks_are_not_passed_over(runs: Runs):
    stack, seen = make(), []
    compare(stack, 1, runs)
    mixer = stack.layers[1].mixers[0]  # type: ignore[union-attr, index]
    with mixer.conv.register_forward_hook(lambda *_: seen.append(1)):
        assert "has hooks" in stack.explain_one_token()[1]
        seen.clear()
        compare(stack, 1, runs)  # the first layer alone
    assert len(seen) >= 13  # the context, and six tokens twice; once more, beside, as the other layer is captured
    assert stack.explain_one_token() == ["compiled"] * 2
    compare(stack, 1, runs)


def test_forward_passes_and_parameters_of_others_are_seen_through(runs: Runs):
    class Louder(Mamba):
        def forward(self, *arguments: object) -> tuple[Tensor, object]:
            y, state = super().forward(*arguments)  # type: ignore[arg-type]
            return 2 * y, state

    stack, x = make(), torch.randn(1, 1, 96)
    mixer = stack.layers[1].mixers[0]  # type: ignore[union-attr, index]
    stack.layers[1].mixers[0] = Louder(mixer.config)  # type: ignore[union-attr, index]
    compare(stack, 1, runs)
    nn.utils.parametrize.register_parametrization(mixer.out_proj, "weight", nn.Softsign())
    stack.layers[1].mixers[0] = mixer  # type: ignore[union-attr, index]
    compare(stack, 1, runs)
    nn.utils.parametrize.remove_parametrizations(mixer.out_proj, "weight")
    with torch.no_grad():
        y, _ = stack(x)
        lent = torch.func.functional_call(stack, {n: p * 1 for n, p in stack.named_parameters()}, (x,))[0]
    assert_close(lent, y, BOUND)
    compare(stack, 1, runs)


def test_calls_that_programs_do_not_serve(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    state, runs.count = warmed(stack), 0
    stack(x, clone_state(state))  # gradients may be wanted
    with torch.no_grad():
        stack(torch.randn(1, 2, 96), clone_state(state))
        stack(torch.randn(0, 1, 96))
        stack(x, clone_state(state), cu_seqlens=[0, 1])
        with ops.use_backends(selective_scan="recurrent_torch"):
            stack(x, clone_state(state))
        with torch.autocast("cpu"):
            stack(x, clone_state(state))
        narrow = make().half()
        narrow(x.half(), narrow.init_state(1))
    assert runs.count == 0


def test_a_state_that_gradients_go_through_is_left_as_it_was(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    _, runs.count = warmed(stack), 0
    _, state = stack(torch.randn(1, 3, 96))
    before = [leaf.detach().clone() for leaf in pytree.tree_leaves(state)]
    with torch.no_grad():
        stack(x, state)
    assert runs.count == 0
    assert all(torch.equal(leaf, old) for leaf, old in zip(pytree.tree_leaves(state), before, strict=True))


def test_copies_have_programs_of_their_own(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    state, runs.count = warmed(stack), 0
    with torch.no_grad():
        y, _ = stack(x, clone_state(state))
        for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
            for parameter in stack.parameters():
                parameter.fill_(torch.nan)
            torch.testing.assert_close(other(x, clone_state(state))[0], y, rtol=0, atol=0)
            stack.load_state_dict(other.state_dict())
    assert runs.count == 3


def test_the_result_does_not_depend_on_the_number_of_threads(runs: Runs):
    stack = make("gated_delta_net attention mamba", depth=3, width=512, channel="swiglu")
    state, runs.count = warmed(stack, 2), 0
    x, before, results = torch.randn(2, 1, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(stack(x, clone_state(state))[0])
    finally:
        torch.set_num_threads(before)
    assert runs.count == 3
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_state_that_does_not_fit_is_an_error(runs: Runs):
    stack = make()
    warmed(stack)
    with torch.no_grad(), pytest.raises(ValueError, match="the state has 2 rows, the call 1"):
        stack(torch.randn(1, 1, 96), stack.init_state(2))


def test_generation_runs_on_it(runs: Runs):
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(vocab_size=50, d_model=96, pattern="mamba attention", depth=2))
    text = model.generate([[1, 2, 3], [4, 5, 6]], 8)
    assert runs.count == 7
    with ops.record_backends():
        again = model.generate([[1, 2, 3], [4, 5, 6]], 8)
    assert all(torch.equal(a, b) for a, b in zip(text, again, strict=True))
