"""A language model from its stored configuration and tensors, without memory for parameters that are replaced."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqarch.checkpoints.errors import CheckpointError
from seqarch.layers import CHANNEL_MIXERS, MIXERS, channel_mixer_class, mixer_class
from seqarch.layers.mixer import Mixer
from seqarch.layers.registry import COMPOSED
from seqarch.models import LanguageModel, LMConfig, parse_pattern


def build(
    options: Mapping[str, Any], plugins: Sequence[str], folder: Path, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model that the options of an :class:`LMConfig` describe, to be given tensors by :func:`fill`.

    It lies on the meta device, but for one with layers from outside of seqarch, which may hold tensors that are in no
    state dict: that lies on the CPU. The caller's random streams stay as they are. Nothing is computed on the meta
    device, for which torch would import its compiler, seconds and 100 MB: memory that nobody writes to costs nothing.

    Args:
        plugins: modules to import where layers are not registered yet, after those that installed packages offer.
        folder: where the options are from, for errors.
        dtype: that the model is to have; by default torch's.

    Raises:
        CheckpointError: no model can be built of them.
    """
    problems: list[str] = []
    try:
        problems = _import_plugins(plugins, options)
        config = LMConfig(**options)
        own = _own_layers(options)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _NothingDrawn() if own else nullcontext():
            model = LanguageModel(config)
        return model.to("meta", dtype) if own else model.to(dtype)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError("; ".join([f"cannot build the model of {folder}: {error}", *problems])) from error


def fill(model: LanguageModel, tensors: Mapping[str, Tensor], stored: Path, config_file: Path) -> None:
    """Make the tensors the model's parameters and buffers, without copying them.

    Args:
        stored: where the tensors are from, for errors.
        config_file: where the model's configuration is from.

    Raises:
        CheckpointError: some are missing, left over or of another shape.
    """
    try:
        model.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"{stored} does not fit the model of {config_file}: {lines}") from error


def main_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The floating-point dtype of most numbers, among tensors of these dtypes and sizes; float32 where none is."""
    counts: dict[torch.dtype, int] = {}
    for dtype, numbers in tensors:
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + numbers
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def wide_parameters(model: LanguageModel) -> set[str]:
    """Names of the mixers' own parameters, such as ``A_log``, ``dt_bias`` and ``D``.

    Mixers widen these to float32 where they use them, so they may be wider than the model around them.
    """
    mixers = ((name, module) for name, module in model.named_modules() if isinstance(module, Mixer))
    return {f"{name}.{own}" for name, mixer in mixers for own, _ in mixer.named_parameters(recurse=False)}


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the initialisation of parameters by random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_DRAWS = {
    *(Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_, nn.init.orthogonal_),
    *(nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.xavier_uniform_),
}


def _layer_names(options: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The mixers and channel mixers that a pattern uses."""
    layers = parse_pattern(options.get("pattern", ""))
    channels = {layer.channel or options.get("channel", "swiglu") for layer in layers} - {"none"}
    return {name for layer in layers for name in layer.mixers}, channels


def _own_layers(options: Mapping[str, Any]) -> bool:
    """Whether all layers are seqarch's own."""
    mixers, channels = _layer_names(options)
    classes = [*(mixer_class(name) for name in mixers), *(channel_mixer_class(name) for name in channels)]
    return all(each.__module__.startswith("seqarch.") for each in classes)


def _unregistered(options: Mapping[str, Any]) -> set[str]:
    mixers, channels = _layer_names(options)
    return (mixers - MIXERS.keys() - COMPOSED.keys()) | (channels - CHANNEL_MIXERS.keys())


def _import_plugins(plugins: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Import what registers a model's own layers, while any are missing; why those failed that did."""
    problems = []
    offered = [point.module for point in entry_points(group="seqarch.plugins")] if _unregistered(options) else []
    for name in [*offered, *plugins]:
        if not _unregistered(options):
            break
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(f"cannot import the plug-in {name}: {error}; is its folder in PYTHONPATH?")
    return problems
