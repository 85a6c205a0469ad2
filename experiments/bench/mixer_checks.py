"""Checks that every mixer keeps its contract on the device: against itself in float64 on the CPU, by the references.

The values and gradients of a whole sequence, sequences packed and apart, a sequence that is cut and continued token by
token, all in float32; and the values in bfloat16, of the same rounded parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench.check import Check, guarded
from seqarch.layers import MIXERS, Mixer
from seqarch.testing import Case, error, reference_backends

BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 0.05}
"""RMS of the difference over the RMS of the reference."""

D_MODEL = 64
LENGTH, CUT, STEPS = 130, 77, 3
"""Tokens of a sequence, where it is cut, and how many of its last tokens are then taken one by one."""

OFFSETS = (0, 5, 5, 71, LENGTH)


@dataclass(frozen=True)
class CheckedMixer:
    """A mixer with its defaults, on a device."""

    mixer: str
    device: torch.device

    @property
    def name(self) -> str:
        return f"mixer {self.mixer}"

    def build(self, dtype: torch.dtype) -> Mixer:
        return Case(MIXERS[self.mixer], "", "", {}, D_MODEL).build(dtype).to(self.device)

    def exact(self, dtype: torch.dtype) -> Mixer:
        """The same parameters, in float64 on the CPU."""
        return Case(MIXERS[self.mixer], "", "", {}, D_MODEL).build(dtype).double()

    def draw(self, batch: int, seed: int = 1) -> Tensor:
        return Case(MIXERS[self.mixer], "", "", {}, D_MODEL).inputs(LENGTH, batch, torch.float32, seed)

    def check(self, what: str, found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> Check:
        return Check(f"{self.name}, {str(dtype)[6:]}: {what}", error(found.cpu(), expected), BOUNDS[dtype])

    def checks(self) -> Iterator[Check]:
        yield from self._gradients()
        with torch.no_grad():
            yield from self._packed_and_cut()
            x, dtype = self.draw(2), torch.bfloat16
            with reference_backends():
                expected, _ = self.exact(dtype)(x.to(dtype).double())
            yield self.check("output", self.build(dtype)(x.to(self.device, dtype))[0], expected, dtype)

    def _gradients(self) -> Iterator[Check]:
        with reference_backends():
            expected = differentiated(self.exact(torch.float32), self.draw(2).double(), self.draw(2, 2))
        found = differentiated(self.build(torch.float32), self.draw(2).to(self.device), self.draw(2, 2))
        for name, x in found.items():
            yield self.check(name, x, expected[name])

    def _packed_and_cut(self) -> Iterator[Check]:
        mixer, x = self.build(torch.float32), self.draw(1)
        offsets, there = torch.tensor(OFFSETS), x.to(self.device)
        with reference_backends():
            whole, _ = self.exact(torch.float32)(x.double())
            packed, _ = self.exact(torch.float32)(x.double(), None, offsets)
        yield self.check("packed", mixer(there, None, offsets.to(self.device))[0], packed)
        pieces, state = [], mixer.init_state(1)
        for piece in there.split([CUT, LENGTH - CUT - STEPS, *[1] * STEPS], dim=1):
            y, state = mixer(piece, state)
            pieces.append(y)
        yield self.check("cut", torch.cat(pieces, 1), whole)

    def run(self) -> list[Check]:
        return guarded(self.name, self.checks)


def differentiated(mixer: Mixer, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradients of a weighted sum of them with the mixer's own loss."""
    x = x.detach().requires_grad_()
    y, _ = mixer(x)
    total = (y * weight.to(y)).sum() + (0 if (extra := mixer.auxiliary_loss()) is None else extra)
    named = {"x": x, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    found = {f"gradient of {name}": x for name, x in zip(named, grads, strict=True) if x is not None}
    return {"output": y.detach(), **found}


def checked(device: torch.device) -> list[CheckedMixer]:
    return [CheckedMixer(name, device) for name in MIXERS]
