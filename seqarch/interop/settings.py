"""Reading another library's configuration: an object with attributes, or the dictionary of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, ClassVar, Self

from seqarch.layers.mixer import check_factors, check_options
from seqarch.models.pattern import MOST, LayerPattern
from seqarch.ops.dispatch.checks import fits, show, unknown_name


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The fields of a configuration that the other library's model reads, and no others.

    A family's subclass has a field for each that it reads and any value of which can be had here, of its type and with
    the default that theirs has: a ``config.json`` leaves out what has its default. Fields that theirs does not read are
    not looked at, whatever other families mean by them.

    Class attributes:
        model_type: the family's name in a ``config.json``.
        only: fields that theirs reads and that have one value here, which is also their default.
        aliases: other names of fields, as ``{alias: field}``; where both are given, theirs takes the alias.
        in_files_only: fields that theirs reads from a file and turns into others, so that an object's do not count.
        may_be_zero: numbers that may be 0; all others are positive.
    """

    model_type: ClassVar[str]
    only: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    in_files_only: ClassVar[tuple[str, ...]] = ()
    may_be_zero: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, config: Any) -> Self:
        """The settings of a configuration: an object of theirs, or the dictionary in ``config.json``.

        Raises:
            ValueError: a field has another type or range, or no counterpart here; it is named.
        """
        values = _values(config, cls.in_files_only)
        called = {field: alias for alias, field in cls.aliases.items() if alias in values}
        given = {field: _plain(values[alias]) for field, alias in called.items()}
        only = {"per_layer_config": None, **cls.only}
        own = (name for name in (*only, *(each.name for each in fields(cls))) if name in values)
        given = {**{name: _plain(values[name]) for name in own}, **given}
        wrong = {name: one for name, one in only.items() if given.get(name, one) != one}
        if wrong:
            shown = ", ".join(f"{called.get(name, name)}={given[name]!r} (only {one!r})" for name, one in wrong.items())
            raise ValueError(f"{cls.model_type}: these settings have no counterpart here: {shown}")
        try:
            settings = cls(**{name: value for name, value in given.items() if name not in only})
            check_options(settings, cls.may_be_zero)
            if settings.num_hidden_layers > MOST:
                raise ValueError(f"num_hidden_layers must be at most {MOST}, got {settings.num_hidden_layers}")
        except ValueError as error:
            renamed = ", ".join(f"{field} given as {alias}" for field, alias in called.items() if field in str(error))
            also = f" ({renamed})" if renamed else ""
            raise ValueError(f"{cls.model_type}: {error}{also}") from error
        return settings

    def refuse(self, name: str, expected: str) -> ValueError:
        """The error for a field whose value fits its type but not the others."""
        return ValueError(f"{self.model_type}: {name} is {show(getattr(self, name))}, expected {expected}")

    def factors(self, name: str, count: int) -> list[float]:
        """The field's list of so many positive numbers, all 1 where there is none.

        Raises:
            ValueError: it is another.
        """
        factors = getattr(self, name)
        if factors is None:
            return [1.0] * count
        check_factors(f"{self.model_type}: {name}", factors, count)
        return factors

    def chosen(self, name: str, choices: Mapping[str, str], entries: Sequence[str], count: int = 0) -> list[str]:
        """The meaning of each of the entries that the field ``name`` holds, or stands for.

        Raises:
            ValueError: there are none, or not ``count`` of them, if given, or one is none of the choices.
        """
        if not entries or len(entries) != (count or len(entries)):
            expected = f"{count}, one per layer (num_hidden_layers)" if count else "at least one"
            raise ValueError(f"{self.model_type}: {name} has {len(entries)} entries, expected {expected}")
        for entry in entries:
            if not isinstance(entry, str) or entry not in choices:
                raise unknown_name(f"entry of {name}", entry, choices)
        return [choices[entry] for entry in entries]


@dataclass(frozen=True, kw_only=True)
class RotarySettings(BaseSettings):
    """Rotary positions, by today's names or earlier ones.

    A file's ``rope_scaling`` wins over ``rope_parameters``; what is in neither may be beside them.
    """

    in_files_only: ClassVar[tuple[str, ...]] = ("rope_scaling", "rope_theta", "partial_rotary_factor")

    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = 10000.0

    def rotary(self, width: int) -> dict[str, float]:
        """Options of the rotary embedding of heads of this width.

        Raises:
            ValueError: the angles are scaled for longer sequences, differ by layer or turn an odd number of channels.
        """
        found = getattr(self, self._rotary_name) or {}
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            given = f"{self._rotary_name}: rope_type={kind!r}"
            raise ValueError(f"{self.model_type}: {given} has no counterpart here (only 'default')")
        if nested := [name for name, value in found.items() if isinstance(value, Mapping)]:
            raise self.refuse(self._rotary_name, f"the same for all layers, not one for {' and '.join(nested)}")
        fraction = self.turning_fraction()
        if (turning := int(fraction * width)) % 2 or not turning:
            sizes = "head_dim or hidden_size / num_attention_heads, and partial_rotary_factor"
            raise ValueError(
                f"{self.model_type}: of heads of width {width} ({sizes}) {turning} channels turn, expected them even"
            )
        return {"rotary_base": self._rotary_number("rope_theta", self.rope_theta), "rotary_fraction": fraction}

    def turning_fraction(self) -> float:
        """The part of each head's channels that turns."""
        return 1.0

    @property
    def _rotary_name(self) -> str:
        return "rope_scaling" if self.rope_scaling else "rope_parameters"

    def _rotary_number(self, name: str, beside: float | None) -> float:
        value = (getattr(self, self._rotary_name) or {}).get(name, beside)
        if not fits(value, (float,)) or not 0 < value < inf:
            raise ValueError(f"{self.model_type}: {self._rotary_name}: {name} is {show(value)}, expected it positive")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class PartialRotarySettings(RotarySettings):
    """Rotary positions of a family that lets a part of each head's channels turn."""

    partial_rotary_factor: float | None = 1.0

    def turning_fraction(self) -> float:
        beside = 1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor
        return self._rotary_number("partial_rotary_factor", beside)


def _values(config: Any, in_files_only: Sequence[str]) -> Mapping[str, Any]:
    """What a file or an object says; those of ``transformers`` 5 have one field of all about rotary positions."""
    if isinstance(config, Mapping):
        return config
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    if "rope_parameters" not in values and any(name.startswith("rope_") for name in values):
        return values
    whole = {"partial_rotary_factor": None} if "partial_rotary_factor" in in_files_only else {}
    return {name: value for name, value in values.items() if name not in in_files_only} | whole


def _plain(value: Any) -> Any:
    """Tuples as lists, and the numbers for which JSON has no name as their ``config.json`` writes them."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return float(value["__float__"]) if isinstance(value, Mapping) and "__float__" in value else value


def pattern_of(layers: Sequence[str | LayerPattern]) -> str:
    """The shortest pattern that gives these layers, with their own options, when tiled over them."""
    shown = [str(layer) for layer in layers]
    depth = len(shown)
    size = next(n for n in range(1, depth + 1) if depth % n == 0 and shown[:n] * (depth // n) == shown)
    return " ".join(shown[:size])
