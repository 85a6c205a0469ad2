"""Reading another library's configuration: an object with attributes, or the dictionary of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, ClassVar, Self

from seqarch.layers.modules.options import check_factors, check_options
from seqarch.layers.modules.rope_scaling import ROPE_TYPES, rope_scaling
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
        only: fields that theirs reads and that have one value here, which is also their default. Off is off,
            whether it is False, 0 or None.
        aliases: other names of fields, as ``{alias: field}``; where both are given, theirs takes the alias.
        unread: fields of a base class of ours that theirs does not read, at least not by this name.
        in_files_only: fields that theirs reads from a file and turns into others, so that an object's do not count.
        in_objects: what such fields are in an object, where that is not the default of files.
        may_be_zero: numbers that may be 0; all others are positive.
        options: the field that each option is, as it stands, by our name of the mixer or channel mixer, and of the
            model as ``"model"``. A family's are added to those of its bases; they are read by :meth:`options_of` and
            written by ``seqarch.pretrained``.
        layer_kinds: fields that name what each layer has, with our names by theirs, that to be written first.
    """

    model_type: ClassVar[str]
    only: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    unread: ClassVar[tuple[str, ...]] = ()
    in_files_only: ClassVar[tuple[str, ...]] = ()
    in_objects: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": None}
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "model": {"vocab_size": "vocab_size", "d_model": "hidden_size", "tie_embeddings": "tie_word_embeddings"}
    }
    layer_kinds: ClassVar[Mapping[str, Mapping[str, str]]] = {}

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
        values = _values(config, cls.in_files_only, cls.in_objects)
        called = {field: alias for alias, field in cls.aliases.items() if alias in values}
        given = {field: _plain(values[alias]) for field, alias in called.items()}
        only = {"per_layer_config": None, **cls.only}
        read = (name for name in (*only, *(each.name for each in fields(cls))) if name not in cls.unread)
        own = (name for name in read if name in values)
        given = {**{name: _plain(values[name]) for name in own}, **given}
        wrong = {name: one for name, one in only.items() if given.get(name, one) != one and (given[name] or one)}
        if wrong:
            shown = ", ".join(f"{called.get(name, name)}={given[name]!r} (only {one!r})" for name, one in wrong.items())
            drops = any(name.endswith(("dropout", "pdrop")) for name in wrong)
            how = "; dropout is not applied here: to read the model without, write 0.0 in config.json" if drops else ""
            raise ValueError(f"{cls.model_type}: these settings have no counterpart here: {shown}{how}")
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

    @classmethod
    def all_options(cls) -> dict[str, dict[str, str]]:
        """Those of :attr:`options` of the family and of its bases."""
        found: dict[str, dict[str, str]] = {}
        for each in reversed(cls.__mro__):
            for name, options in vars(each).get("options", {}).items():
                found[name] = {**found.get(name, {}), **options}
        return found

    def options_of(self, name: str) -> dict[str, Any]:
        """What fields say, as they stand, of the mixer or channel mixer ``name``, or of the ``"model"``."""
        return {option: getattr(self, field) for option, field in self.all_options()[name].items()}

    @classmethod
    def called(cls, name: str) -> str:
        """What the field ``name`` is called in theirs."""
        return next((alias for alias, own in cls.aliases.items() if own == name in cls.unread), name)

    def refuse(self, name: str, expected: str) -> ValueError:
        """The error for a field whose value fits its type but not the others."""
        return ValueError(f"{self.model_type}: {self.called(name)} is {show(getattr(self, name))}, expected {expected}")

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

    Class attributes:
        rope_types: the types of scaling that theirs has.
        rope_aliases: other names of types, as ``{alias: type}``.
    """

    in_files_only: ClassVar[tuple[str, ...]] = ("rope_scaling", "rope_theta", "partial_rotary_factor")
    rope_types: ClassVar[tuple[str, ...]] = ("default", *ROPE_TYPES)
    rope_aliases: ClassVar[Mapping[str, str]] = {}

    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = 10000.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None

    def rotary(self, width: int) -> dict[str, Any]:
        """Options of the rotary embedding of heads of this width.

        Raises:
            ValueError: they turn in a way that has no counterpart here, differ by layer or turn an odd number of
                channels.
        """
        name = "rope_scaling" if self.rope_scaling else "rope_parameters"
        return self.rotation(width, name, getattr(self, name) or {}, self.rope_theta)

    def rotation(self, width: int, name: str, found: Mapping[str, Any], base: float | None) -> dict[str, Any]:
        """The options that the parameters ``found`` describe.

        Args:
            name: what they are called in errors.
            base: where they have no ``rope_theta``.
        """
        if nested := [key for key, value in found.items() if isinstance(value, Mapping)]:
            expected = f"the same for all layers, not one for {' and '.join(nested)}"
            raise ValueError(f"{self.model_type}: {name} is {show(found)}, expected {expected}")
        fraction = self.turning_fraction(name, found)
        if (turning := int(fraction * width)) % 2 or not turning:
            sizes = "head_dim or hidden_size / num_attention_heads, and partial_rotary_factor"
            raise ValueError(
                f"{self.model_type}: of heads of width {width} ({sizes}) {turning} channels turn, expected them even"
            )
        options = {"rotary_base": self._rotary_number(name, found, "rope_theta", base), "rotary_fraction": fraction}
        scaling = self._scaling(name, found)
        try:
            rope_scaling(scaling, "rotary", options["rotary_base"], [turning])
        except ValueError as error:
            raise ValueError(f"{self.model_type}: {name}: {error}") from error
        return options if scaling is None else {**options, "rope_scaling": scaling}

    def turning_fraction(self, name: str, found: Mapping[str, Any]) -> float:
        """The part of each head's channels that turns, of the parameters ``found``; ``name`` is theirs in errors."""
        return 1.0

    def _scaling(self, name: str, found: Mapping[str, Any]) -> dict[str, Any] | None:
        """How angles are scaled for longer sequences, with numbers that theirs takes from elsewhere filled in."""
        kind = found.get("rope_type", found.get("type", "default"))
        kind = self.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in self.rope_types:
            known = ", ".join(self.rope_types)
            raise ValueError(f"{self.model_type}: {name}: rope_type={kind!r} has no counterpart here (only {known})")
        if kind == "default":
            return None
        names = [field.name for field in fields(ROPE_TYPES[kind])]
        given = {key: found[key] for key in names if found.get(key) is not None}
        if kind == "dynamic":
            given["original_max_position_embeddings"] = self.max_position_embeddings
        elif "original_max_position_embeddings" in names:
            beside = self.original_max_position_embeddings
            before = given.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            given["original_max_position_embeddings"] = before if beside is None else beside
            self._fill_factor(name, kind, given)
        return {"rope_type": kind, **given}

    def _fill_factor(self, name: str, kind: str, given: dict[str, Any]) -> None:
        """Where it is not given, how many times as long as the first ones sequences may be."""
        if kind == "llama3" or "factor" in given:
            return
        before = given["original_max_position_embeddings"]
        if not fits(before, (int,)) or before < 1:
            wrong = f"original_max_position_embeddings is {show(before)}"
            raise ValueError(f"{self.model_type}: {name}: {wrong}, expected it positive")
        given["factor"] = self.max_position_embeddings / before

    def _rotary_number(self, name: str, found: Mapping[str, Any], key: str, beside: float | None) -> float:
        value = found.get(key, beside)
        if not fits(value, (float,)) or not 0 < value < inf:
            raise ValueError(f"{self.model_type}: {name}: {key} is {show(value)}, expected it positive")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class PartialRotarySettings(RotarySettings):
    """Rotary positions of a family that lets a part of each head's channels turn."""

    partial_rotary_factor: float | None = 1.0

    def turning_fraction(self, name: str, found: Mapping[str, Any]) -> float:
        beside = 1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor
        return self._rotary_number(name, found, "partial_rotary_factor", beside)


def _values(config: Any, in_files_only: Sequence[str], in_objects: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file or an object says; those of ``transformers`` 5 have one field of all about rotary positions."""
    if isinstance(config, Mapping):
        return config
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    if "rope_parameters" not in values and any(name.startswith("rope_") for name in values):
        return values
    plain = {name: value for name, value in values.items() if name not in in_files_only}
    return plain | {name: value for name, value in in_objects.items() if name in in_files_only}


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
