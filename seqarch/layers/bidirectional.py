"""Any mixer read in both directions of time, for sequences that are there as a whole: audio, genomes, images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqarch.layers.mixer import CuSeqlens, Mixer
from seqarch.ops.dispatch.checks import sequence_offsets, show, unknown_name

COMBINATIONS = ("sum", "mean", "concatenate")


class Bidirectional(nn.Module):
    """``y = forward(x) + reversed(backward(reversed(x)))``: every output sees every token of its sequence.

    A module ``[B, T, D]`` to ``[B, T, D]``, with the laws of mixers but for causality and what follows from it: there
    is no state, so that a sequence cannot be read in parts. Hence no :class:`~seqarch.layers.Mixer`, and no part of a
    language model.

    Args:
        ahead: the mixer that reads from the first token on.
        behind: the mixer that reads from the last token on; ``None`` for the same one, with the same weights.
        combine: ``"sum"``, ``"mean"``, or ``"concatenate"``, whose outputs are ``[B, T, 2 D]``.

    Raises:
        ValueError: what is given is no mixer, the two differ in their width, one takes tensors of other layers or
            gives them some, or there is no such combination.
    """

    def __init__(self, ahead: Mixer, behind: Mixer | None = None, *, combine: str = "sum"):
        super().__init__()
        behind = ahead if behind is None else behind
        for mixer in (ahead, behind):
            if not isinstance(mixer, Mixer):
                raise ValueError(f"Bidirectional: got {show(mixer)}, expected a mixer, as build_mixer makes")
            if mixer.takes or mixer.gives:
                name = type(mixer).__name__
                raise ValueError(f"Bidirectional: {name} exchanges tensors with other layers of a stack")
        if ahead.config.d_model != behind.config.d_model:
            widths = f"{ahead.config.d_model} and {behind.config.d_model}"
            raise ValueError(f"Bidirectional: mixers of widths {widths}, expected one width")
        if combine not in COMBINATIONS:
            raise unknown_name("combine of Bidirectional", combine, COMBINATIONS)
        self.ahead, self.behind, self.combine = ahead, behind, combine

    def forward(
        self, x: Tensor, *, cu_seqlens: CuSeqlens = None, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """The outputs of both directions.

        Args:
            cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T, each reversed for itself.
            lengths: ``[B]``, tokens of each row before its padding, which changes no output of theirs.

        Raises:
            ValueError: both are given, or one does not fit x.
        """
        self.ahead.check_input(x)
        order = self._order(x, cu_seqlens, lengths)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        one, _ = self.ahead(x, None, cu_seqlens)
        other, _ = self.behind(x[rows, order], None, cu_seqlens)
        other = other[rows, order]  # reversed twice, a sequence is itself
        if self.combine == "concatenate":
            return torch.cat([one, other], dim=-1)
        return one + other if self.combine == "sum" else (one + other) / 2

    def _order(self, x: Tensor, cu_seqlens: CuSeqlens, lengths: Sequence[int] | Tensor | None) -> Tensor:
        """Where each token of the reversed sequences is in x, ``[1 or B, T]``."""
        batch, length = x.shape[:2]
        if cu_seqlens is not None and lengths is not None:
            raise ValueError("Bidirectional: cu_seqlens and lengths are given, expected one of them")
        at = torch.arange(length, device=x.device)
        if lengths is not None:
            ends = torch.as_tensor(lengths, device=x.device)
            whole = ends.shape == (batch,) and not ends.is_floating_point()
            if not whole or bool(((ends < 0) | (ends > length)).any()):
                expected = f"{batch} whole numbers from 0 to {length}"
                raise ValueError(f"Bidirectional: lengths is {show(lengths)}, expected {expected}")
            ends = ends[:, None]
            return torch.where(at < ends, ends - 1 - at, at)
        offsets = sequence_offsets("Bidirectional", cu_seqlens, batch, length)
        if offsets is None:
            return at.flip(0)[None]
        bounds = torch.tensor(offsets, device=x.device)
        first, last = (each.repeat_interleave(bounds.diff(), output_size=length) for each in (bounds[:-1], bounds[1:]))
        return (first + last - 1 - at)[None]

    def flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs over ``length`` tokens: those of both mixers."""
        return self.ahead.flops(length, batch_size) + self.behind.flops(length, batch_size)
