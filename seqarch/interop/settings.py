"""Reading another library's configuration: an object with attributes, or the dictionary of a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seqarch.ops.dispatch.checks import fits, show, show_kinds, unknown_name

_ABSENT = object()

_NAMES_BY_KIND: dict[tuple[type, ...], str] = {
    (bool,): "mamba_norm_before_gate mamba_rms_norm moe_renormalize norm_topk_prob output_bias tie_word_embeddings",
    (float,): "layer_norm_epsilon logits_soft_cap partial_rotary_factor rms_norm_eps rope_theta routed_scaling_factor",
    (int, str): "time_step_rank",
    (str,): "model_type rope_type type",
    (tuple,): "block_types full_attn_layers layer_types mlp_layer_types mlp_only_layers"
    " mlp_multipliers ssm_multipliers",
    (Mapping,): "linear_attn_config rope_parameters rope_scaling",
}
KINDS = {name: kinds for kinds, names in _NAMES_BY_KIND.items() for name in names.split()}
"""Of which type a setting is, where it is no whole number and not called a multiplier, which is a float."""

MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size")
"""The whole numbers that 0 turns off; all others are positive."""


class Settings:
    """A configuration's values by name, and errors that name what is missing or not to be had here."""

    def __init__(self, config: Any):
        self.config = config
        self.model_type = self.get("model_type")

    def get(self, *names: str, default: Any = _ABSENT) -> Any:
        """The value of the first of these names that is there and not ``None``, else the default.

        Raises:
            ValueError: it has none of the names, and there is no default, or the value is of another type or range.
        """
        for name in names:
            if (value := self._value(name)) is not None:
                self._check(name, value)
                return value
        if default is _ABSENT:
            raise ValueError(f"the configuration has no setting {' or '.join(names)}")
        return default

    def _value(self, name: str) -> Any:
        return _plain(self.config.get(name) if isinstance(self.config, Mapping) else getattr(self.config, name, None))

    def _check(self, name: str, value: Any) -> None:
        kinds = KINDS.get(name, (float,) if name.endswith("_multiplier") else (int,))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits(value, kinds) or (number and not (0 <= value < math.inf and (value or name in MAY_BE_ZERO))):
            least = "" if kinds[0] not in (int, float) else " of at least 0" if name in MAY_BE_ZERO else ", positive"
            raise ValueError(
                f"{self._value('model_type')}: {name} is {show(value)}, expected {show_kinds(kinds)}{least}"
            )

    def factors(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers, all 1 by default.

        Raises:
            ValueError: it is none.
        """
        found = self.get(name, default=(1.0,) * count)
        if len(found) != count or not all(fits(factor, (float,)) for factor in found):
            raise ValueError(f"{self.model_type}: {name} is {show(found)}, expected {count} numbers")
        return found

    def chosen(self, name: str, choices: Mapping[str, str], default: Any = _ABSENT, count: int = 0) -> list[str]:
        """The meaning of each entry of a list.

        Raises:
            ValueError: the list is empty or has not ``count`` entries, if given, or one is none of the choices.
        """
        entries = self.get(name, default=default)
        if not entries or len(entries) != (count or len(entries)):
            expected = f"{count}, one per layer" if count else "at least one"
            raise ValueError(f"{self.model_type}: {name} has {len(entries)} entries, expected {expected}")
        for entry in entries:
            if entry not in choices:
                raise unknown_name(f"entry of {name}", entry, choices)
        return [choices[entry] for entry in entries]

    def only(self, **supported: Any) -> None:
        """Check that these settings have the only value that is supported here, or are absent.

        Raises:
            ValueError: some have another value; all of them are named.
        """
        given = {name: self._value(name) for name in supported}
        differ = {name: value for name, value in supported.items() if given[name] not in (None, value)}
        wrong = [f"{name}={given[name]!r} (only {value!r})" for name, value in differ.items()]
        if wrong:
            raise ValueError(f"{self.model_type}: these settings have no counterpart here: {', '.join(wrong)}")

    def rotary(self, base: float = 10000.0, fraction: float = 1.0) -> dict[str, float]:
        """Options of the rotary embedding, from today's or earlier names; the arguments are the family's defaults.

        Raises:
            ValueError: the angles are scaled for longer sequences.
        """
        found = self.get("rope_parameters", "rope_scaling", default={})
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{self.model_type}: rope_type={kind!r} has no counterpart here (only 'default')")
        read = Settings({**found, "model_type": self.model_type})
        return {
            "rotary_base": read.get("rope_theta", default=self.get("rope_theta", default=base)),
            "rotary_fraction": read.get(
                "partial_rotary_factor", default=self.get("partial_rotary_factor", default=fraction)
            ),
        }


def pattern_of(layers: list[str]) -> str:
    """The shortest pattern that gives these layers when tiled over them."""
    depth = len(layers)
    size = next(n for n in range(1, depth + 1) if depth % n == 0 and layers[:n] * (depth // n) == layers)
    return " ".join(layers[:size])


def _plain(value: Any) -> Any:
    """Lists as tuples, and the numbers for which JSON has no name as their ``config.json`` writes them."""
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return float(value["__float__"]) if isinstance(value, Mapping) and "__float__" in value else value
