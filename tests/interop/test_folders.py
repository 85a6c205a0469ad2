"""Folders of every family: those that ``transformers`` saves are read here, and those saved here are read there."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqarch import LanguageModel
from seqarch import __main__ as page
from seqarch.checkpoints.errors import CheckpointError
from seqarch.interop import FAMILIES, from_transformers, lm_config
from seqarch.interop.file_names import FILE_RULES
from seqarch.interop.zamba2 import HYBRID
from seqarch.layers.hybrid.zamba2 import Zamba2
from seqarch.pretrained import filling
from seqarch.pretrained.families import CHECKED
from seqarch.pretrained.their_settings import CLASSES, MADE_HERE
from seqarch.testing import assert_close
from tests.interop.test_families import BOUND
from tests.support.families import CASES, VARIANTS, build, each_case, is_first, randomised

TOKENS = torch.randint(3, 53, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= set(content.keys())
    return found


def reread(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def sharded(folder: Path, several: bool) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1 or not several


@each_case
@torch.no_grad()
def test_their_folders_are_read_and_ours_are_read_by_them(name: str, changes: dict[str, Any], tmp_path, monkeypatch):
    """In one file and in several, in blocks and whole, in float32 and bfloat16: the numbers of the state dict's way."""
    config, theirs = build(name, changes)
    for dtype, size in ((torch.float32, "50GB"), (torch.bfloat16, "20KB")):
        theirs.to(dtype)
        folder, saved = tmp_path / f"theirs-{size}", tmp_path / f"ours-{size}"
        theirs.save_pretrained(folder, max_shard_size=size)
        sharded(folder, size == "20KB")
        expected = from_transformers(config, theirs.state_dict()).to(dtype).eval()
        model = LanguageModel.from_pretrained(folder)
        monkeypatch.setattr(filling, "BLOCK", 1)
        in_blocks = LanguageModel.from_pretrained(folder)
        monkeypatch.undo()
        for read in (model, in_blocks):
            other = read.state_dict()
            assert {key: tensor.dtype for key, tensor in other.items()} == {
                key: tensor.dtype for key, tensor in expected.state_dict().items()
            }
            assert all(torch.equal(other[key], tensor) for key, tensor in expected.state_dict().items())
            assert (read.head.weight is read.embedding.weight) == config.tie_word_embeddings
        if dtype == torch.float32:
            assert_close(model(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, "logits")
        assert model.origin.family == config.model_type
        model.save_pretrained(saved, family=config.model_type, max_shard_size=size)
        sharded(saved, size == "20KB")
        written = json.loads((saved / "config.json").read_text())
        assert written.pop("dtype") == str(dtype).removeprefix("torch.")
        assert written == {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "dtype"}
        back = reread(saved)
        assert back.dtype == dtype
        other = back.state_dict()
        assert all(torch.equal(other[key], tensor) for key, tensor in theirs.state_dict().items())
        again = LanguageModel.from_pretrained(saved, verify=True)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEW: dict[str, dict[str, Any]] = {
    "bamba": {
        "pattern": "mamba2 attention",
        "mixers": {
            "attention": {"num_heads": 2, "rotary_fraction": 0.5},
            "mamba2": {"head_dim": 16, "d_state": 8, "dt_limit_max": 0.05},
        },
    },
    "falcon_mamba": {
        **{"pattern": "mamba", "channel": "none", "tie_embeddings": True},
        "mixers": {"mamba": {"d_state": 5, "dt_bc_norm": "rms_without_weights"}},
    },
    "lfm2": {
        **{"pattern": "gated_short_conv attention", "tie_embeddings": True},
        "mixers": {"attention": {"num_heads": 2, "qk_norm": True, "norm_eps": 1e-5}},
    },
    "minimax": {
        **{"pattern": f"attention/moe lightning_attention(decay_factor={1 - 1 / (1 + 1e-5) + 1e-5})/moe"},
        **{"mixers": {"lightning_attention": {"num_heads": 2}, "attention": {"num_heads": 2}}},
        **{"norm_placement": "residual", "residual_factors": {"moe": 3.5}, "output_factors": {"attention": 0.5}},
    },
    "xlstm": {
        **{"pattern": "mlstm", "logit_cap": 30.0, "norm_eps": 1e-6},
        "mixers": {"mlstm": {"num_heads": 2, "denominator_eps": 1e-6}},
    },
    "gemma": {
        **{"pattern": "attention", "zero_centred_norms": True, "embedding_scale": 32**0.5, "tie_embeddings": True},
        "channels": {"swiglu": {"activation": "gelu_tanh"}},
    },
    "gemma2": {
        **{"pattern": "sliding_window attention", "zero_centred_norms": True, "embedding_scale": 32**0.5},
        **{"norm_placement": "both", "logit_cap": 5.0, "channels": {"swiglu": {"activation": "gelu_tanh"}}},
        "mixers": {name: {"scale": 0.25, "logit_cap": 4.0} for name in ("attention", "sliding_window")},
    },
    "granite": {
        **{"pattern": "attention", "logit_scale": 0.5, "output_factors": {"attention": 0.5, "swiglu": 0.5}},
        **{"mixers": {"attention": {"scale": 0.3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}}},
    },
    "llama": {
        "pattern": "attention",
        "mixers": {"attention": {"num_kv_heads": 1, "head_dim": 8, "rope_scaling": YARN}},
    },
    "mistral": {"pattern": "sliding_window", "mixers": {"sliding_window": {"window": 5, "rotary_base": 300.0}}},
    "olmo2": {
        **{"pattern": "attention", "norm_placement": "post"},
        "mixers": {"attention": {"qk_norm": True, "qk_norm_scope": "all", "norm_eps": 1e-5}},
    },
    "phi3": {"pattern": "attention", "mixers": {"attention": {"num_heads": 2, "rotary_fraction": 0.5}}},
    "qwen2": {
        "pattern": "attention sliding_window",
        "mixers": {name: {"qkv_bias": True} for name in ("attention", "sliding_window")},
    },
    "qwen3": {"pattern": "attention", "mixers": {"attention": {"qk_norm": True, "norm_eps": 1e-5, "head_dim": 16}}},
    "qwen3_moe": {
        "pattern": "attention/moe attention/swiglu",
        "mixers": {"attention": {"qk_norm": True, "norm_eps": 1e-5}},
    },
    "falcon_h1": {
        **{"pattern": "attention+mamba2", "branch_weights": False, "embedding_scale": 3.0, "logit_scale": 0.5},
        "mixers": {"attention": {"num_heads": 2, "scale": 0.5}, "mamba2": {"in_factors": [0.5, 2.0, 1.0, 1.0, 3.0]}},
        **{"channels": {"swiglu": {"gate_factor": 0.75}}, "output_factors": {"swiglu": 0.5, "attention": 2.0}},
        "input_factors": {"mamba2": 1.5},
    },
    "kimi_linear": {
        "pattern": "kda/swiglu mla/moe kda/moe",
        "depth": 3,
        "mixers": {
            "mla": {"num_heads": 2, "position": "none", "q_lora_rank": 6},
            "kda": {"num_heads": 2, "key_width": 8},
        },
        "channels": {"moe": {"router": "sigmoid", "expert_bias": True, "shared_experts": 1, "weight_scale": 2.5}},
    },
    "jamba": {
        "pattern": "mamba attention/moe mamba",
        "depth": 3,
        "mixers": {"mamba": {"d_state": 5, "dt_bc_norm": "rms"}, "attention": {"num_heads": 2, "position": "none"}},
        "channels": {"moe": {"normalise_weights": False, "hidden": 48}, "swiglu": {"hidden": 48}},
        "norm_eps": 1e-6,
    },
    "nemotron_h": {
        "pattern": "mamba2/none mamba2/mlp attention/moe",
        "depth": 3,
        "mixers": {"mamba2": {"head_dim": 16, "dt_limit_min": 0.001}, "attention": {"position": "none"}},
        "channels": {
            "mlp": {"activation": "squared_relu"},
            "moe": {"gated": False, "activation": "squared_relu", "router": "sigmoid", "expert_bias": True}
            | {"shared_experts": 1},
        },
    },
    "deepseek_v3": {
        "pattern": "mla/moe",
        "channels": {"moe": {"router": "sigmoid", "expert_bias": True, "shared_experts": 2, "num_groups": 2}},
    },
    "deepseek_v32": {
        "pattern": "sparse_mla/moe",
        "mixers": {"sparse_mla": {"q_lora_rank": 6, "top_k": 5, "index_heads": 12}},
        "channels": {"moe": {"router": "sigmoid", "expert_bias": True, "shared_experts": 2, "num_groups": 2}},
    },
    "glm_moe_dsa": {
        "pattern": "sparse_mla(give_index=a)/swiglu sparse_mla(take_index=a)/moe sparse_mla/moe",
        "mixers": {"sparse_mla": {"q_lora_rank": 6, "top_k": 5, "index_heads": 12}},
        "channels": {"moe": {"router": "sigmoid", "expert_bias": True, "shared_experts": 2, "num_groups": 2}},
        "depth": 3,
    },
    "rwkv7": {
        "pattern": "rwkv7(value_residual=give)/none rwkv_channel_mix/none rwkv7(value_residual=take)/none "
        "rwkv_channel_mix/none",
        **{"depth": 4, "norm": "layer", "embedding_norm": "layer", "mixers": {"rwkv7": {"num_heads": 2}}},
    },
    "mamba": {"pattern": "mamba", "channel": "none", "tie_embeddings": True, "mixers": {"mamba": {"d_state": 5}}},
    "mamba2": {"pattern": "mamba2", "channel": "none", "mixers": {"mamba2": {"head_dim": 16, "d_state": 8}}},
    "mixtral": {"pattern": "sliding_window/moe", "mixers": {"sliding_window": {"num_heads": 4, "window": 5}}},
    "qwen3_next": {
        "zero_centred_norms": True,
        "pattern": "gated_delta_net/moe attention/swiglu",
        "mixers": {
            "attention": {
                "num_heads": 2,
                "qk_norm": True,
                "output_gate": True,
                "norm_eps": 1e-5,
                "zero_centred_norms": True,
            },
            "gated_delta_net": {"num_heads": 2, "key_width": 8},
        },
        "channels": {"moe": {"shared_experts": 1, "shared_gate": True}},
    },
    "recurrent_gemma": {
        "zero_centred_norms": True,
        "pattern": "rg_lru sliding_window",
        "tie_embeddings": True,
        "logit_cap": 3.0,
        "embedding_scale": 5.65625,  # sqrt(32), rounded as there
        "mixers": {
            "sliding_window": {"num_heads": 2, "num_kv_heads": 1, "output_bias": True, "rotary_fraction": 0.5},
            "rg_lru": {"num_heads": 2},
        },
        "channels": {"swiglu": {"activation": "gelu_tanh", "bias": True}},
    },
}


def new_model(family: str) -> LanguageModel:
    """A model of ours that the family can hold."""
    torch.manual_seed(0)
    return LanguageModel(**{"vocab_size": 53, "d_model": 32, "depth": 2, **NEW[family]}).eval()


@pytest.mark.parametrize("family", NEW)
@torch.no_grad()
def test_models_made_here_are_read_by_them(family: str, tmp_path):
    model = new_model(family)
    model.save_pretrained(tmp_path / "saved", family=family)
    theirs = reread(tmp_path / "saved")
    assert type(theirs).__name__ == CLASSES[family]
    assert_close(model(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, "logits")
    again = LanguageModel.from_pretrained(tmp_path / "saved")
    assert_close(again(TOKENS)[0], model(TOKENS)[0], BOUND, "logits")


QUICK = ("DeepseekV3ForCausalLM", "Gemma3ForCausalLM", "JambaForCausalLM", "NemotronHForCausalLM")

of_each_case = pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*case, marks=() if case[0] in QUICK and is_first(*case) else pytest.mark.slow) for case in CASES],
)


def options_of(name: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A family, and the options of a model of ours that it can hold."""
    settings = VARIANTS[name][0](**changes)
    config = lm_config(settings)
    return settings.model_type, {field.name: getattr(config, field.name) for field in fields(config)}


@of_each_case
@torch.no_grad()
def test_every_family_holds_models_made_here(name: str, changes: dict[str, Any], tmp_path):
    family, options = options_of(name, changes)
    model = randomised(lambda: LanguageModel(**options))
    model.save_pretrained(tmp_path / "saved", family=family)
    theirs = reread(tmp_path / "saved")
    assert type(theirs).__name__ == name
    assert_close(model(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, "logits")


@of_each_case
def test_models_that_a_family_cannot_hold_are_refused_by_what_differs(name: str, changes: dict[str, Any], tmp_path):
    family, options = options_of(name, changes)
    other = LanguageModel(vocab_size=53, d_model=32, pattern="retention", depth=2)
    with pytest.raises(ValueError, match=f"the model is no {family}: it has no .*, but retention, swiglu"):
        other.save_pretrained(tmp_path / "saved", family=family)
    branches = LanguageModel(**{**options, "branch_norm": True})
    with pytest.raises(ValueError, match=f"the model is no {family}: .*branch_norm=True, expected False"):
        branches.save_pretrained(tmp_path / "saved", family=family)
    assert not list(tmp_path.iterdir())


def test_what_differs_is_named(tmp_path):
    capacity = LanguageModel(
        vocab_size=53, d_model=32, depth=1, pattern="attention/moe", channels={"moe": {"capacity_factor": 1.0}}
    )
    with pytest.raises(ValueError, match=r"stack\.layers\.0\.channel: capacity_factor=1\.0, expected None"):
        capacity.save_pretrained(tmp_path / "saved", family="mixtral")
    mixed = LanguageModel(vocab_size=53, d_model=32, depth=2, pattern="mamba2/none retention/none")
    with pytest.raises(ValueError, match=r"its layers are 'mamba2/none retention/none', expected 'mamba2/none'"):
        mixed.save_pretrained(tmp_path / "saved", family="mamba2")
    unbounded = LanguageModel(**{"vocab_size": 53, "d_model": 32, **NEW["nemotron_h"], "mixers": {}})
    with pytest.raises(ValueError, match=r"time_step_min must be positive, got 0\.0 \(.*is dt_limit_min of mamba2\)"):
        unbounded.save_pretrained(tmp_path / "saved", family="nemotron_h")
    griffin = copy.deepcopy(NEW["recurrent_gemma"])
    del griffin["mixers"]["rg_lru"]
    gates = LanguageModel(**{"vocab_size": 53, "d_model": 32, "depth": 2, **griffin})
    with pytest.raises(ValueError, match=r"decay_gate\.weight is \[1, 32, 32\], expected \[2, 16, 16\]"):
        gates.save_pretrained(tmp_path / "saved", family="recurrent_gemma")


PUBLISHED = {
    "GraniteMoeForCausalLM": {
        *("model.layers.1.block_sparse_moe.router.layer.weight", "model.layers.0.block_sparse_moe.input_linear.weight"),
        "model.layers.0.block_sparse_moe.output_linear.weight",
    },
    "KimiLinearForCausalLM": {
        *("model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_conv1d.weight"),
        *("model.layers.0.self_attn.f_a_proj.weight", "model.layers.2.block_sparse_moe.experts.5.w3.weight"),
        *("model.layers.2.block_sparse_moe.gate.e_score_correction_bias", "model.layers.0.self_attn.dt_bias"),
        "model.layers.2.block_sparse_moe.shared_experts.up_proj.weight",
    },
    "MixtralForCausalLM": {
        *("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    },
    "Qwen2MoeForCausalLM": {
        *("model.layers.1.mlp.experts.5.down_proj.weight", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        *("model.layers.0.mlp.shared_expert_gate.weight", "model.layers.0.self_attn.k_proj.bias"),
    },
    "Qwen3NextForCausalLM": {
        *("model.layers.0.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.gate.weight"),
    },
}
"""Names in published files, from the releases' indices."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_have_the_names_of_published_ones(name: str, tmp_path):
    """And those that hold the state dict itself, as one that was saved by hand, are read too."""
    config, theirs = build(name, {})
    theirs.save_pretrained(tmp_path / "theirs")
    model = LanguageModel.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "saved", family=config.model_type)
    names = names_in(tmp_path / "saved")
    assert names >= PUBLISHED[name]
    assert not [key for key in names if "experts.gate_up_proj" in key or "forget_gate" in key]
    save_file(theirs.state_dict(), tmp_path / "theirs" / "model.safetensors")
    read = LanguageModel.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


def test_names_of_earlier_files_and_unused_tensors(tmp_path):
    """``embedding`` in Mamba's first files, no prefix in those without a head, tensors that no model reads."""
    _, theirs = build("MambaForCausalLM", {})
    theirs.save_pretrained(tmp_path)
    model, tensors = LanguageModel.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    earlier = {key.replace("embeddings.", "embedding."): tensor for key, tensor in tensors.items()}
    bare = {key.removeprefix("backbone."): tensor for key, tensor in tensors.items()}
    doubled = {**tensors, "lm_head.weight": tensors["backbone.embeddings.weight"].clone()}
    for content in (earlier, bare, doubled, {**tensors, "backbone.layers.0.rotary_emb.inv_freq": torch.ones(1)}):
        save_file(content, tmp_path / "model.safetensors")
        read = LanguageModel.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
        assert read.head.weight is read.embedding.weight
    doubled["lm_head.weight"] += 1
    save_file(doubled, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embedding\.weight and head\.weight are one parameter"):
        LanguageModel.from_pretrained(tmp_path)


def _drop(key: str):
    return lambda tensors: tensors.pop(key)


def _reshape(key: str):
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
WRONG = [
    (_drop("model.norm.weight"), "  missing: model.norm.weight$"),
    (_drop(EXPERT.format(0)), r"  missing: model\.layers\.1\.block_sparse_moe\.experts\.\{\}\.w1\.weight\n"),
    (_drop(EXPERT.format(3)), r"  left over: model\.layers\.1\.block_sparse_moe\.experts\.3\.w3\.weight"),
    (lambda tensors: tensors.update(more=torch.zeros(2)), "  left over: more$"),
    (_reshape("model.norm.weight"), r"model\.norm\.weight is \[31\], expected \[32\] by config\.json"),
    (
        _reshape(EXPERT.format(2)),
        r"experts\.2\.w1\.weight is torch\.float32 \[23, 32\], expected the same as .*experts\.0",
    ),
    (_reshape("model.layers.0.self_attn.q_proj.weight"), r"q_proj.* expected sizes along dimension 0 of"),
    (_reshape("model.layers.0.block_sparse_moe.gate.weight"), r"gate\.weight is \[3, 32\], expected \[4, 32\]"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_tensors_are_named(change, message, tmp_path):
    _, theirs = build("MixtralForCausalLM", {})
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.from_pretrained(tmp_path)


def test_wrong_settings_are_named(tmp_path):
    _, theirs = build("MixtralForCausalLM", {})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"quantization_config": {"quant_method": "awq"}}, "quantised models are not read"),
        (
            {"attention_dropout": 0.1},
            r"config\.json: mixtral: these settings have no counterpart here: attention_dropout=0.1",
        ),
        ({"num_local_experts": 5}, r"gate_up_proj.*expected|gate\.weight is \[4, 32\], expected \[5, 32\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            LanguageModel.from_pretrained(tmp_path)


def test_weights_where_theirs_has_a_constant_are_refused(tmp_path):
    learnt = LanguageModel(**{"vocab_size": 53, "d_model": 32, "depth": 2, **NEW["falcon_h1"], "branch_weights": True})
    with pytest.raises(ValueError, match="the model is no falcon_h1: branch_weights=True, expected False"):
        learnt.save_pretrained(tmp_path / "saved", family="falcon_h1")
    assert not list(tmp_path.iterdir())


def test_a_block_of_attention_that_computes_something_else_is_refused(tmp_path):
    _, options = options_of("Zamba2ForCausalLM", {})
    block = options["mixers"][HYBRID]
    for change, message in (
        ({"attention": {**block["attention"], "scale": None}}, r"the scale of its attention is None, expected 0\."),
        ({"norm_eps": 1e-3}, r"norm_eps=0\.001, expected"),
    ):
        model = LanguageModel(**{**options, "mixers": {**options["mixers"], HYBRID: {**block, **change}}})
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "saved", family="zamba2")
    alone = LanguageModel(**{**options, "pattern": HYBRID, "depth": 1})
    with pytest.raises(ValueError, match=r"its hybrid layers have no adapters, expected \(share="):
        alone.save_pretrained(tmp_path / "saved", family="zamba2")
    assert not list(tmp_path.iterdir())


def test_a_mixer_made_of_others_goes_by_its_path_or_its_short_name(tmp_path):
    family, options = options_of("Zamba2ForCausalLM", {})
    assert HYBRID == family == "zamba2"
    path = f"{Zamba2.__module__}:{Zamba2.__name__}"
    options["pattern"] = options["pattern"].replace(HYBRID, path)
    for option in ("mixers", "norm_placements"):
        options[option] = {path if name == HYBRID else name: value for name, value in options[option].items()}
    model = randomised(lambda: LanguageModel(**options))
    assert isinstance(model.stack.layers[1].mixers[0], Zamba2)  # type: ignore[union-attr, index]
    model.save_pretrained(tmp_path / "saved", family=family)
    read = LanguageModel.from_pretrained(tmp_path / "saved")
    assert path not in read.config.pattern
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


def test_every_family_has_a_class_and_rules_are_of_families():
    assert all(re.fullmatch("[a-z][a-z0-9_]*", family) for family in FAMILIES)
    assert {module.Settings.model_type: module for module in FAMILIES.values()} == FAMILIES
    assert {VARIANTS[name][0]().model_type: name for name in VARIANTS} == CLASSES
    assert NEW.keys() <= MADE_HERE.keys() == FAMILIES.keys()
    assert FILE_RULES.keys() <= FAMILIES.keys()


def test_the_page_of_families_has_what_was_measured_with_this_version(capsys):
    record = json.loads(CHECKED.read_text())
    assert record["transformers"] == transformers.__version__, "run python -m tests.support.checked_families"
    assert record["families"].keys() == FAMILIES.keys(), "run python -m tests.support.checked_families"
    page.main(["families"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1 : len(FAMILIES) + 1]] == [*FAMILIES]
    for family, found in record["families"].items():
        assert all(found[key] <= BOUND for key in ("logits", "steps", "gradients"))
        assert f"{family} " in shown
        assert CLASSES[family] in shown


@torch.no_grad()
def test_the_text_of_a_folder_of_text_and_images_is_read(tmp_path):
    """As a hub has Qwen3.5: its settings within others, its tensors beside those of images and of further heads."""
    _, theirs = build("Qwen3_5ForCausalLM", {})
    theirs.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    del text["tie_word_embeddings"]
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = {f"model.language_model.{name}": tensor for name, tensor in theirs.model.state_dict().items()}
    images = {"model.visual.patch_embed.proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(2)}
    head = {"lm_head.weight": theirs.lm_head.weight.data}
    save_file({**tensors, **images, **head}, tmp_path / "model.safetensors", {"format": "pt"})
    model = LanguageModel.from_pretrained(tmp_path)
    assert model.origin.family == "qwen3_5_text"
    assert_close(model(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, "logits")
