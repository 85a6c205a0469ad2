"""What is written as a GGUF file, and the keys and tensors that several of llama.cpp's architectures have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.models import LMConfig, tile_pattern

Metadata = dict[str, int | float | bool | str | list[int]]
Named = tuple[str, Tensor]

WITH_DIVISORS = ("llama", "mixtral")
"""Families whose architecture has a tensor of divisors of frequencies."""

UNBOUNDED = 2**20
"""The context length of models that have no limit, as llama.cpp's own converter writes it."""


@dataclass(frozen=True)
class Model:
    """What is to be written.

    Attributes:
        settings: typed, of the family.
        config: the whole of their ``config.json``.
        ours: our configuration of the same model.
    """

    settings: Any
    config: Mapping[str, Any]
    ours: LMConfig

    def mixer(self, name: str) -> Mapping[str, Any]:
        return self.ours.mixers[name]

    @property
    def routed(self) -> bool:
        """Whether a layer has experts."""
        return any(self.has("moe"))

    def has(self, name: str) -> list[bool]:
        """Whether each layer has this mixer or channel mixer."""
        layers = tile_pattern(self.ours.pattern, self.ours.depth)
        return [name in (*layer.mixers, self.ours.channel_of(layer)) for layer in layers]

    def refuse(self, name: str, expected: str) -> ValueError:
        """The error for a setting that llama.cpp has no model of."""
        value = getattr(self.settings, name)
        return ValueError(f"llama.cpp has no {self.settings.model_type} with {name}={value!r}, but only {expected}")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp's.

    Attributes:
        name: its own.
        metadata: by key, without the architecture's name before it.
        change: from a tensor of theirs to those that the file holds, by names that ``gguf``'s table knows.
        with_experts: its name where the model has experts, if that is another.
        further: tensors that are not theirs, by llama.cpp's own names.
        join: of several tensors of theirs that are one of ours, those that the file holds.
    """

    name: str
    metadata: Callable[[Model], Metadata]
    change: Callable[[Model, str, Tensor], list[Named]]
    with_experts: str | None = None
    further: Callable[[Model], list[Named]] = lambda model: []
    join: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors

    def name_of(self, model: Model) -> str:
        return self.with_experts if self.with_experts is not None and model.routed else self.name


def state_space(model: Model, options: Mapping[str, Any], eps: float) -> Metadata:
    """The keys that all models with a state space have."""
    return {
        "context_length": UNBOUNDED,
        "embedding_length": model.settings.hidden_size,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": model.settings.num_hidden_layers,
        "ssm.conv_kernel": options["conv_width"],
        "ssm.inner_size": options["d_inner"],
        "ssm.state_size": options["d_state"],
        "attention.layer_norm_rms_epsilon": float(eps),
    }


def heads_of_mamba2(options: Mapping[str, Any]) -> Metadata:
    return {
        "ssm.time_step_rank": options["d_inner"] // options["head_dim"],
        "ssm.group_count": options["n_groups"],
    }


def change_mamba(model: Model, name: str, tensor: Tensor) -> list[Named]:
    if name.endswith(".A_log"):
        tensor = -torch.exp(tensor)
    return [(name, tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor)]


def change_mamba2(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """A and D are columns, the norm a row for each group."""
    ((name, tensor),) = change_mamba(model, name, tensor)
    if name.endswith((".A_log", ".D")):
        tensor = tensor.unsqueeze(-1)
    if name.endswith((".mixer.norm.weight", ".mamba.norm.weight")):
        tensor = tensor.view(model.mixer("mamba2")["n_groups"], -1)
    return [(with_step_bias(name), tensor)]


def with_step_bias(name: str) -> str:
    return name.removesuffix("dt_bias") + "dt_proj.bias" if name.endswith(".dt_bias") else name


def attention(model: Model, options: Mapping[str, Any]) -> Metadata:
    """The keys of an attention with rotary positions."""
    return {
        "context_length": int(model.config.get("max_position_embeddings") or UNBOUNDED),
        "attention.head_count": options["num_heads"],
        "attention.head_count_kv": options["num_kv_heads"],
        "attention.key_length": options["head_dim"],
        "attention.value_length": options["head_dim"],
        "rope.freq_base": float(options["rotary_base"]),
        **_scaled_angles(model, options.get("rope_scaling") or {}),
    }


def _scaled_angles(model: Model, scaling: Mapping[str, Any]) -> Metadata:
    """The keys of rotary positions for longer sequences; llama 3's are a tensor (:func:`frequency_divisors`)."""
    kind = scaling.get("rope_type")
    if kind is None or (kind == "llama3" and model.settings.model_type in WITH_DIVISORS):
        return {}
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling.get("factor") or 1.0)}
    if kind == "linear":
        return keys
    known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    without = {name: value for name, value in scaling.items() if name not in known and value is not None}
    if without.get("truncate") is True:  # as llama.cpp does
        del without["truncate"]
    name = "rope_scaling" if model.settings.rope_scaling else "rope_parameters"
    if kind != "yarn":
        raise model.refuse(name, "type linear or yarn")
    if without:
        raise model.refuse(name, f"yarn without {' and '.join(without)}")
    keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    betas = {f"rope.scaling.yarn_{name}": scaling.get(name) for name in ("beta_fast", "beta_slow")}
    return {**keys, **{name: float(value) for name, value in betas.items() if value is not None}}


def frequency_divisors(model: Model) -> list[Named]:
    """By what the frequency of each pair of channels is divided, where angles are scaled as by Llama 3."""
    options = model.mixer("attention")
    scaling = options.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return []
    width, before = options["head_dim"], scaling["original_max_position_embeddings"]
    low, high, factor = (scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    frequencies = 1 / options["rotary_base"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    lengths = 2 * torch.pi / frequencies
    smooth = (before / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slowest = torch.where(lengths > before / low, torch.full_like(between, factor), between)
    return [("rope_freqs.weight", torch.where(lengths < before / high, torch.ones_like(between), slowest))]


def halves_to_neighbours(options: Mapping[str, Any], name: str, tensor: Tensor) -> list[Named]:
    """Rows of q and k in the order of llama.cpp's rotation, of neighbours; theirs turns the halves of a head."""
    heads = {"q_proj": options["num_heads"], "k_proj": options["num_kv_heads"]}.get(name.split(".")[-2])
    if heads is not None:
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return [(name, tensor)]
