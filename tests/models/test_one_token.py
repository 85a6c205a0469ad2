"""One decoded token in a single compiled call: the numbers of torch, and only where nobody would miss a thing."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers import clone_state
from seqarch.layers.state_space.mamba import Mamba
from seqarch.models import LanguageModel, LMConfig, Stack, StackConfig, one_token
from seqarch.ops.native import cpu_library, token
from seqarch.testing import assert_close
from tests.support.paths import ROOT

BOUND = 3e-6


@dataclass
class Runs:
    """How many programs ran."""

    count: int = 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    if (reason := cpu_library.unavailable()) is not None:
        pytest.skip(f"no program runs: {reason}")
    runs, run = Runs(), token.Program.run

    def counted(*arguments: object) -> Tensor | None:
        y = run(*arguments)  # type: ignore[arg-type]
        runs.count += y is not None
        return y

    monkeypatch.setattr(token.Program, "run", counted)
    return runs


@pytest.fixture(params=cpu_library.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with cpu_library.use_isa(request.param):
        yield


def make(pattern: str = "mamba", depth: int = 2, **options: object) -> Stack:
    torch.manual_seed(0)
    stack = Stack(StackConfig(d_model=96, pattern=pattern, depth=depth, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return stack


def in_torch(stack: Stack, x: Tensor, state: object) -> tuple[Tensor, object]:
    with ops.record_backends():  # whoever looks at operations sees them
        return stack(x, state)


def compare(stack: Stack, rows: int, runs: Runs, programs: int = 1) -> None:
    """A few tokens after a context of some, against the same in torch."""
    with torch.no_grad():
        _, state = stack(torch.randn(rows, 7, 96))
        other = clone_state(state)
        for _ in range(5):
            x, before = torch.randn(rows, 1, 96), runs.count
            y, state = stack(x, state)
            assert runs.count == before + programs
            expected, other = in_torch(stack, x, other)
            assert runs.count == before + programs
            assert_close(y, expected, BOUND, "y")
            for own, theirs in zip(_leaves(state), _leaves(other), strict=True):
                assert_close(own, theirs, BOUND, "state")


def _leaves(state: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("channel", ["none", "swiglu", "mlp"])
def test_it_equals_torch_on_every_instruction_set(channel: str, runs: Runs):
    stack = make(channel=channel, channels={"mlp": {"activation": "silu"}})
    for rows in (1, 2, 4):
        compare(stack, rows, runs)


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 5, "expand": 3, "conv_width": 2, "dt_bc_norm": "rms"},
        {"dt_rank": 1},
        {"d_state": 40, "dt_bc_norm": "rms_without_weights"},
    ],
)
def test_odd_sizes(options: dict[str, int | str], runs: Runs):
    compare(make(channel="none", mixers={"mamba": options}), 3, runs)


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_short_convolution(bias: bool, runs: Runs):
    options = {"conv_width": 4, "bias": bias}
    compare(make("gated_short_conv mamba", mixers={"gated_short_conv": options}), 2, runs)


def test_layers_without_instructions_stand_between(runs: Runs):
    stack = make("2*mamba attention", depth=6)
    compare(stack, 2, runs, programs=2)
    said = stack.explain_one_token()
    assert said[:2] == ["compiled"] * 2
    assert "Attention" in said[2]
    assert said[3:] == said[:3]
    assert make("mamba+attention", 1).explain_one_token() == ["mixers side by side have no instructions for one token"]


def test_constants_beside_the_weights_go_by_torch(runs: Runs):
    constants: dict[str, dict[str, Any]] = {
        "factors of what mixers read or give": {"output_factors": {"mamba": 0.5}},
        "norms that multiply by 1 [+] weight": {"zero_centred_norms": True},
        "a factor of the gate": {"channels": {"swiglu": {"gate_factor": 0.5}}},
    }
    for reason, options in constants.items():
        stack = make(channel="swiglu", **options)
        assert all(re.match(f"{reason} ha(s|ve) no instructions", said) for said in stack.explain_one_token())
        compare(stack, 1, runs, programs=0)


@pytest.mark.parametrize("parallel", ["one_norm", "two_norms"])
def test_parallel_blocks_are_compiled(parallel: str, runs: Runs):
    stack = make(channel="swiglu", parallel=parallel)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 1.0, 0.3)
    assert {*stack.explain_one_token()} == {"compiled"}
    compare(stack, 3, runs)


def test_from_no_state_on(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    with torch.no_grad():
        y, _ = stack(x)
        assert runs.count == 1
        assert_close(y, in_torch(stack, x, None)[0], BOUND)


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


def test_a_program_keeps_the_memory_that_it_runs_on(runs: Runs):
    """What another thread does between the question whether a program holds and its run."""
    stack = make()
    program = one_token._write(stack._layers(), 1)[0][0]
    x, (state, other) = torch.randn(1, 1, 96), (stack.init_state(1) for _ in range(2))
    expected = program.run(x, one_token._tensors(state))
    memory = program.hold()
    assert memory is not None
    for parameter in stack.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    torch.testing.assert_close(program.run(x, one_token._tensors(other)), expected, rtol=0, atol=0)
    assert program.hold() is None
    assert runs.count == 2


def test_hooks_and_forward_passes_of_others_are_not_passed_over(runs: Runs):
    stack, seen = make(), []
    compare(stack, 1, runs)
    mixer = stack.layers[1].mixers[0]  # type: ignore[union-attr, index]
    with mixer.conv.register_forward_hook(lambda *_: seen.append(1)):
        compare(stack, 1, runs)  # the first layer alone
    assert len(seen) == 11  # the context, and five tokens twice
    assert stack.explain_one_token() == ["compiled"] * 2
    compare(stack, 1, runs)
    stack.layers[1].mixers[0].select = nn.Linear(192, 38, bias=False)  # type: ignore[union-attr, index]
    assert "Linear has no instructions" in stack.explain_one_token()[1]
    compare(stack, 1, runs)

    class Louder(Mamba):
        def forward(self, *arguments: object) -> tuple[Tensor, object]:
            y, state = super().forward(*arguments)  # type: ignore[arg-type]
            return 2 * y, state

    class Quieter(Mamba):
        def mix(self, *arguments: object) -> tuple[Tensor, object]:
            y, state = super().mix(*arguments)  # type: ignore[arg-type]
            return y / 2, state

    for changed in (Louder, Quieter):
        stack.layers[1].mixers[0] = changed(mixer.config)  # type: ignore[union-attr, index]
        assert f"{changed.__name__} has no instructions" in stack.explain_one_token()[1]
        compare(stack, 1, runs)


def test_parameters_that_are_computed_or_lent_have_no_address(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    mixer = stack.layers[0].mixers[0]  # type: ignore[union-attr, index]
    nn.utils.parametrize.register_parametrization(mixer.out_proj, "weight", nn.Softsign())
    assert "a parameter is a" in stack.explain_one_token()[0]
    compare(stack, 1, runs)
    nn.utils.parametrize.remove_parametrizations(mixer.out_proj, "weight")
    compare(stack, 1, runs)
    with torch.no_grad():
        y, _ = stack(x)
        lent = torch.func.functional_call(stack, {n: p * 1 for n, p in stack.named_parameters()}, (x,))[0]
    assert_close(lent, y, BOUND)
    compare(stack, 1, runs)


def test_calls_that_programs_do_not_serve(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    stack(x)  # gradients may be wanted
    with torch.no_grad():
        stack(torch.randn(5, 1, 96))
        stack(torch.randn(1, 2, 96))
        stack(torch.randn(0, 1, 96))
        stack(x, cu_seqlens=[0, 1])
        with ops.use_backends(selective_scan="recurrent_torch"):
            stack(x)
        with torch.autocast("cpu"):
            stack(x)
        make().double()(x.double())
        stack.bfloat16()(x.bfloat16())
    assert runs.count == 0
    with torch.no_grad():
        make()(x, make()(torch.randn(1, 3, 96).requires_grad_())[1])
    assert runs.count == 1


def test_a_state_that_gradients_go_through_is_left_as_it_was(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    _, state = stack(torch.randn(1, 3, 96))
    before = [leaf.detach().clone() for leaf in _leaves(state)]
    with torch.no_grad():
        stack(x, state)
    assert runs.count == 0
    assert all(torch.equal(leaf, old) for leaf, old in zip(_leaves(state), before, strict=True))


def test_copies_have_programs_of_their_own(runs: Runs):
    stack, x = make(), torch.randn(1, 1, 96)
    with torch.no_grad():
        y, _ = stack(x)
        for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
            for parameter in stack.parameters():
                parameter.fill_(torch.nan)
            torch.testing.assert_close(other(x)[0], y, rtol=0, atol=0)
            stack.load_state_dict(other.state_dict())
    assert runs.count == 3


def test_the_result_does_not_depend_on_the_number_of_threads(runs: Runs):
    torch.manual_seed(0)
    stack = Stack(StackConfig(d_model=512, pattern="mamba", depth=1, channel="swiglu"))
    x, before, results = torch.randn(2, 1, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(stack(x)[0])
    finally:
        torch.set_num_threads(before)
    assert runs.count == 3
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_state_that_does_not_fit_is_an_error():
    stack = make()
    with torch.no_grad(), pytest.raises(ValueError, match="the state has 2 rows, the call 1"):
        stack(torch.randn(1, 1, 96), stack.init_state(2))


def test_generation_runs_on_it(runs: Runs):
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(vocab_size=50, d_model=96, pattern="mamba", depth=2))
    text = model.generate([[1, 2, 3], [4, 5]], 6)
    assert runs.count == 5
    with ops.record_backends():
        assert all(torch.equal(a, b) for a, b in zip(text, model.generate([[1, 2, 3], [4, 5]], 6), strict=True))


def test_every_class_with_instructions_is_listed():
    lines = re.findall(r"^    (\w.*?)  +(seqarch/\S+)$", one_token.__doc__ or "", re.MULTILINE)
    listed = {(name, path) for names, path in lines for name in names.split(", ")}
    found = set()
    for path in (ROOT / "seqarch").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            methods = [each.name for each in ast.iter_child_nodes(node) if isinstance(each, ast.FunctionDef)]
            if isinstance(node, ast.ClassDef) and "one_token" in methods:
                found.add((node.name, path.relative_to(ROOT).as_posix()))
    assert listed == found
