"""Reading another library's configuration: an object with attributes, or the dictionary of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = object()


class Settings:
    """A configuration's values by name, and errors that name what is missing or not to be had here."""

    def __init__(self, config: Any):
        self.config = config
        self.model_type = self.get("model_type")

    def get(self, *names: str, default: Any = _ABSENT) -> Any:
        """The value of the first of these names that is there and not ``None``, else the default.

        Raises:
            ValueError: it has none of the names, and there is no default.
        """
        for name in names:
            value = self.config.get(name) if isinstance(self.config, Mapping) else getattr(self.config, name, None)
            if value is not None:
                return _plain(value)
        if default is _ABSENT:
            raise ValueError(f"the configuration has no setting {' or '.join(names)}")
        return default

    def only(self, **supported: Any) -> None:
        """Check that these settings have the only value that is supported here, or are absent.

        Raises:
            ValueError: some have another value; all of them are named.
        """
        given = {name: self.get(name, default=value) for name, value in supported.items()}
        differ = {name: value for name, value in supported.items() if given[name] != value}
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
