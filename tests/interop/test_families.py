"""Whole models against ``transformers``: logits, gradients, generation, and the tables of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from seqarch import ops
from seqarch.interop import FAMILIES, from_transformers, lm_config, to_transformers, weight_map
from seqarch.models import LanguageModel
from seqarch.testing import assert_close
from tests.support.families import (
    CASES,
    EXAMPLES,
    UNTAUGHT,
    VARIANTS,
    build,
    class_of,
    each_case,
    each_case_slowly,
    each_class_slowly,
    in_float64,
)

BOUND = 1e-5
"""RMS of the difference over the RMS of what is expected, in float32."""

EXACT = 1e-9
"""The same in float64, of the logits and of each gradient or weight by itself. Each is at most 2e-12 here."""

NOT_EXACT = {"Lfm2MoeForCausalLM": BOUND}
"""It adds 1e-6 to the sum that the experts' weights are divided by."""

TOKENS = torch.randint(3, 53, (2, 37), generator=torch.Generator().manual_seed(1))


def build_in_float64(name: str, changes: dict[str, Any]) -> tuple[Any, transformers.PreTrainedModel]:
    with in_float64():
        config, theirs = build(name, changes)
        theirs.set_experts_implementation("eager")
        return config, theirs.double()


@each_case
def test_logits_and_gradients_are_theirs(name: str, changes: dict[str, Any]):
    """Ours are computed on a differentiable function of their parameters, so the gradients pass through the table."""
    config, theirs = build_in_float64(name, changes)
    leaves = dict(theirs.named_parameters())
    with in_float64():
        expected = theirs(TOKENS, use_cache=False).logits
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((expected * weights).sum(), list(leaves.values()), allow_unused=True)

    model = LanguageModel(lm_config(config)).double().train(False)
    buffers = {key: tensor for key, tensor in theirs.state_dict().items() if key in dict(theirs.named_buffers())}
    got, _ = functional_call(model, weight_map(config).to_seqarch({**buffers, **leaves}), (TOKENS,))
    bound = NOT_EXACT.get(name, EXACT)
    assert_close(got, expected, bound, "logits")
    found = torch.autograd.grad((got * weights).sum(), list(leaves.values()), allow_unused=True)
    for key, gradient, wanted in zip(leaves, found, gradients, strict=True):
        if UNTAUGHT in key:
            assert gradient is wanted is None, key
            continue
        assert wanted.any(), key
        assert_close(gradient, wanted, bound, f"gradient of {key}")


@each_case_slowly
@torch.no_grad()
def test_the_imported_model_computes_and_generates_what_theirs_does(name: str, changes: dict[str, Any]):
    """In steps too: each greedy token is the likeliest by their pass over all tokens before it.

    The single tokens of the pieces are of compiled programs. Those of generation have the embedding and the head in
    them, too, which are alike in all families: compiled for the examples, and by torch for the others.
    """
    config, theirs = build(name, changes)
    ours = from_transformers(config, theirs.state_dict()).train(False)
    state, logits = ours.init_state(2, max_length=37), []
    for piece in TOKENS.split([20, 1, 1, 15], dim=1):
        some, state = ours(piece, state)
        logits.append(some)
    expected = theirs(TOKENS, use_cache=False).logits
    assert_close(torch.cat(logits, dim=1), expected, BOUND, "logits in pieces")
    with nullcontext() if name in EXAMPLES else ops.record_backends():
        rows = ours.generate(TOKENS[:, :9], 6)
    for row in rows:
        read = theirs(row[None], use_cache=False).logits[0]
        assert row[9:].tolist() == read[8:-1].argmax(-1).tolist()


@each_case_slowly
@torch.no_grad()
def test_the_weights_come_back_bit_for_bit(name: str, changes: dict[str, Any]):
    """In float32 and in bfloat16, by the table alone, from a model of that dtype and from one of float32.

    What theirs computes from settings and keeps as tensors is here as exact as float32 in a model of float32.
    """
    config, theirs = build(name, changes)
    table = weight_map(config)
    computed = {key: tensor.clone() for key, tensor in theirs.state_dict().items() if key in table.computed}
    for dtype in (torch.float32, torch.bfloat16):
        state = {key: tensor.to(dtype) for key, tensor in theirs.state_dict().items()}
        model = from_transformers(config, state).train(False)
        theirs.load_state_dict({key: tensor.float() for key, tensor in state.items()} | computed)
        assert_close(model(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, f"logits of {dtype}")
        again = table.to_transformers(table.to_seqarch(state))
        wide = to_transformers(config, model)
        narrow = to_transformers(config, model.to(dtype))
        assert again.keys() == wide.keys() == narrow.keys() == state.keys()
        for key, tensor in state.items():
            assert again[key].dtype == dtype
            assert torch.equal(again[key], tensor), key
            assert torch.equal(wide[key], computed.get(key, tensor.float())), key
            assert torch.equal(narrow[key].to(dtype), tensor), key


def learn(parameters: Iterable[Any], loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@each_class_slowly
def test_training_is_theirs_and_goes_back(name: str):
    """Twenty steps of AdamW from the same weights: what moves in theirs moves here, and by as much."""
    config, theirs = build_in_float64(name, {})
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    ours, theirs = LanguageModel(lm_config(config)).double(), theirs.train()
    ours.load_state_dict(weight_map(config).to_seqarch(before))
    tokens, targets = TOKENS[:, :13], TOKENS[:, 1:14]
    learn(ours.parameters(), lambda: ours.loss(tokens, targets))
    with in_float64():
        learn(
            theirs.parameters(),
            lambda: F.cross_entropy(theirs(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten()),
        )
    back, after = to_transformers(config, ours), theirs.state_dict()
    moved = [key for key, tensor in after.items() if not torch.equal(tensor, before[key])]
    assert {key for key, _ in theirs.named_parameters() if UNTAUGHT not in key} <= set(moved)
    bound = NOT_EXACT.get(name, EXACT)
    for key, tensor in after.items():
        assert_close(back[key], tensor, bound, f"{key} after training")
    logits = ours.train(False)(TOKENS)[0]
    theirs.load_state_dict(back)
    with in_float64():
        assert_close(theirs.train(False)(TOKENS, use_cache=False).logits, logits, bound, "logits of the exported model")


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_config_json_says_the_same(name: str, changes: dict[str, Any]):
    config = VARIANTS[name][0](**changes)
    assert lm_config(json.loads(config.to_json_string(use_diff=False))) == lm_config(config)


RELEASED: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "conv", *["full_attention", "conv", "conv"] * 10]},
}
"""What the defaults of a configuration leave out, though their model needs it."""


@each_class_slowly
def test_released_sizes_fit(name: str):
    """The defaults of their configurations are released models', up to 80 billion parameters; here without memory."""
    config = type(VARIANTS[name][0]())(**RELEASED.get(name, {}))
    with torch.device("meta"):
        theirs = class_of(name)(config)
        expected = LanguageModel(lm_config(config)).state_dict()
        own = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}  # each tied tensor once
        made = weight_map(config).to_seqarch({key: own[key] for key in theirs.state_dict() if key in own})
    assert {key: tensor.shape for key, tensor in made.items()} == {key: t.shape for key, t in expected.items()}


@each_class_slowly
def test_tensors_that_do_not_belong_are_all_named(name: str):
    config, theirs = build(name, {})
    state = theirs.state_dict()
    needed = [key for key in state if key not in weight_map(config).computed]
    first, last = needed[1], needed[-2]
    state["model.rotary.inv_freq"] = torch.ones(2)
    del state[first], state[last]
    with pytest.raises(ValueError, match="does not match this model's configuration") as caught:
        from_transformers(config, state)
    assert caught.value.args[0].splitlines()[1:] == [
        *(f"  missing: {key}" for key in sorted([first, last])),
        "  left over: model.rotary.inv_freq",
    ]


@pytest.mark.parametrize("name", ["MambaForCausalLM", "MixtralForCausalLM"])
def test_tensors_of_another_shape_are_errors(name: str):
    config, theirs = build(name, {})
    state = theirs.state_dict()
    for key in (key for key in state if "layers" in key):
        tensor = state[key]
        for other in (tensor[:-1], tensor.reshape(-1) if tensor.ndim > 1 else tensor[None]):
            with pytest.raises(ValueError, match=r"expected|shape"):
                from_transformers(config, {**state, key: other})


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("MambaForCausalLM", {"use_bias": True, "hidden_act": "relu"}, "hidden_act='relu' .only 'silu'., use_bias=True"),
    ("Mamba2ForCausalLM", {"time_step_limit": (0.0, 1.0)}, r"time_step_limit=\[0.0, 1.0\] .only \[0.0, inf\]."),
    ("MixtralForCausalLM", {"attention_dropout": 0.1}, r"mixtral: these settings .* attention_dropout=0.1 .only 0.0."),
    ("MixtralForCausalLM", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional'"),
    ("FalconH1ForCausalLM", {"projectors_bias": True}, "falcon_h1: these settings .* projectors_bias=True"),
    ("Qwen3NextForCausalLM", {"shared_expert_intermediate_size": 20}, "shared_expert_intermediate_size=20"),
    ("RecurrentGemmaForCausalLM", {"hidden_activation": "relu"}, "recurrent_gemma: .* hidden_activation='relu'"),
    ("KimiLinearForCausalLM", {"n_group": 2}, "kimi_linear: these settings .* num_expert_group=2 .only 1."),
]


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED)
def test_settings_without_a_counterpart_are_named(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        lm_config(VARIANTS[name][0](**changes))


def test_tensors_that_follow_from_settings_may_be_absent_and_must_be_theirs():
    config, theirs = build("MiniMaxForCausalLM", {})
    state = theirs.state_dict()
    bare = {key: tensor for key, tensor in state.items() if key not in weight_map(config).computed}
    assert len(state) - len(bare) == 8
    model, whole = from_transformers(config, bare), from_transformers(config, state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    name = "model.layers.2.self_attn.key_decay"
    for other, message in ((state[name] + 1e-4, "is not what its configuration says"), (state[name][1:], "the shape")):
        with pytest.raises(ValueError, match=message):
            from_transformers(config, {**state, name: other})


def test_unknown_families_and_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"unknown model_type 'mamba3'.* Did you mean 'mamba'\?"):
        lm_config({"model_type": "mamba3"})
    with pytest.raises(ValueError, match="the configuration has no setting model_type"):
        lm_config({})
    with pytest.raises(ValueError, match=r"the configuration has model_type list .* expected a family's name"):
        lm_config({"model_type": ["mamba"]})
    assert lm_config({"model_type": "mamba"}) == lm_config(transformers.MambaConfig())


def refusal(config: dict[str, Any]) -> str | None:
    try:
        weight_map(config)
    except ValueError as error:
        return str(error)
    return None


@each_class_slowly
def test_settings_of_another_type_are_named(name: str):
    config = json.loads(VARIANTS[name][0]().to_json_string(use_diff=False))
    weight_map(config)
    for key in config:
        for value in ("x", "64", 0, -1, 1.5, True, [], ["x"], {}, float("nan")):
            message = refusal({**config, key: value})
            assert message is None or key in message or message.startswith("norm_eps must be a small positive number")


def test_lists_of_layers_are_as_long_as_the_model_is_deep():
    config = json.loads(VARIANTS["Qwen3NextForCausalLM"][0]().to_json_string(use_diff=False))
    with pytest.raises(ValueError, match="qwen3_next: layer_types has 1 entries, expected 3, one per layer"):
        lm_config({**config, "layer_types": ["full_attention"]})
    with pytest.raises(
        ValueError, match=r"unknown entry of layer_types 'ful_attention'.*Did you mean 'full_attention'"
    ):
        lm_config({**config, "layer_types": ["ful_attention"] * 3})


def test_every_family_is_tried():
    assert {VARIANTS[name][0]().model_type for name in VARIANTS} == set(FAMILIES)


def test_what_their_model_cannot_hold_is_named():
    config, theirs = build("FalconH1ForCausalLM", {})
    ours = from_transformers(config, theirs.state_dict())
    other = LanguageModel(replace(ours.config, branch_weights=True))
    with pytest.raises(ValueError, match=r"left over: stack\.layers\.1\.branch_weights"):
        to_transformers(config, other)


def test_the_first_release_of_kimi_linear_names_its_layers_otherwise():
    config = json.loads(VARIANTS["KimiLinearForCausalLM"][0]().to_json_string(use_diff=False))
    expected = lm_config(config)
    for key in [key for key in config if key.startswith("linear_") or key.endswith("layer_types")]:
        del config[key]
    config["linear_attn_config"] = {
        "full_attn_layers": [2],
        "kda_layers": [1, 3],
        "head_dim": 16,
        "num_heads": 6,
        "short_conv_kernel_size": 4,
    }
    assert lm_config({**config, "first_k_dense_replace": 1}) == expected


def test_earlier_names_of_the_rotary_settings_are_read():
    config = {**json.loads(VARIANTS["MixtralForCausalLM"][0]().to_json_string(use_diff=False))}
    del config["rope_parameters"]
    assert lm_config({**config, "rope_theta": 500.0}).mixers["attention"]["rotary_base"] == 500.0
    assert lm_config(config).mixers["attention"]["rotary_base"] == 1e6
    for name, fraction in (("Qwen3NextForCausalLM", 0.25), ("RecurrentGemmaForCausalLM", 0.5)):
        other = json.loads(VARIANTS[name][0]().to_json_string(use_diff=False))
        del other["rope_parameters"]
        for given, expected in (({}, fraction), ({"partial_rotary_factor": 0.75}, 0.75)):
            mixers = lm_config({**other, **given}).mixers.values()
            assert [options["rotary_fraction"] for options in mixers if "rotary_fraction" in options] == [expected]
    scaled = lm_config({**config, "rope_scaling": {"type": "yarn", "factor": 4.0}}).mixers["attention"]
    assert scaled["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
