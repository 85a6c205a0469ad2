"""Low-rank adapters of ``peft`` on every projection of every layer, by ``lora_targets``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import seqarch.interop.hf as hf
from seqarch import LanguageModel
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.testing import assert_close, error
from seqarch.testing.laws import FLOAT64_ERROR

TOKENS = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"qk_norm": True, "output_gate": True, "conv_width": 4},
    "moba": {"block_size": 4},
    "dsa": {"top_k": 3},
    "sparse_mla": {"top_k": 3},
    "mla": {"q_lora_rank": 5},
    "lolcats": {"window": 4},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 8},
}
EXPERTS = {"shared_experts": 1, "shared_gate": True, "load_balance_weight": 0.01}


def model_of(pattern: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "d_model": 32, "depth": len(pattern.split()), "channel": "none"}
    layers = {"mixers": {n: OPTIONS[n] for n in OPTIONS if n in pattern}, "channels": {"moe": EXPERTS}}
    return LanguageModel(pattern=pattern, **{**sizes, **layers, **options})


def adapted(model: LanguageModel, *names: str, **options: Any) -> Any:
    wrapped = hf.wrap(model)
    targets: Any = hf.lora_targets(wrapped, *names)
    return get_peft_model(wrapped, LoraConfig(r=3, init_lora_weights=False, **targets, **options))


def run(model: Any, pieces: tuple[int, ...]) -> Tensor:
    cache, outputs = None, []
    with torch.no_grad():
        for piece in TOKENS.split(pieces, dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out.logits)
    return torch.cat(outputs, dim=1)


ALL = " ".join(map("/".join, zip(MIXERS, [*CHANNEL_MIXERS, *["none"] * len(MIXERS)], strict=False)))
"""A layer of each mixer, the channel mixers below the first ones."""


def test_every_matrix_that_multiplies_features_is_a_target():
    model = model_of(ALL)
    stack = {f"stack.{name}" for name, each in model.stack.named_parameters() if each.ndim > 1}
    expected = {name for name in stack if not _no_projection(name)}
    targets = hf.lora_targets(model)
    assert {f"{name}.weight" for name in targets["target_modules"]} | {*targets["target_parameters"]} == expected


@pytest.mark.parametrize(
    "pattern", ["mamba2/moe nsa/swiglu rg_lru/mlp", pytest.param(ALL, marks=pytest.mark.slow, id="all mixers")]
)
def test_adapters_reach_every_projection_learn_merge_and_come_back(pattern: str, tmp_path: Path):
    """Each linear map, and each matrix of a name in ``projections``; tests/layers/test_submodules.py goes by mixer."""
    model = model_of(pattern).double()
    kept = copy.deepcopy(model)
    peft = adapted(model).double()
    layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == sum(map(len, hf.lora_targets(kept).values()))
    peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
    adapters = {name: each for name, each in peft.named_parameters() if ".lora_" in name}
    assert len(adapters) == 2 * len(layers)
    assert [name for name, each in adapters.items() if each.grad is None or not each.grad.any()] == []
    assert {name for name, each in peft.named_parameters() if each.requires_grad} == adapters.keys()
    whole = run(peft.eval(), (13,))
    assert error(whole, kept.eval()(TOKENS)[0]) > 0.01
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(hf.wrap(kept), tmp_path / "adapter").double().eval()
    assert torch.equal(run(again, (13,)), whole)
    merged = hf.merge(peft)
    assert isinstance(merged, hf.SeqarchForCausalLM)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    for pieces in ((13,), (1,) * 13, (5, 1, 7)):
        assert_close(run(merged, pieces), whole, FLOAT64_ERROR, f"merged, in pieces {pieces}")
        assert_close(run(again, pieces), whole, FLOAT64_ERROR, f"apart, in pieces {pieces}")
    merged.save_pretrained(tmp_path / "merged")
    assert_close(run(hf.wrap(LanguageModel.from_pretrained(tmp_path / "merged")), (13,)), whole, FLOAT64_ERROR, "saved")


def _no_projection(name: str) -> bool:
    """Whether a tensor of more than one dimension multiplies no features: by its name, and by name alone."""
    *_, owner, own = name.split(".")
    if owner in ("conv", "router") or own in (
        "A_log",
        "bias",
        "B_bias",
        "C_bias",
        "bonus",
        "place",
        "ridge",
        "shares",
        "skip",
    ):
        return True
    return own in (
        "log_A_real",
        "A_imag",
        "C",
        "recurrent_weight",
        "candidate_bias",
        "level_scale",
    )  # maps of outputs, of four dimensions


def test_targets_are_chosen_by_names_of_layers_and_projections():
    model = model_of("3*mamba2 attention/moe gla+kda/swiglu", depth=5)
    named = hf.lora_targets(hf.wrap(model), "attention")
    assert {name.split(".mixers.")[0] for name in named["target_modules"]} == {"model.stack.layers.3"}
    assert named["target_parameters"] == []
    assert hf.lora_targets(model, "out_proj", "mamba2")["target_modules"] == [
        f"stack.layers.{i}.mixers.0.out_proj" for i in range(3)
    ]
    assert [name.split("channel.")[1] for name in hf.lora_targets(model, "moe")["target_parameters"]] == [
        "w_gate",
        "w_in",
        "w_out",
    ]
    gates = hf.lora_targets(model, "gate")["target_modules"]
    assert gates[-3:] == [f"stack.layers.4.mixers.{name}" for name in ("0.gate", "1.gate.0", "1.gate.1")]
    assert (
        sum(map(len, hf.lora_targets(model).values()))
        == len([module for module in model.stack.modules() if isinstance(module, nn.Linear)]) + 3
    )


def test_names_that_match_nothing_are_errors():
    model = model_of("mamba2 attention")
    expected = r"one of its layers, attention, mamba2, or of their projections, .*in_proj, out_proj, qkv_proj"
    with pytest.raises(ValueError, match=f"lora_targets: 'q_proj' matches nothing in the model; expected {expected}"):
        hf.lora_targets(model, "out_proj", "q_proj")
    with pytest.raises(ValueError, match="lora_targets: no layer mamba2 has a projection qkv_proj"):
        hf.lora_targets(model, "mamba2", "qkv_proj")
    with pytest.raises(ValueError, match="lora_targets: Linear has no LanguageModel inside"):
        hf.lora_targets(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="merge: SeqarchForCausalLM has no adapters, expected what peft"):
        hf.merge(hf.wrap(model))
    peft = adapted(model)
    with pytest.raises(ValueError, match="lora_targets: the model has adapters already; ask before"):
        hf.lora_targets(peft)
    with pytest.raises(ValueError, match="the model has adapters inside: expected peft's save_pretrained"):
        peft.base_model.model.save_pretrained("nowhere")


def test_a_model_with_adapters_counts_generates_and_checkpoints_as_one_without():
    model = model_of("mamba2/moe attention").double()
    held = model.state_bytes(9)
    plain = model.eval().generate(TOKENS, 4)
    targets: Any = hf.lora_targets(model)
    peft: Any = get_peft_model(hf.wrap(model), LoraConfig(r=2, **targets)).double()  # which change nothing yet
    assert peft.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False).tolist() == [
        row.tolist() for row in plain
    ]
    assert model.state_bytes(9) == held
    peft.train()
    labels = TOKENS.masked_fill(torch.rand(TOKENS.shape) < 0.8, -100)
    model.loss(TOKENS, labels)
    assert sum(model.router_metrics()["layer_0/load"]) == pytest.approx(1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft.base_model.model.activation_checkpointing_enable()
        peft.zero_grad()
        peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([each.grad.clone() for each in peft.parameters() if each.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, FLOAT64_ERROR, "gradient")


def test_an_indexer_without_a_loss_has_no_adapters():
    for weight, expected in ((1.0, True), (0.0, False)):
        options = {"sparse_mla": {**OPTIONS["sparse_mla"], "index_loss_weight": weight}}
        model = LanguageModel(vocab_size=31, d_model=32, pattern="sparse_mla", depth=1, mixers=options)
        targets = hf.lora_targets(model)["target_modules"]
        assert any("index_" in name for name in targets) is expected
        assert any(name.endswith("out_proj") for name in targets)
