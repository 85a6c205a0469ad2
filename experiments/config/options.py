"""Options of a run's model: the library's, checked by it; equal ones are written alike, however they were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from experiments.config.convert import convert
from experiments.util.errors import ConfigError, choices_hint
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.layers.mixer import build_config
from seqarch.models import LMConfig, parse_pattern
from seqarch.ops.dispatch.checks import Kinds, annotated_kinds

REGISTRIES: dict[str, Mapping[str, Any]] = {"mixers": MIXERS, "channels": CHANNEL_MIXERS}
"""By the key of a model's configuration that holds options by name."""


ALWAYS = (
    *("d_model", "pattern", "depth", "channel", "mixers", "channels", "norm_eps", "branch_norm"),
    *("vocab_size", "embedding_std", "tie_embeddings", "embedding_scale", "logit_cap"),
)
"""Options of a language model that count at their defaults too, as they did when the first runs were recorded. Others
came later: at its default one is as in a run that knew none, whose folder stays that of its configuration."""


def language_model(given: Mapping[str, Any], vocab_size: int) -> LMConfig:
    """The options of a language model; those of mixers that its pattern does not use are checked as well.

    Raises:
        ConfigError: the library refuses them.
    """
    if isinstance(given.get("pattern"), str):
        try:
            parse_pattern(given["pattern"])
        except ValueError as error:
            raise ConfigError(f"model.pattern: {error}") from error
    for key, registry in REGISTRIES.items():
        for name in layers if isinstance(layers := given.get(key), Mapping) else ():
            if name not in registry:
                raise ConfigError(f"model.{key}.{name}: unknown name, {choices_hint(name, registry)}")
    options = convert(LMConfig, given, "model", known={"vocab_size": vocab_size})
    for key in REGISTRIES:
        for name, own in getattr(options, key).items():
            _check_layer(options, f"model.{key}", key, name, own)
    for layer in parse_pattern(options.pattern):
        occurrences = [("mixers", name, own) for name, own in zip(layer.mixers, layer.options, strict=True)]
        for key, name, own in (*occurrences, ("channels", options.channel_of(layer), layer.channel_options)):
            if own:
                _check_layer(options, "model.pattern", key, name, {**getattr(options, key).get(name, {}), **own})
    return options


def _check_layer(options: LMConfig, path: str, key: str, name: str, own: Mapping[str, Any]) -> None:
    try:
        build_config(key.rstrip("s"), name, REGISTRIES[key][name].Config, {"d_model": options.d_model, **own})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def canonical(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's plain configuration with its layers' options as :func:`typed` writes them and no defaults among them.

    Options that nobody knows, as those of a mixer of another version, stay as they are. An option of the model itself
    that is not among :data:`ALWAYS` is left out at its default.
    """
    later = {field.name: field for field in fields(LMConfig) if field.name not in ALWAYS}
    own = {key: value for key, value in model.items() if key not in later or not _is_default(value, later[key])}
    given = {key: model[key] for key in REGISTRIES if isinstance(model.get(key), Mapping)}
    return {**own, **{key: _without_defaults(key, layers) for key, layers in given.items()}}


def _without_defaults(key: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, options in layers.items():
        known = _fields(key, name) if isinstance(options, Mapping) else {}
        if not known:
            kept[name] = options
        elif own := {option: value for option, value in typed(key, name, options).items()
                     if option not in known or not _is_default(value, known[option])}:  # fmt: skip
            kept[name] = own
    return kept


def typed(key: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a layer with each number as its field has it: 10000 is 10000.0 where the field is a float."""
    kinds = annotated_kinds(REGISTRIES[key][name].Config)
    return {option: _as(kinds.get(option, ()), value) for option, value in options.items()}


def default(path: str) -> Any:
    """The default of an option by its path, ``model.mixers.attention.num_heads``; ``None`` where there is none."""
    match path.split("."):
        case ["model", key, name, option] if (field := _fields(key, name).get(option)) and field.default is not MISSING:
            return field.default
    return None


def _fields(key: str, name: str) -> dict[str, Field[Any]]:
    layer = REGISTRIES.get(key, {}).get(name)
    return {} if layer is None else {field.name: field for field in fields(layer.Config)}


def _as(kinds: Kinds, value: Any) -> Any:
    if float in kinds and type(value) in (int, float):
        return value + 0.0  # Which makes 0.0 of -0.0, too.
    return list(value) if isinstance(value, tuple) else value


def _is_default(value: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return type(value) is type(default) and value == default
