"""The layers of a model by the kinds that its pattern names."""

from __future__ import annotations

from typing import Any

from seqarch.layers import Mixer
from seqarch.layers.registry import COMPOSED
from seqarch.models import LanguageModel, tile_pattern


def kinds_of_layers(model: LanguageModel) -> list[tuple[tuple[str, ...], str]]:
    """The mixers and the channel mixer of each layer, by their short names where they have some."""
    config = model.config
    layers = tile_pattern(config.pattern, config.depth)
    return [(tuple(map(short_name, each.mixers)), config.channel_of(each)) for each in layers]


def short_name(mixer: str) -> str:
    """The short name of a mixer made of others, which a pattern may also name by its import path."""
    return next((name for name, path in COMPOSED.items() if path == mixer), mixer)


class Layers:
    """The layers of a model: their kinds, the config of each kind, and that of each layer's first mixer.

    Mixers that another one is made of count as kinds too, by the names of its parts, where no layer is of that kind.
    """

    def __init__(self, model: LanguageModel):
        self.kinds = kinds_of_layers(model)
        self.configs: dict[str, Any] = {}
        self.each: list[Any] = []
        for layer, (mixers, channel) in zip(model.stack.layers, self.kinds, strict=True):
            found: Any = layer
            self.each.append(found.mixers[0].config)
            self.configs.update({name: mixer.config for name, mixer in zip(mixers, found.mixers, strict=True)})
            if found.channel is not None:
                self.configs[channel] = found.channel.config
        parts = [part for layer in model.stack.layers for mixer in layer.mixers for part in mixer.named_children()]  # type: ignore[union-attr]
        for name, part in parts:
            if isinstance(part, Mixer):
                self.configs.setdefault(name, part.config)

    def places(self, name: str) -> list[int]:
        """The layers that have this mixer or channel mixer."""
        return [i for i, (mixers, channel) in enumerate(self.kinds) if name in (*mixers, channel)]

    def get(self, name: str) -> Any:
        if name not in self.configs:
            raise ValueError(f"it has no {name}, but {', '.join(self.configs)}")
        return self.configs[name]
