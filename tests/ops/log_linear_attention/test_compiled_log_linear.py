"""The compiled kernel of log-linear attention beyond the common contract: instruction sets, threads, dtypes, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops.log_linear_attention import OP, chunk_cpp
from seqarch.ops.native import cpu_library
from seqarch.testing import assert_close

ISAS = cpu_library.supported_isas()
RULES = ("linear", "delta")
pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled library is missing")


def make(
    rule: str, T=70, B=2, G=2, H=4, K=20, V=37, levels=10, decays=True, rows: int | None = None
) -> dict[str, Tensor]:
    """Inputs in float64, with states at every place of the counter, of which a call reads those that exist."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    k = F.normalize(draw(B, T, G, K), dim=-1)
    given = {"q": draw(B, T, G, K), "k": k, "v": draw(B, T, H, V), "level_weight": draw(B, T, H, levels)}
    given |= {"beta": 2 * torch.rand(B, T, H, dtype=torch.float64)} if rule == "delta" else {}
    given |= {"log_decay": -torch.rand(B, T, H, dtype=torch.float64)} if decays else {}
    return given | {"state": draw(rows or B, H, levels - 1, K, V)}


def held(given: dict[str, Tensor], *before: int) -> dict[str, Tensor]:
    """With zeros at the places of the counter that rows with so many tokens do not have."""
    there = torch.tensor([[count >> place & 1 for place in range(given["state"].shape[2])] for count in before])
    return given | {"state": given["state"] * there[:, None, :, None, None]}


def gradients(backend: str, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Both results, and the gradients of a weighted sum of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = ops.log_linear_attention(**leaves, **options, backend=backend)
    torch.manual_seed(1)
    torch.stack([(each * torch.randn(each.shape)).sum() for each in results]).sum().backward()
    found = {"o": results[0].detach(), "last state": results[1].detach()}
    return found | {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("rule", RULES)
def test_every_instruction_set_equals_the_reference(rule: str):
    cases: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"T": 200}, (0, 0)),
        ({"T": 131, "K": 33, "V": 16, "G": 1, "decays": False}, (0, 0)),
        ({"T": 65, "K": 3, "V": 5, "G": 4}, (37, 191)),
        ({"T": 1, "V": 1}, (63, 255)),
        ({"T": 20, "K": 70}, (200, 3)),
        ({"T": 112, "levels": 9}, (144, 16)),
    ]
    for shape, before in cases:
        given = held(make(rule, **shape), *before)
        right = gradients("recurrent_torch", given, before=before)
        for isa in ISAS:
            with cpu_library.use_isa(isa):
                found = gradients("chunk_cpp", given, before=before)
            for name, expected in right.items():
                assert_close(found[name], expected, 1e-11, f"{isa}, {shape}: {name}")


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_go_on_from_different_tokens(rule: str):
    offsets, before = (0, 0, 64, 65, 65, 130, 200, 200), (5, 0, 63, 0, 1, 100, 64)
    given = held(make(rule, B=1, T=200, rows=7), *before)
    found = gradients("chunk_cpp", given, before=before, cu_seqlens=offsets)
    for name, expected in gradients("recurrent_torch", given, before=before, cu_seqlens=offsets).items():
        assert_close(found[name], expected, 1e-11, name)


@pytest.mark.parametrize("rule", RULES)
def test_float32_is_within_its_rounding(rule: str):
    given = make(rule, T=300)
    found = gradients("chunk_cpp", {name: x.float() for name, x in held(given, 0, 0).items()})
    for name, expected in gradients("recurrent_torch", held(given, 0, 0)).items():
        assert_close(found[name].double(), expected, 1e-5, name)


@pytest.mark.parametrize("rule", RULES)
def test_results_do_not_depend_on_the_number_of_threads(rule: str):
    before = torch.get_num_threads()
    for H, V in ((12, 37), (1, 150)):
        given, results = {name: x.float() for name, x in held(make(rule, 130, 1, 1, H, V=V), 0).items()}, []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(gradients("chunk_cpp", given))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other), H


@pytest.mark.parametrize("rule", RULES)
def test_numbers_that_are_not_finite_stay_in_their_sequence(rule: str):
    """Also where buffers are used again for the next one, rows are shorter than vectors, and places of the counter hold
    what no token stands for."""
    given = {name: x.float() for name, x in make(rule, B=1, T=140, K=5, V=3, rows=3).items()}
    spoiled = {name: x.clone() for name, x in given.items()}
    for name in ("q", "k", "v", "level_weight"):
        spoiled[name][:, 5] = torch.nan
    spoiled["state"][0], spoiled["state"][1:, :, 3:] = torch.inf, torch.nan
    options = {"before": (1, 7, 5), "cu_seqlens": (0, 70, 75, 140)}
    clean, found = (gradients("chunk_cpp", each, **options) for each in (given, spoiled))
    for name in ("o", "gradient of q", "gradient of k", "gradient of v", "gradient of level_weight"):
        assert torch.equal(clean[name][:, 70:], found[name][:, 70:]), name
    for name in ("last state", "gradient of state"):
        assert torch.equal(clean[name][1:], found[name][1:]), name


@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_several_dtypes(rule: str):
    given = {name: x.float() for name, x in held(make(rule), 0, 0).items()}
    expected, last = ops.log_linear_attention(**given, backend="recurrent_torch")
    for name, dtype in (
        ("v", torch.bfloat16),
        ("q", torch.float16),
        ("level_weight", torch.bfloat16),
        ("log_decay", torch.float64),
    ):
        mixed = given | {name: given[name].to(dtype)}
        o, state = ops.log_linear_attention(**mixed, backend="chunk_cpp")
        assert o.dtype == mixed["v"].dtype
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(o.float(), expected, 1e-2, name)
        assert_close(state.float(), last, 1e-2, name)


@pytest.mark.parametrize("rule", RULES)
def test_without_heads_of_values_the_gradients_are_0(rule: str):
    for name, found in gradients("chunk_cpp", make(rule, H=0)).items():
        assert torch.equal(found, torch.zeros_like(found)), name


@pytest.mark.slow
def test_the_custom_operators_keep_torchs_rules():
    for rule in RULES:
        given = {name: x.float() for name, x in make(rule, T=7).items()}
        plain = OP.inputs(**given, scale=0.5, before=(3, 0)).values()
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in plain]
        torch.library.opcheck(chunk_cpp.operator.operator, tuple(leaves))
        results, needed = list(chunk_cpp.operator.operator(*plain)), [isinstance(x, Tensor) for x in plain]
        torch.library.opcheck(chunk_cpp.operator.gradient, (*plain, *results, needed))


@pytest.mark.parametrize("rule", RULES)
def test_torch_compile_sees_one_graph(rule: str):
    given = {name: x.float() for name, x in make(rule).items()}
    expected = ops.log_linear_attention(**given, before=3)
    compiled = torch.compile(
        lambda **leaves: ops.log_linear_attention(**leaves, before=3), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(**given), expected)
