"""Images read along rows and columns, forward and backward, by any mixer: a classifier of gratings, from end to end.

    python examples/scan_2d.py                       # mamba2
    python examples/scan_2d.py gated_delta_net 200   # any mixer, and how many steps

Liu et al. 2024, "VMamba: Visual State Space Model", section 4.2: the cells of an image are one sequence row by row and
another column by column, each read from both ends, so that every cell sees the whole image. ``Bidirectional`` reads a
sequence from both ends; the rest is a transposition.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import Bidirectional, build_mixer

SIZE, PATCH, ANGLES = 32, 4, 8


class Scan2d(nn.Module):
    """``y = rows(x) + columns(x)`` of cells ``x [B, H, W, D]``, each scan in both directions.

    Args:
        mixer: the name of a mixer, with its options; each of the four directions has weights of its own.
    """

    def __init__(self, d_model: int, mixer: str = "mamba2", **options):
        super().__init__()
        directions = [build_mixer(mixer, d_model=d_model, **options) for _ in range(4)]
        self.rows, self.columns = Bidirectional(*directions[:2]), Bidirectional(*directions[2:])

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        columns = self.columns(turned.flatten(1, 2)).view(turned.shape).transpose(1, 2)
        return self.rows(x.flatten(1, 2)).view(x.shape) + columns


class Classifier(nn.Module):
    """Patches, layers of scans and MLPs, the mean over all cells."""

    def __init__(self, classes: int, d_model: int = 32, depth: int = 2, mixer: str = "mamba2", **options):
        super().__init__()
        self.embed = nn.Conv2d(1, d_model, PATCH, PATCH)
        self.scans = nn.ModuleList(Scan2d(d_model, mixer, **options) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(2 * depth + 1))
        self.head = nn.Linear(d_model, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.unsqueeze(1)).permute(0, 2, 3, 1)  # [B, H, W, D]
        for scan, mlp, first, second in zip(self.scans, self.mlps, self.norms[::2], self.norms[1::2], strict=False):
            x = x + scan(first(x))
            x = x + mlp(second(x))
        return self.head(self.norms[-1](x).mean((1, 2)))


def gratings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves in one of 8 directions, of any length and phase, under noise: ``[B, 32, 32]`` and classes ``[B]``."""
    label = torch.randint(ANGLES, (count,), generator=generator)
    angle = label * math.pi / ANGLES
    frequency, phase = (torch.rand(count, generator=generator) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    wave = torch.sin(along * (0.3 + 0.5 * frequency[:, None, None]) + 2 * math.pi * phase[:, None, None])
    return wave + torch.randn(count, SIZE, SIZE, generator=generator), label


def train(mixer: str = "mamba2", steps: int = 150, seed: int = 0) -> float:
    """The share of new images that is told apart after so many steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(ANGLES, mixer=mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        images, labels = gratings(32, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        images, labels = gratings(256, generator)
        return (model(images).argmax(-1) == labels).float().mean().item()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    name, count = arguments[0] if arguments else "mamba2", int(arguments[1]) if len(arguments) > 1 else 150
    print(f"{name}: {train(name, count):.1%} of new images are right, {1 / ANGLES:.1%} by chance")
