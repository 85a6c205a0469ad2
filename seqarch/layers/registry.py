"""Layers by name: how a class is registered under one, and found by it or by where it is imported from."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, TypeVar

from seqarch.layers.mixer import Layer, LayerConfig
from seqarch.ops.dispatch.checks import show, unknown_name

L = TypeVar("L", bound=Layer)

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = ("none",)
"""What a pattern says where it wants no channel mixer."""

COMPOSED = {"zamba2": "seqarch.layers.hybrid.zamba2:Zamba2"}
"""Mixers made of others, by short names for their import paths; they are imported where a pattern names them."""


def register(kind: str, registry: dict[str, type[L]], base: type[L], name: str, layer: type[L]) -> None:
    """Enter a class into a registry.

    Raises:
        ValueError: no pattern can hold the name, another class has it, or the class is no such layer.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
        form = f"letters, digits and _, as in 'my_{kind.replace(' ', '_')}'"
        raise ValueError(f"{kind}: cannot register the name {show(name)}, expected {form}")
    check_class(kind, base, layer, f"cannot register {name!r}: ")
    there = registry.get(name, layer)
    if name in COMPOSED or (there is not layer and not _is_again(there, layer)):
        known = COMPOSED.get(name) or _place(there)
        raise ValueError(f"{kind} {name!r} is {known} already, and cannot be {_place(layer)} too: give it another name")
    registry[name] = layer


def _is_again(there: type, layer: type) -> bool:
    """Whether a class is a later version of another: its cell was run again, or its module reloaded."""
    return "<locals>" not in layer.__qualname__ and _place(there) == _place(layer)


def check_class(kind: str, base: type, layer: Any, what: str) -> None:
    """Raise unless ``layer`` is a class that derives from ``base``, is complete and has a ``Config``.

    Raises:
        ValueError: it is not; ``what`` begins the reason.
    """
    what = f"{kind}: {what}"
    if not (isinstance(layer, type) and issubclass(layer, base)):
        given = _place(layer) if isinstance(layer, type) else show(layer)
        raise ValueError(f"{what}{given} is no class that derives from seqarch.layers.{base.__name__}")
    if inspect.isabstract(layer):
        raise ValueError(f"{what}{_place(layer)} does not define {', '.join(sorted(layer.__abstractmethods__))}")
    config = getattr(layer, "Config", None)
    if not (isinstance(config, type) and issubclass(config, LayerConfig) and is_dataclass(config)):
        expected = "expected a frozen dataclass derived from seqarch.layers.LayerConfig"
        raise ValueError(f"{what}the Config of {_place(layer)} is {show(config)}, {expected}")


def find(kind: str, registry: dict[str, type[L]], base: type[L], name: str, also: Iterable[str] = ()) -> type[L]:
    """The class of that name; or, of ``package.module:Class`` and ``package.module.Class``, the one that is there.

    Args:
        also: further names that an error lists.

    Raises:
        ValueError: nothing is registered under the name, or no such layer is there.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    if not isinstance(name, str) or not re.search("[.:]", name):
        raise unknown_name(kind, name, [*registry, *also])
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(f"{kind} {name!r}: expected a registered name or an import path, as in 'package.module:Class'")
    try:
        found = vars(importlib.import_module(module))
    except ImportError as error:
        raise ValueError(f"{kind} {name!r}: cannot import {module}: {error}; is its folder in PYTHONPATH?") from error
    if attribute not in found:
        near = difflib.get_close_matches(attribute, found, n=1)
        raise ValueError(
            f"{kind} {name!r}: {module} has no {attribute}." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    check_class(kind, base, found[attribute], "")
    return found[attribute]


def _place(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"
