"""Which linear maps and matrices of a model the low-rank adapters of ``peft`` change."""

from __future__ import annotations

from typing import Any

from torch import nn

from seqarch.models import LanguageModel
from seqarch.models.projections import choose


def lora_targets(model: nn.Module, *names: str) -> dict[str, list[str]]:
    """The projections of a model's mixers and channel mixers, as options of ``peft.LoraConfig``.

    ``LoraConfig(r=8, **lora_targets(model))`` adapts all of them: ``target_modules`` are the linear maps,
    ``target_parameters`` the stacked or shared matrices that are none: of experts, of gates in blocks, of what
    compresses blocks of keys. Embedding, head, norms, convolutions, routers and indexers without a loss stay as they
    are.

    Args:
        model: a :class:`seqarch.LanguageModel`, or what has one inside.
        names: of mixers and channel mixers (``"mamba2"``, ``"moe"``), to adapt those alone, and of projections
            (``"out_proj"``, ``"qkv_proj"``), to adapt only these.

    Raises:
        ValueError: there is no such model, it has adapters already, or a name matches nothing in it; what would is
            listed.
    """
    found = [(path, inner) for path, inner in model.named_modules() if isinstance(inner, LanguageModel)]
    if not found:
        raise ValueError(f"lora_targets: {type(model).__name__} has no LanguageModel inside")
    path, inner = found[0]
    if adapted(inner):
        raise ValueError("lora_targets: the model has adapters already; ask before get_peft_model is called")
    try:
        chosen = choose(inner, names)
    except ValueError as error:
        raise ValueError(f"lora_targets: {error}") from error
    full = [(f"{path}.{each.path}" if path else each.path, each.is_module) for each in chosen]
    return {
        "target_modules": [name for name, is_module in full if is_module],
        "target_parameters": [name for name, is_module in full if not is_module],
    }


def merge(model: Any) -> Any:
    """The model inside a ``peft`` model, with all adapters merged into its weights.

    ``merge_and_unload`` of peft 0.21 leaves adapters alone that lie inside a module whose own tensors have some, as
    those of shared experts beside experts: it is called until none is left.

    Raises:
        ValueError: the model is none of ``peft``'s.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"merge: {type(model).__name__} has no adapters, expected what peft.get_peft_model returned")
    inner, before = model.merge_and_unload(), -1
    while (left := sum(".lora_" in name for name, _ in inner.named_parameters())) not in (0, before):
        inner, before = model.merge_and_unload(), left
    if left:
        raise ValueError(f"merge: {left} tensors of adapters are left that peft does not merge")
    return inner


def adapted(model: nn.Module) -> bool:
    """Whether a model has low-rank adapters inside."""
    return any(".lora_" in name for name, _ in model.named_parameters())
