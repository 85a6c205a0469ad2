"""Benchmarks of whole models: a training step of two layers, and one decoded token; against ``transformers``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.baselines import without_gpu_kernels
from experiments.bench.benchmark import TOKEN, Absent, Benchmark, Call, Cost, Implementation, Inputs, Workload
from experiments.bench.sizes import Sizes
from seqarch.interop import lm_config
from seqarch.models import LanguageModel, LMConfig

VOCABULARY = 50280
ROOM = 4096
"""Tokens that may be decoded before a cache is full."""


@dataclass(frozen=True)
class Model:
    """A language model as ours and as the configuration of ``transformers`` that describes the same.

    Attributes:
        theirs: their configuration; ``model_type`` names the family.
        ours: ours, where :mod:`seqarch.interop` does not read theirs.
        variants: settings of theirs that choose how it is computed, by the implementation's name.
    """

    theirs: dict[str, Any]
    ours: LMConfig | None = None
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"transformers": {}})

    @property
    def config(self) -> LMConfig:
        return self.ours or lm_config(self.theirs)

    def resized(self, **sizes: int) -> Model:
        return replace(self, theirs=self.theirs | sizes)


def load_theirs(settings: dict[str, Any], folder: Path | None = None) -> Any:
    """A model of ``transformers`` with random weights, or with those of a folder."""
    import transformers

    if settings.get("use_mambapy"):
        import mambapy.pscan  # noqa: F401 - without it transformers would take its default path in silence

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**settings)
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_config(config)


def _training(model: nn.Module, loss: Call) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        loss(tokens).backward()
        optimizer.step()

    return step


def _training_ours(config: LMConfig) -> Implementation:
    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        model = LanguageModel(config)
        return _training(model, lambda tokens: model.loss(tokens, F.pad(tokens[:, 1:], (0, 1), value=-100))), inputs

    return Implementation(bind)


def _training_theirs(settings: dict[str, Any]) -> Implementation:
    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        model = load_theirs(settings).train()
        return _training(model, lambda tokens: model(tokens, labels=tokens, use_cache=False).loss), inputs

    return Implementation(without_gpu_kernels(bind))


@torch.no_grad()
def _decoding_ours(config: LMConfig, inputs: Inputs) -> tuple[Call, Inputs]:
    model, prompt = LanguageModel(config), inputs["tokens"]
    _, state = model(prompt, model.init_state(1, max_length=prompt.shape[1] + ROOM))

    def step(token: Tensor) -> Tensor:
        nonlocal state
        logits, state = model(token, state)
        return logits

    return step, {"token": prompt[:, :1]}


@torch.no_grad()
def _decoding_theirs(settings: dict[str, Any], inputs: Inputs) -> tuple[Call, Inputs]:
    model, prompt = load_theirs(settings).eval(), inputs["tokens"]
    if set(settings.get("layer_types", ())) == {"linear_attention"}:
        raise Absent("the cache of transformers wants a layer of attention")
    read = model(prompt, use_cache=True)
    name = next(name for name in ("cache_params", "past_key_values") if hasattr(read, name))
    cache = {name: getattr(read, name)}
    return lambda token: model(token, use_cache=True, **cache).logits, {"token": prompt[:, :1]}


def _workload(config: LMConfig, one_token: bool) -> Workload:
    """Each weight is read once; of one token, two operations per weight."""

    def inputs(sizes: Sizes) -> Inputs:
        return {"tokens": torch.randint(config.vocab_size, (1, sizes.length))}

    def cost(sizes: Sizes, inputs: Inputs) -> Cost:
        with torch.device("meta"):
            model = LanguageModel(config)
        weights = model.num_parameters()
        return Cost(2 * weights if one_token else model.flops(sizes.length), 4 * weights)

    return Workload(inputs, cost)


def _describe(config: LMConfig) -> str:
    return f"{config.depth} layers of width {config.d_model}, vocabulary {config.vocab_size}"


def training(model: Model) -> Benchmark:
    config = model.config
    theirs = {name: _training_theirs(model.theirs | variant) for name, variant in model.variants.items()}
    return Benchmark(
        title=f"training step with AdamW, B = 1, {_describe(config)}",
        workload=_workload(config, one_token=False),
        ours={"seqarch": _training_ours(config)},
        baselines={"cpu": theirs},
        modes=("training step",),
        longest=4096,
    )


def decoding(model: Model, longest: int) -> Benchmark:
    config = model.config
    theirs = Implementation(without_gpu_kernels(lambda inputs: _decoding_theirs(model.theirs, inputs)))
    return Benchmark(
        title=f"one token after a context, B = 1, {_describe(config)}",
        workload=_workload(config, one_token=True),
        ours={"seqarch": Implementation(lambda inputs: _decoding_ours(config, inputs))},
        baselines={"cpu": {"transformers": theirs}},
        modes=(TOKEN,),
        longest=longest,
    )


COMMON = {"vocab_size": 512, "hidden_size": 768, "num_hidden_layers": 2}
SSM = COMMON | {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "conv_kernel": 4, "expand": 2}
MAMBA = SSM | {"model_type": "mamba", "state_size": 16, "layer_norm_epsilon": 1e-5}
MAMBA2 = SSM | {"model_type": "mamba2", "state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1}
LINEAR = {f"linear_{name}_dim": 128 for name in ("key_head", "value_head")} | {"linear_conv_kernel_dim": 4}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
QWEN3_NEXT = COMMON | LINEAR | HEADS | {
    "model_type": "qwen3_next",
    **{"layer_types": ["linear_attention"] * 2, "mlp_only_layers": [0, 1], "hidden_act": "silu"},
    **{"linear_num_key_heads": 6, "linear_num_value_heads": 6, "intermediate_size": 2048, "rms_norm_eps": 1e-6},
    **{"num_experts": 2, "num_experts_per_tok": 1, "attention_bias": False},
    **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}  # fmt: skip
FALCON_H1 = COMMON | {
    "model_type": "falcon_h1",
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536},
    **{"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128},
    **{"mamba_d_conv": 4, "mamba_chunk_size": 256, "rms_norm_eps": 1e-5, "max_position_embeddings": 65536},
}
LLAMA = COMMON | HEADS | {"model_type": "llama", "intermediate_size": 2048}
TRANSFORMER = LMConfig(
    vocab_size=512,
    d_model=768,
    pattern="attention",
    depth=2,
    mixers={"attention": {"num_heads": 12}},
    channels={"swiglu": {"hidden": 2048}},
)

MODELS: dict[str, Model] = {
    "attention": Model(LLAMA, TRANSFORMER),
    "mamba2": Model(MAMBA2 | {"layer_norm_epsilon": 1e-5, "chunk_size": 256}),
    "mamba": Model(MAMBA, variants={"transformers": {}, "transformers, mambapy": {"use_mambapy": True}}),
    "gated_delta_net": Model(QWEN3_NEXT),
}
MAMBA_130M = MODELS["mamba"].resized(vocab_size=VOCABULARY, num_hidden_layers=24)

BENCHMARKS: dict[str, Benchmark] = {
    **{f"training_{name}": training(model) for name, model in MODELS.items()},
    "training_mamba_lm": training(MODELS["mamba"].resized(vocab_size=VOCABULARY)),
    **{f"decoding_{name}": decoding(model, longest=4096) for name, model in MODELS.items()},
    "decoding_mamba_130m": decoding(MAMBA_130M, longest=512),
}
