"""Models as GGUF files: each tensor and each key, as the ``gguf`` package reads them back."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor

from experiments.tasks.text_tokens import train_tokenizer
from seqarch import LanguageModel
from seqarch.checkpoints.origin import Origin
from seqarch.checkpoints.tokenizers import FileTokenizer
from seqarch.interop import from_transformers
from seqarch.pretrained.gguf_architectures import ARCHITECTURES
from seqarch.pretrained.gguf_command import main
from seqarch.pretrained.gguf_file import save_gguf
from seqarch.pretrained.gguf_tokenizer import QWEN2
from tests.support import decoder_families, families, hybrid_families
from tests.support.decoder_families import LLAMA3, YARN

CONFIGS = {
    "mamba": families.mamba,
    "mamba2": families.mamba2,
    "falcon_h1": lambda **changes: families.falcon_h1(
        **{"mamba_rms_norm": True, "mamba_norm_before_gate": False, **changes}
    ),
    "jamba": hybrid_families.jamba,
    "lfm2": hybrid_families.lfm2,
    "lfm2_moe": hybrid_families.lfm2_moe,
    "llama": lambda **changes: decoder_families.decoders("LlamaConfig", attention_bias=True, mlp_bias=True)(
        **{"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}, **changes}
    ),
    "mixtral": families.mixtral,
    "nemotron_h": lambda **changes: hybrid_families.nemotron_h(
        **{"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"], **changes}
    ),
    "nemotron_h_moe": lambda **changes: hybrid_families.nemotron_h(
        **{"layers_block_type": ["linear_attention", "moe", "full_attention"], "moe_latent_size": 12, **changes}
    ),
    "qwen3_5_text": lambda **changes: hybrid_families.qwen3_5(
        **{"layer_types": None, "num_hidden_layers": 4, **changes}
    ),
    "qwen3_5_moe_text": lambda **changes: hybrid_families.qwen3_5_moe(
        **{"layer_types": None, "num_hidden_layers": 4, **changes}
    ),
    "rwkv7": lambda **changes: families.rwkv7(**{"norm_eps": 8e-5, **changes}),
    "qwen3_next": lambda **changes: families.qwen3_next(
        **{"layer_types": None, "num_hidden_layers": 4, "mlp_only_layers": None, **changes}
    ),
}
STATE_SPACE = {
    *("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
    *("attention.layer_norm_rms_epsilon", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
}
ATTENTION = {
    *("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
    *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length"),
    *("rope.freq_base",),
}
EXPERTS = {"expert_count", "expert_used_count"}
SHARED = {*EXPERTS, "expert_feed_forward_length", "expert_shared_feed_forward_length"}
DELTA = STATE_SPACE | ATTENTION | {"rope.dimension_count", "ssm.group_count", "full_attention_interval"}
NEMOTRON = STATE_SPACE | ATTENTION - {"rope.freq_base"} | {"ssm.group_count", "vocab_size", "rope.dimension_count"}
KEYS = {
    "jamba": STATE_SPACE | ATTENTION - {"rope.freq_base"} | EXPERTS,
    "lfm2": ATTENTION | {"vocab_size", "shortconv.l_cache"},
    "lfm2_moe": ATTENTION
    | {"vocab_size", "shortconv.l_cache", "expert_gating_func", "expert_feed_forward_length"}
    | {"leading_dense_block_count", *EXPERTS},
    "llama": ATTENTION | {"vocab_size", "rope.dimension_count"},
    "nemotron_h": NEMOTRON | {"rope.scaling.finetuned"},
    "nemotron_h_moe": NEMOTRON
    | {"rope.scaling.finetuned", "expert_shared_count", "expert_weights_norm", "expert_weights_scale"}
    | {"expert_group_count", "expert_group_used_count", "moe_latent_size", *SHARED},
    "qwen3_5_text": DELTA | {"rope.dimension_sections"},
    "qwen3_5_moe_text": DELTA - {"feed_forward_length"} | {"rope.dimension_sections", *SHARED},
    "mamba": STATE_SPACE | {"ssm.dt_b_c_rms"},
    "mamba2": STATE_SPACE | {"ssm.group_count"},
    "falcon_h1": STATE_SPACE | ATTENTION | {"ssm.group_count", "vocab_size"},
    "mixtral": ATTENTION | {"vocab_size", "rope.dimension_count", "expert_count", "expert_used_count"},
    "qwen3_next": DELTA | SHARED,
    "rwkv7": {"attention.decay_lora_rank", "attention.iclr_lora_rank", "attention.value_residual_mix_lora_rank"}
    | {"attention.gate_lora_rank", "attention.layer_norm_epsilon", "attention.head_count", "wkv.head_size"}
    | {"context_length", "embedding_length", "block_count", "feed_forward_length"},
}
"""What llama.cpp's converter writes for the architecture, below its name."""


QUICK = {"falcon_h1", "llama", "mamba2", "nemotron_h_moe", "qwen3_next"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def theirs(request, tmp_path_factory) -> Path:
    """A folder of the family in bfloat16, with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    settings = CONFIGS[request.param](vocab_size=290)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(
        train_tokenizer(["a few words, and some more words"] * 9, 262, "<|endoftext|>")
    )
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, and the tensors in the dtypes that they have."""
    reader = gguf.GGUFReader(path)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for each in reader.tensors:
        flat = torch.frombuffer(bytearray(each.data.tobytes()), dtype=kinds[each.tensor_type.name])
        tensors[each.name] = flat.view([int(size) for size in reversed(each.shape)])
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def expected(config: dict[str, Any], state: dict[str, Tensor], name: str, names: Any) -> Tensor:
    """What a tensor of the file is to hold, from their state dict, in float32."""
    in_files = {
        key: key.replace("model.", "backbone.") if config["model_type"] == "nemotron_h" else key for key in state
    }
    found = {names.get_name(other, try_suffixes=(".weight", ".bias")): key for key, other in in_files.items()}
    layer = name.split(".")[1] if name.startswith("blk.") else ""
    get = {key: value.float() for key, value in state.items()}.__getitem__
    part = name.removeprefix(f"blk.{layer}.")
    kind = config["model_type"]
    theirs = f"model.layers.{layer}."
    if kind == "rwkv7" and part.startswith(("time_mix", "channel_mix", "attn_norm")):
        return _of_rwkv7(get, theirs, layer, *part.split("."))
    if "exps" in part:
        module = theirs + {"jamba": "feed_forward", "lfm2_moe": "feed_forward", "nemotron_h": "mixer"}.get(kind, "mlp")
        if kind == "nemotron_h":
            return get(f"{module}.experts.{'up' if 'up' in part else 'down'}_proj")
        up, down = get(f"{module}.experts.gate_up_proj"), get(f"{module}.experts.down_proj")
        half = up.shape[1] // 2
        return {"ffn_gate": up[:, :half], "ffn_up": up[:, half:], "ffn_down": down}[part.partition("_exps")[0]]
    if part == "exp_probs_b.bias":
        other = "mixer.gate.e_score_correction_bias" if kind == "nemotron_h" else "feed_forward.expert_bias"
        return get(f"{theirs}{other}")
    if part == "ssm_dt.bias" and kind not in ("mamba", "jamba"):
        inner = {"mamba2": f"backbone.layers.{layer}.mixer", "falcon_h1": f"{theirs}mamba"}
        inner["nemotron_h"] = f"{theirs}mixer"
        tensor = get(f"{inner.get(kind, theirs + 'linear_attn')}.dt_bias")
        return tensor[IN_TURN] if "qwen3_5" in kind else tensor
    if kind == "qwen3_next" and part in ("attn_qkv.weight", "attn_gate.weight"):
        stored, rows = get(f"{theirs}linear_attn.in_proj_qkvz.weight"), []
        for offset, size in ((0, 16), (16, 16), (32, 96)) if "qkv" in part else ((128, 96),):
            for head in range(2):
                rows.append(stored[head * 224 + offset : head * 224 + offset + size])
        return torch.cat(rows)
    if kind == "mixtral" and part == "ffn_gate_inp.weight":
        return get(f"{theirs}mlp.gate.weight")
    tensor = get(found[name])
    if part == "ssm_a":
        tensor = -tensor.exp()
    if part == "ssm_conv1d.weight":
        tensor = tensor[:, 0]
    if part in ("ssm_a", "ssm_d") and kind in ("mamba2", "falcon_h1", "nemotron_h"):
        tensor = tensor[:, None]
    if part == "ssm_norm.weight" and kind in ("mamba2", "falcon_h1", "nemotron_h"):
        tensor = tensor.reshape(2, -1)
    if part == "shortconv.conv.weight":
        tensor = tensor[:, 0]
    if "qwen3_5" in kind:
        tensor = _in_turn(tensor, part)
    if "qwen3" in kind and name.endswith("norm.weight") and part != "ssm_norm.weight":
        tensor = tensor + 1
    if kind in ("llama", "mixtral") and part.partition(".")[0] in ("attn_q", "attn_k"):
        order = [head * 8 + pair + 4 * half for head in range(len(tensor) // 8) for pair in range(4) for half in (0, 1)]
        tensor = tensor[order]
    return _multiplied(tensor, part) if kind == "falcon_h1" else tensor


def _of_rwkv7(get: Callable[[str], Tensor], theirs: str, layer: str, part: str, kind: str) -> Tensor:
    if part == "time_mix_lerp_fused":
        return torch.stack([get(f"{theirs}attn.x_{each}") for each in "rwkvag"])
    named = {"attn_norm": "attn_norm", "attn_norm_2": "ffn_norm", "time_mix_ln": "attn.g_norm"}
    if part in named:
        return get(f"{theirs}{named[part]}.{kind}")
    if part == "channel_mix_lerp_k":
        return get(f"{theirs}ffn.x_k")
    block, _, own = part.partition("_mix_")
    if own in ("k_k", "k_a", "r_k"):
        return get(f"{theirs}attn.{own}").flatten()
    if own[1:] in ("0", "1", "2"):
        letter = "a" if own[0] == "v" and layer == "0" else own[0]  # of no use there, but expected
        return get(f"{theirs}attn.{letter}_lora.lora." + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[own[1]])
    if block == "channel":
        return get(f"{theirs}ffn.{own}.weight")
    return get(f"{theirs}attn.{own[0]}_proj.weight")


IN_TURN = [0, 4, 1, 5, 2, 6, 3, 7]
"""Of 8 heads in two groups, each with keys of its own."""


def _in_turn(tensor: Tensor, part: str) -> Tensor:
    """With values' heads of 24 channels after 2 * 2 * 16 of queries and keys."""
    channels = [head * 24 + i for head in IN_TURN for i in range(24)]
    if part in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return tensor[[*range(64), *(64 + i for i in channels)]] if len(tensor) > 64 else tensor
    if part == "ssm_out.weight":
        return tensor[:, channels]
    if part in ("ssm_a", "ssm_alpha.weight", "ssm_beta.weight"):
        return tensor[IN_TURN]
    return tensor[channels] if part == "attn_gate.weight" else tensor


def _multiplied(tensor: Tensor, part: str) -> Tensor:
    """With the multipliers of ``tests.support.families.falcon_h1``."""
    factors = {
        **{"attn_q": [1.2], "attn_k": [0.6, 1.2], "attn_v": [1.2], "attn_output": [0.9], "ssm_out": [0.4]},
        **{"ffn_gate": [0.8], "ffn_down": [1.3], "output": [0.7], "token_embd": [3.0], "ssm_in": [1.25]},
    }
    for factor in factors.get(part.removesuffix(".weight"), []):
        tensor = tensor * factor
    if part == "ssm_in.weight":
        rows = [0.5] * 48 + [1.1] * 48 + [0.9] * 16 + [1.3] * 16 + [0.7] * 6
        tensor = tensor * torch.tensor(rows)[:, None]
    return tensor


def test_each_tensor_and_key_is_what_llama_cpp_reads(theirs, tmp_path):
    config = json.loads((theirs / "config.json").read_text())
    kind, path = config["model_type"], tmp_path / "new" / "model.gguf"
    model = LanguageModel.from_pretrained(theirs)
    save_gguf(model, path)
    fields, tensors = read(path)
    architecture = fields["general.architecture"]
    routed = any("exps" in name for name in tensors)
    known = ARCHITECTURES[kind]
    assert architecture == (known.with_experts if routed and known.with_experts else known.name)
    (number,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, fields[f"{architecture}.block_count"])
    divisors = tensors.pop("rope_freqs.weight", None)
    state = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype="auto").state_dict()
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    for name, tensor in tensors.items():
        wanted = expected(config, state, name, names)
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
        vector = tensor.ndim < 2 or not name.endswith("weight")
        wide = vector or any(part in name for part in ("norm", "gate_inp", "conv1d", "conv.conv", "lerp", "mix_w"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    unused = [tensor for name, tensor in tensors.items() if re.match(r"blk\.0\.time_mix_v\d", name)]
    stored = [tensor for tensor in tensors.values() if not any(tensor is each for each in unused)]
    assert sum(map(torch.numel, stored)) == sum(map(torch.numel, state.values()))
    known = {gguf.TENSOR_NAMES[each] for each in gguf.MODEL_TENSORS[number]}
    bare = [each.removesuffix(".weight").removesuffix(".bias") for each in tensors]
    assert {re.sub(r"^blk\.\d+", "blk.{bid}", each) for each in bare} <= known

    own = {name.removeprefix(f"{architecture}.") for name in fields if name.startswith(f"{architecture}.")}
    assert own == KEYS[architecture if architecture == "nemotron_h_moe" else kind]
    check_layers(kind, {name.removeprefix(f"{architecture}."): value for name, value in fields.items()})
    assert (divisors is not None) == (kind == "llama")
    if divisors is not None:
        turning = transformers.AutoModelForCausalLM.from_pretrained(theirs).model.rotary_emb.inv_freq
        assert torch.allclose(300 ** -(torch.arange(0, 8, 2) / 8) / divisors, turning, rtol=1e-6, atol=0)
        assert len(set(divisors.tolist())) == 3
    assert (fields["general.architecture"], fields["general.file_type"]) == (architecture, 32)
    stored = json.loads((theirs / "tokenizer.json").read_text())
    tokens = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert {token: tokens[token] for token in stored["model"]["vocab"]} == stored["model"]["vocab"]
    assert len(tokens) == 290
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in stored["model"]["merges"]]
    types = fields["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[-1]) == (3, 1, 5)
    special = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert (fields["tokenizer.ggml.pre"], special) == ("gpt-2", [0, 1, 2])


def check_layers(kind: str, fields: dict[str, Any]) -> None:
    """Of keys that have a number for each layer, and of those that name a way of doing it."""
    heads = {"jamba": [0, 2, 0, 0], "lfm2": [0, 2, 0], "lfm2_moe": [0, 2, 0]}
    if kind in heads:
        assert fields["attention.head_count_kv"] == heads[kind]
    if kind == "nemotron_h" and "expert_count" in fields:
        assert (fields["attention.head_count_kv"], fields["feed_forward_length"]) == ([0, 0, 2], [0, 24, 0])
    elif kind == "nemotron_h":
        assert fields["attention.head_count_kv"] == [0, 0, 2, 0, 0]
        assert fields["feed_forward_length"] == [0, 40, 0, 0, 40]
    if "qwen3_5" in kind:
        assert fields["rope.dimension_sections"] == [11, 11, 10, 0]


def own(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "pattern": "mamba2", "channel": "none", "depth": 2}
    return LanguageModel(**{**sizes, "mixers": {"mamba2": {"head_dim": 16, "d_state": 8}}, **options})


def test_a_model_made_here_is_written_without_a_tokenizer_as_one_of_numbers(tmp_path, monkeypatch, capsys):
    own().save_pretrained(tmp_path / "own")
    given = [str(tmp_path / "own"), str(tmp_path / "own.gguf"), "--family", "mamba2", "--dtype", "float16"]
    assert main(given) == 0
    fields, tensors = read(tmp_path / "own.gguf")
    assert (fields["tokenizer.ggml.model"], fields["mamba2.vocab_size"]) == ("none", 40)
    assert torch.equal(tensors["token_embd.weight"], own().embedding.weight.detach().half())
    assert main(given) == 1
    assert "is there already; give the path of a new file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([given[0], str(tmp_path / "other.gguf"), *given[2:]]) == 1
    assert "pip install 'seqarch[gguf]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"own", "own.gguf"}


def test_scaled_rotary_positions_are_keys(tmp_path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0}
    for number, (kind, scaling) in enumerate((("linear", {"factor": 2.0}), ("yarn", yarn))):
        options = {"attention": {"rope_scaling": {"rope_type": kind, **scaling}}}
        model = own(pattern="attention", channel="swiglu", mixers=options)
        save_gguf(model, tmp_path / f"{number}.gguf", family="llama")
        fields, _ = read(tmp_path / f"{number}.gguf")
        prefix = "llama.rope.scaling."
        found = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
        assert (found.pop("type"), found.pop("factor")) == (kind, scaling["factor"])
        assert found == ({} if kind == "linear" else {"original_context_length": 16, "yarn_beta_fast": 20.0})


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {"expand": 3, "intermediate_size": 96}, "no mamba with hidden_size=32, but only half of the inner"),
        ("mixtral", {"sliding_window": 5}, "no mixtral with sliding_window=5, but only None"),
        ("qwen3_next", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\], but only experts in every layer"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob=False, but only true"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}, "but only full attention in each layer that"),
        ("llama", {"hidden_act": "gelu"}, "no llama with hidden_act='gelu', but only silu"),
        ("lfm2", {"conv_bias": True}, "no lfm2 with conv_bias=True, but only false"),
        ("lfm2_moe", {"norm_topk_prob": False}, "norm_topk_prob=False, but only true"),
        ("nemotron_h", {"layers_block_type": None}, "no nemotron_h with both mlp and moe blocks"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "but only type linear or yarn"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "but only yarn without attention_factor"),
        ("rwkv7", {"norm_eps": 1e-5}, "norm_eps=1e-05, but only 8e-05, at heads of 8 channels"),
        ("rwkv7", {"tie_word_embeddings": True}, "tie_word_embeddings=True, but only false"),
        ("falcon_h1", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate=True, but only false"),
    ],
)
def test_what_llama_cpp_has_no_model_of_is_named_and_nothing_is_written(family, changes, reason, tmp_path):
    settings = CONFIGS[family](**changes)
    model = from_transformers(settings, transformers.AutoModelForCausalLM.from_config(settings).state_dict())
    model.origin = Origin("there", family, settings=settings.to_dict())
    with pytest.raises(ValueError, match=reason):
        save_gguf(model, tmp_path / "it.gguf")
    assert not [*tmp_path.iterdir()]


def test_other_families_dtypes_and_tokenizers_are_named(tmp_path):
    for options, reason in (
        ({}, "name its family, falcon_h1 or jamba or lfm2"),
        ({"family": "recurrent_gemma"}, "unknown family 'recurrent_gemma': expected one of falcon_h1"),
        ({"family": "mamba2", "dtype": torch.float64}, "dtype is torch.float64, expected one of torch.float32"),
        ({"family": "mixtral"}, "the model is no mixtral: it has no attention"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_gguf(own(), tmp_path / "it.gguf", **options)
    model = own(vocab_size=290)
    stored = json.loads(train_tokenizer(["a few words, and more"] * 9, 262, "<|endoftext|>"))

    def written(**changes: Any) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**stored, **changes}))
        model.tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
        save_gguf(model, tmp_path / "it.gguf", family="mamba2")

    with pytest.raises(ValueError, match="is no byte-level BPE"):
        written(pre_tokenizer={"type": "Whitespace"})
    digits = {"type": "Digits", "individual_digits": True}
    with pytest.raises(ValueError, match=r"name llama\.cpp's own way by pre"):
        written(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, stored["pre_tokenizer"]]})
    cut = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    plain = {**stored["pre_tokenizer"], "use_regex": False}
    written(pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, plain]})
    assert read(tmp_path / "it.gguf")[0]["tokenizer.ggml.pre"] == "qwen2"
