"""A model whose state is of 16, 8 or 4 bits, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from seqarch.layers.mixer import Mixer
from seqarch.layers.modules.state_format import StateFormat
from seqarch.layers.small_state import SmallState, give_small_state, take_small_state
from seqarch.models.one_token import OneToken
from seqarch.models.stack import Stack
from seqarch.ops.dispatch.checks import unknown_name

M = TypeVar("M", bound=nn.Module)


def quantize_state(
    model: M,
    name: str,
    *,
    rounding: str = "nearest",
    error_feedback: bool = False,
    group_size: int | None = None,
    seed: int = 0,
    keep: str | Sequence[str] = (),
) -> M:
    """Let mixers hold what they carry from call to call in few bits, in place; returns the model.

    A recurrent state is coded after each call, so that its rounding errors go on: a prompt is read in full precision
    within a call and coded at its end, then with every token. Keys and values are coded as they are written, and every
    query reads them so. Inputs of convolutions are rounded to the nearest, in 8 bits under ``"int4"``. Positions,
    counts and the like stay as they are. Weights, names and folders do not change; ``state_bytes`` counts what is held.

    Args:
        name: ``"bfloat16"``, ``"int8"``, ``"int4"``, or ``"float32"``, which rounds nothing in a float32 model.
        rounding: ``"nearest"``, or ``"stochastic"``: up or down by chance, with the right mean; from the seed and each
            token's position, so that it repeats in any row and batch. A recurrent state then counts its tokens.
        error_feedback: keep what rounding a recurrent state leaves over in 4 bits a number, and add it before the next
            rounding.
        group_size: how many numbers share a scale; by default 64 of ``"int8"`` and 32 of ``"int4"``.
        seed: of stochastic rounding.
        keep: names of mixers, or of modules that they are in, whose states stay as they are, as ``"stack.layers.0"`` or
            ``"*.mixers.1"``.

    Raises:
        ValueError: there is no such format, rounding or group size, ``keep`` names no mixer, or none is left.
    """
    form = StateFormat(name, rounding, error_feedback, group_size, seed)
    mixers = dict(_mixers(model))
    kept: set[str] = set()
    for entry in (keep,) if isinstance(keep, str) else tuple(keep):
        found = {path for path in mixers if isinstance(entry, str) and _is_named(path, entry)}
        if not found:
            raise unknown_name("mixer to keep", entry, mixers)
        kept |= found
    if not mixers.keys() - kept:
        raise ValueError(f"{type(model).__name__} has no mixer left whose state could be quantised")
    for path, mixer in mixers.items():
        take_small_state(mixer) if path in kept else give_small_state(mixer, form)
    _forget_programs(model)
    return model


def dequantize_state(model: M) -> M:
    """Let mixers hold their states in full again, in place; returns the model.

    Raises:
        ValueError: no mixer's state is quantised.
    """
    small = [mixer for _, mixer in _mixers(model) if isinstance(mixer, SmallState)]
    if not small:
        raise ValueError(f"{type(model).__name__} has no mixer whose state is quantised")
    for mixer in small:
        take_small_state(mixer)
    _forget_programs(model)
    return model


def _is_named(path: str, entry: str) -> bool:
    return fnmatchcase(path, entry) or f"{path}.".startswith(f"{entry}.")


def _mixers(model: nn.Module) -> Iterator[tuple[str, Mixer]]:
    """The mixers with their names, each once, without those inside of another."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Mixer) and id(module) not in inside:
            inside.update(map(id, module.modules()))
            yield path, module


def _forget_programs(model: nn.Module) -> None:
    """What tokens were captured as is of the former states."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.token_programs = OneToken(module.token_programs.in_turn)
