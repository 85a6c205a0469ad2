"""What fields say of a model made here, by the tables that they are read by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from seqarch.interop import FAMILIES
from seqarch.models import LanguageModel
from seqarch.pretrained.kinds_of_layers import Layers

CHOSEN = {
    "d_inner": "inner_width",
    "decay_rank": "chosen_decay_rank",
    "gate_rank": "chosen_gate_rank",
    "head_dim": "head_width",
    "hidden": "hidden_width",
    "key_width": "keys",
    "kv_lora_rank": "rank",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "qk_nope_head_dim": "keys",
    "qk_rope_head_dim": "shared",
    "rate_rank": "chosen_rate_rank",
    "top_groups": "chosen_groups",
    "v_head_dim": "values",
    "value_rank": "chosen_value_rank",
}
"""What a config calls the value of an option that is chosen where it is not given."""


def options_as_settings(family: str, layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """The fields that are options as they stand: :attr:`seqarch.interop.settings.BaseSettings.options`.

    A field that cannot be null is left out where its option is None, so that it has its default.
    """
    settings = FAMILIES[family].Settings
    configs = {"model": model.config, **layers.configs}
    types = {field.name: str(field.type) for field in fields(settings)}
    found: dict[str, Any] = {}
    for name, table in settings.all_options().items():
        for option, field in table.items() if name in configs else ():
            value = chosen(configs[name], option)
            if value is not None or "None" in types[field]:
                found[settings.called(field)] = value
    return found | _kinds(settings.layer_kinds, layers)


def options_named(family: str, message: str) -> str:
    """What the fields are here that an error names, in parentheses after a space; nothing where it names none."""
    settings, words = FAMILIES[family].Settings, message.replace("=", " ").split()
    found = [
        f"{settings.called(field)} is {option} of {name}"
        for name, table in settings.all_options().items()
        for option, field in table.items()
        if settings.called(field) in words
    ]
    return f" ({'; '.join(found)})" if found else ""


def chosen(config: Any, option: str) -> Any:
    """The value of an option, chosen by the config where it is not given."""
    value = getattr(config, option)
    if option == "num_key_heads":
        return config.key_shape[0]
    if option == "shared_hidden":
        return config.shared_width if config.shared_experts else None
    return getattr(config, CHOSEN[option], None) if value is None and option in CHOSEN else value


def _kinds(tables: Mapping[str, Mapping[str, str]], layers: Layers) -> dict[str, list[str]]:
    """The fields that name what each layer has; what they have no name for has ours, for an error that shows it."""
    found = {}
    for field, names in tables.items():
        theirs = {own: name for name, own in reversed([*names.items()])}
        each = ((*mixers, channel) for mixers, channel in layers.kinds)
        found[field] = [next((theirs[name] for name in names if name in theirs), names[0]) for names in each]
    return found
