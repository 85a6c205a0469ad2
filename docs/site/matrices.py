"""The T x T matrix of each mixer, as a picture that is read on light and dark pages."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from docs.matrices import LENGTH, SHOWN, WIDTH, magnitudes
from seqarch.layers import MIXERS, build_mixer
from seqarch.layers.materialize import VALUES
from seqarch.ops import record_calls

SMALL = {
    "attention": SHOWN["attention"],
    "moba": {"block_size": 4, "top_k": 3},
    "dsa": {"top_k": 12},
    "sparse_mla": {"top_k": 12},
    "longformer": {"block_size": 4, "window": 12, "global_tokens": 4},
    "based": {"window": 12},
    "lolcats": {"window": 12},
}
"""Options beside those of docs/images/matrices.png, by which as few tokens show what is chosen."""

LATE = ("lolcats",)
"""Mixers whose operation reads values so many tokens late that its columns are not those of the values' tokens."""

INK = (0x2F, 0x6F, 0xC4)
SIZE = 6
"""Pixels of an entry."""

WEIGHTS = "the weights of the values in the first head"
INFLUENCE = "how much each output changes with each input"


def is_linear(name: str) -> bool:
    """Whether the mixer calls an operation that is linear in its values, each with its own token, so that it has a
    matrix."""
    if name in LATE:
        return False
    mixer = build_mixer(name, d_model=WIDTH, **options(name))
    with record_calls() as calls, torch.no_grad():
        mixer(torch.zeros(1, LENGTH, WIDTH))
    return any(call.op in VALUES for call in calls)


def options(name: str) -> dict:
    return SHOWN.get(name) or SMALL.get(name, {})


def influence(name: str) -> torch.Tensor:
    """``[T, T]``: how much each output changes with each input, the norm of the Jacobian, each row by its largest."""
    torch.manual_seed(0)
    half = torch.randn(1, LENGTH // 2, 16, dtype=torch.float64)
    x = torch.cat([half, half], dim=1)
    mixer = build_mixer(name, d_model=16, **options(name)).double()
    jacobian = torch.autograd.functional.jacobian(lambda given: mixer(given)[0][0], x)
    assert isinstance(jacobian, torch.Tensor)
    weights = jacobian[:, :, 0].norm(dim=(1, 3))  # [T, D, T, D]
    return weights / weights.amax(-1, keepdim=True).clamp(min=1e-12)


def draw(folder: Path) -> dict[str, str]:
    """Write a picture of each mixer, NAME.png; by mixer what its picture shows."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {}
    for name in MIXERS:
        linear = is_linear(name)
        weights = magnitudes(name, options(name)) if linear else influence(name)
        _picture(weights).save(folder / f"{name}.png", optimize=True)
        shown[name] = WEIGHTS if linear else INFLUENCE
    return shown


def _picture(weights: torch.Tensor) -> Image.Image:
    """Ink by weight, on no ground."""
    opacity = (weights.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    ink = Image.new("RGBA", opacity.shape[::-1], (*INK, 0))
    ink.putalpha(Image.fromarray(opacity))
    return ink.resize((LENGTH * SIZE, LENGTH * SIZE), Image.Resampling.NEAREST)
