"""A greedily decoded token in one call: the tokens of the logits, and only where nobody would miss a thing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import seqarch
from seqarch import ops
from seqarch.models import LanguageModel, LMConfig
from seqarch.models.one_token import Known
from tests.support.one_token import Runs

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def make(pattern: str = "min_gru", **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LMConfig(vocab_size=517, d_model=32, depth=2, pattern=pattern, **options)).eval()


def known(model: LanguageModel) -> Known | None:
    return model.greedy_token.programs.known.get(len(PROMPTS))


def in_torch(model: LanguageModel, tokens: int = 12) -> list[torch.Tensor]:
    with ops.record_backends():  # whoever looks at operations sees them
        return model.generate(PROMPTS, tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "mamba2 attention"},
        {"tie_embeddings": True, "embedding_scale": 3.0, "logit_cap": 5.0, "logit_scale": 0.5},
        pytest.param(
            {"pattern": "mamba", "residual_streams": 2, "stream_output": "weighted", "embedding_norm": "rms"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"pattern": "rwkv7(value_residual=give) rwkv7(value_residual=take)"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_the_logits(options: dict[str, Any], runs: Runs):
    model = make(**options)
    found = model.generate(PROMPTS, 12)
    assert runs.count == 11  # the first comes from the prompts
    programs = [program for _, program in known(model).variants[0]]  # type: ignore[union-attr]
    assert [call.reason for part in programs[0].parts for call in part.lowered.calls] == []  # type: ignore[union-attr]
    for own, expected in zip(found, in_torch(model), strict=True):
        assert torch.equal(own, expected)
    assert runs.count == 11


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_which_nothing_is_compiled_are_not_captured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Their tokens are whole numbers as any model's, and capturing what is then refused took a second."""
    monkeypatch.setattr("seqarch.decoding.capture.capture", lambda *_: pytest.fail("captured"))
    model = make(pattern="gated_delta_net attention").to(dtype)
    model.generate(PROMPTS, 4)
    assert known(model) is not None


def test_bfloat16_takes_the_likeliest_of_float32(runs: Runs):
    model = make(pattern="gated_delta_net attention/swiglu").bfloat16()
    found = model.generate(PROMPTS, 12)
    assert runs.count == 11
    wide = copy.deepcopy(model).float()
    for row in found:
        logits = wide(row[None, :-1])[0][0, -12:]
        chosen = logits.gather(-1, row[-12:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.02 * logits.std()


def test_logits_that_are_none_are_an_error():
    model = make()
    model.generate(PROMPTS, 3)
    with torch.no_grad():
        model.head.weight[100] = float("nan")
    _, state = model.features(torch.tensor(PROMPTS))
    token, largest, _ = model.greedy_token(model, torch.tensor([3, 4]), state)
    assert largest.isnan().all()
    assert token.tolist() == [100, 100]


@pytest.mark.parametrize("name", ["embedding", "norm", "head", "stack"])
def test_hooks_see_their_calls(name: str):
    model, seen = make(), []
    expected = model.generate(PROMPTS, 5)
    getattr(model, name).register_forward_hook(lambda *_: seen.append(1))
    assert all(map(torch.equal, model.generate(PROMPTS, 5), expected))
    assert len(seen) == 5


def test_what_has_changed_is_seen():
    model = make()
    model.generate(PROMPTS, 5)
    with torch.no_grad():
        model.head.weight.neg_()  # in place
        assert all(map(torch.equal, model.generate(PROMPTS, 5), in_torch(model, 5)))
        model.head = copy.deepcopy(model.head)
        model.head.weight.neg_()
        assert all(map(torch.equal, model.generate(PROMPTS, 5), in_torch(model, 5)))
    model.norm.eps = 0.5  # type: ignore[assignment]
    assert all(map(torch.equal, model.generate(PROMPTS, 5), in_torch(model, 5)))
    assert all(map(torch.equal, copy.deepcopy(model).generate(PROMPTS, 5), in_torch(model, 5)))


@pytest.mark.slow
def test_small_weights_and_own_logits():
    model = make(tie_embeddings=False)
    seqarch.quantize(model, "int8", group_size=32)
    assert all(map(torch.equal, model.generate(PROMPTS, 5), in_torch(model, 5)))

    class Own(LanguageModel):
        def logits(self, features: torch.Tensor) -> torch.Tensor:
            return -super().logits(features)

    own = Own(make().config).eval()
    assert all(map(torch.equal, own.generate(PROMPTS, 5), in_torch(own, 5)))
    assert known(own) is None
