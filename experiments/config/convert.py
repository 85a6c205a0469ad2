"""Plain dictionaries to typed dataclasses, strictly: a wrong key or type fails with its full path.

Understands what configurations are made of: dataclasses, ``bool``, ``int``, ``float``, ``str``, ``Literal[...]``,
``X | None``, ``dict[str, ...]``, ``list[...]`` and ``Any``. An int is welcome where a float is expected, and a tuple
where a list is; nothing else is converted. Numbers are finite.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from experiments.util.errors import ConfigError, choices_hint


def convert(kind: Any, value: Any, path: str = "", known: Mapping[str, Any] | None = None) -> Any:
    """``value`` as ``kind``.

    Args:
        kind: a dataclass or one of the types above.
        value: as YAML or JSON gave it.
        path: its place in the configuration, such as ``train.lr``; errors begin with it.
        known: fields of a dataclass that are known already, and so are no keys of ``value``.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value that a dataclass refuses.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _convert_dataclass(kind, value, path, known or {})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return convert(kind, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "a mapping", value)
        return {str(key): convert(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(path, "a list", value)
        return [convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} is {value!r}, {choices_hint(value, arguments)}")
        return value
    return _convert_scalar(kind, value, path)


def _convert_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{path}: expected a finite number, got {value!r:.40}")
        return float(value) + 0.0  # Which makes 0.0 of -0.0: equal configurations are written alike.
    # bool is a subclass of int, yet `steps: true` is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(path, {bool: "true or false", int: "an integer", float: "a number", str: "text"}[kind], value)
    return value


def _convert_dataclass(kind: Any, value: Any, path: str, known: Mapping[str, Any]) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _wrong_type(path, "a mapping", value)
    hints = typing.get_type_hints(kind)
    options = [field for field in fields(kind) if field.init and field.name not in known]
    names = [field.name for field in options]
    for key in value:
        if key not in names:
            hint = choices_hint(key, names) if names else "nothing can be set here"
            raise ConfigError(f"{_join(path, str(key))}: unknown key, {hint}")
    missing = [
        field.name
        for field in options
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{_join(path, missing[0])}: missing, no value was given and there is no default")
    arguments = {name: convert(hints[name], value[name], _join(path, name)) for name in names if name in value}
    try:
        return kind(**arguments, **known)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _wrong_type(path: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {value!r} ({type(value).__name__})")
