"""Hyena: gates and convolutions as long as the sequence in turn, whose filters are functions of position."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from seqarch.layers.mixer import (
    Boundaries,
    Device,
    LayerConfig,
    Mixer,
    first_tensor,
    linear_flops,
    measured_state_bytes,
)
from seqarch.layers.modules import long_conv
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear, is_plain_linear, widened
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.rows import join_rows, padded_to, select
from seqarch.ops.dispatch.autocast import without_autocast

SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Rates of the windows, a filter's length to one hundredth, as in the release."""


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(LayerConfig):
    """Options of :class:`Hyena`.

    Attributes:
        order: N, how many gates and long convolutions follow each other.
        conv_width: width of the short convolution.
        length: L, the unit in which the filters measure positions: about the length of training sequences.
        filter_width: width of the filters' network.
        filter_features: K, frequencies of the position's encoding.
        filter_frequency: factor within the network's sines at first.
    """

    order: int = 2
    conv_width: int = 3
    length: int = 1024
    filter_width: int = 64
    filter_features: int = 16
    filter_frequency: float = 10.0


class HyenaState(NamedTuple):
    """State of :class:`Hyena`.

    Attributes:
        conv: the short convolution's last inputs ``[B, W - 1, (N + 1) D]``.
        inputs: those of the long convolutions so far, ``[B, N, capacity, D]``, aligned to the right after zeros.
        lengths: tokens of each row so far.
    """

    conv: Tensor
    inputs: Tensor
    lengths: tuple[int, ...]

    @property
    def row_count(self) -> int:
        return len(self.lengths)

    def select_rows(self, index: list[int]) -> HyenaState:
        conv, inputs = (select(part, index) for part in (self.conv, self.inputs))
        return HyenaState(conv, inputs, tuple(self.lengths[i] for i in index))

    def joined(self, others: Sequence[HyenaState]) -> HyenaState:
        """Its rows and then those of the others, with room for as much as in the roomiest of them."""
        states = self, *others
        conv = join_rows([state.conv for state in states])
        inputs = padded_to([state.inputs for state in states], 2, left=True)
        return HyenaState(conv, inputs, tuple(length for state in states for length in state.lengths))


class Hyena(Mixer):
    """``z_1 = v``, ``z_{n+1} = x_n (h_n * z_n + d_n z_n)``, ``y = W_o z_{N+1}``, with long convolutions ``h_n *``.

    v and x_1..x_N are projections of the input after a short convolution; ``h_n(t)`` is a window ``exp(-a t)`` times a
    network of sines of the position t. Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language
    Models", definition 3.1 and section 3.3. Not S4D, whose kernel is a recurrence. The release leaves out the first
    convolution, so that its order 2 has one. The filters' network has three layers of sines; its last map starts so
    small that a filter's norm is near 1 whatever L is. Projections have ``nn.Linear``'s initialisation, d is normal.

    A token costs ``O(T D)`` per convolution after T of them; the state holds all past inputs. Without gradients the
    filters of earlier steps are remembered; with them, and under torch.compile, a step computes all T positions of them
    again, at ``O(T F (F + D))`` for a network of width F. Filters exist at any position: past L the windows keep
    falling (the slowest is at 1/20 there), while the encoding's frequencies repeat with period L.
    """

    Config = HyenaConfig
    unquantized = ("filters",)

    @from_options
    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        width = config.d_model
        self.in_proj = Linear(width, (config.order + 1) * width)
        self.conv = ShortConvolution((config.order + 1) * width, config.conv_width, bias=True)
        self.filters = ImplicitFilters(config)
        self.skip = nn.Parameter(torch.randn(config.order, width))
        self.out_proj = Linear(width, width)

    def mix(self, x: Tensor, state: HyenaState, cu_seqlens: Boundaries) -> tuple[Tensor, HyenaState]:
        # v and all gates from one projection and one short convolution, [B, T, (N + 1) D]
        u, conv = self.conv(self.in_proj(x), state.conv, cu_seqlens)
        added = (
            [x.shape[1]] * len(state.lengths)
            if cu_seqlens is None
            else [end - start for start, end in pairwise(cu_seqlens)]
        )
        lengths = tuple(seen + new for seen, new in zip(state.lengths, added, strict=True))
        # the filters as far as the longest row reaches; each row is convolved with its own past
        with without_autocast(x.device):
            filters = self.filters(max(lengths, default=x.shape[1]), step=x.shape[1] == 1)
            if cu_seqlens is None:
                y, inputs = self._mix(u, last(state.inputs, max(state.lengths, default=0)), filters)
            else:
                rows = zip(u.split(added, dim=1), state.inputs.split(1), state.lengths, strict=True)
                parts = [self._mix(piece, last(row, seen), filters) for piece, row, seen in rows]
                y, inputs = torch.cat([y for y, _ in parts], dim=1), right_aligned([held for _, held in parts])
        # room that was reserved stays
        reserved = max(0, state.inputs.shape[2] - inputs.shape[2])
        return self.out_proj(y), HyenaState(conv, F.pad(inputs, (0, 0, reserved, 0)), lengths)

    def _mix(self, u: Tensor, before: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
        """``u [B, T, (N + 1) D]`` after inputs ``[B, N, S, D]``: ``z_{N+1}`` and all inputs ``[B, N, S + T, D]``."""
        z, *gates = u.chunk(self.config.order + 1, dim=-1)
        total, inputs = before.shape[2] + u.shape[1], []
        for past, gate, h, skip in zip(before.unbind(1), gates, filters, self.skip, strict=True):
            inputs.append(torch.cat([past.to(z.dtype), z], dim=1))
            long = long_conv.long_conv(z, h[:total], past)
            z = (gate * (long + skip * z)).to(u.dtype)
        return z, torch.stack(inputs, dim=1)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> HyenaState:
        like = first_tensor(self)
        assert self.short_conv is not None
        conv = self.short_conv.init_state(batch_size, device or like.device, dtype or like.dtype)
        shape = batch_size, self.config.order, max_length, self.config.d_model
        return HyenaState(conv, conv.new_zeros(shape), (0,) * batch_size)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return batch_size * measured_state_bytes(self.init_state(1, length, device="meta"))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self.config.order * long_conv.flops(length, self.config.d_model, batch_size)

    def flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, batch_size) + self.sequence_flops(length, batch_size) + self.filters.flops(length)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        long = self.config.order * long_conv.flops(1, self.config.d_model, batch_size, before=length)
        return self._flops(1, batch_size) + long + self.filters.flops(1)

    def _flops(self, length: int, batch_size: int) -> int:
        projections = sum(linear_flops(linear, batch_size * length) for linear in (self.in_proj, self.out_proj))
        return projections + self.conv.flops(length, batch_size)


class _Kept(threading.local):
    """The parameters and the filters that each module last computed, per thread: what is computed anew depends in its
    last bits on how many positions are computed together.
    """

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()


_kept = _Kept()


class ImplicitFilters(nn.Module):
    """The filters ``[N, T, D]`` as a function of position, computed in float32 or wider."""

    def __init__(self, config: HyenaConfig):
        super().__init__()
        self.config = config
        hidden, outputs = config.filter_width, config.order * config.d_model
        self.first = Linear(2 * config.filter_features + 1, hidden)
        self.second, self.third = Linear(hidden, hidden), Linear(hidden, hidden)
        self.frequency = nn.Parameter(torch.full((hidden,), float(config.filter_frequency)))
        self.last = Linear(hidden, outputs, bias=False)
        # the sum over t of (w . sines)^2 exp(-2 a t / L), where a sine's mean square is 1/2, is 1
        energy = self.rates().repeat(config.order).reciprocal() * config.length / 2 * hidden / 2
        with torch.no_grad():
            self.last.weight.uniform_(-1, 1).mul_((3 / energy).sqrt().unsqueeze(-1))

    def rates(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """``[D]``, how fast each channel's window falls in a time of L."""
        return torch.linspace(SLOWEST, FASTEST, self.config.d_model, dtype=dtype, device=device)

    def forward(self, length: int, step: bool = False) -> Tensor:
        """At positions below ``length``; a ``step`` without gradients computes those that are new since the last."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._between(0, length)
        # compared by value: parameters may be changed in ways that leave no other trace
        values = torch.cat([parameter.flatten() for parameter in self.parameters()])
        kept = _kept.of.get(self) if step and all(map(is_plain_linear, self._maps())) else None
        filters = kept[1] if kept is not None and same(kept[0], values) else None
        if filters is None:
            filters = self._between(0, length)
        elif filters.shape[1] < length:
            filters = torch.cat([filters, self._between(filters.shape[1], length)], dim=1)
        _kept.of[self] = values, filters
        return filters[:, :length]

    def _between(self, start: int, end: int) -> Tensor:
        dtype = torch.promote_types(self.frequency.dtype, torch.float32)
        device = self.frequency.device
        time = torch.arange(start, end, dtype=torch.float64, device=device).unsqueeze(-1) / self.config.length
        angles = 2 * math.pi * time * torch.arange(self.config.filter_features, device=device)
        hidden = torch.cat([time, angles.cos(), angles.sin()], dim=-1).to(dtype)
        *inner, outer = self._maps()
        for layer in inner:
            hidden = torch.sin(self.frequency.to(dtype) * widened(layer, hidden))
        window = torch.exp(-time.to(dtype) * self.rates(dtype, device)).unsqueeze(1)
        filters = widened(outer, hidden)
        return (filters.unflatten(-1, (self.config.order, -1)) * window).transpose(0, 1)

    def _maps(self) -> tuple[nn.Module, ...]:
        return self.first, self.second, self.third, self.last

    def flops(self, length: int) -> int:
        return sum(linear_flops(layer, length) for layer in (self.first, self.second, self.third, self.last))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)


def last(inputs: Tensor, length: int) -> Tensor:
    return inputs[:, :, inputs.shape[2] - length :]


def right_aligned(rows: list[Tensor]) -> Tensor:
    """``[1, N, S_i, D]`` each as one ``[B, N, S, D]``, shorter ones after zeros."""
    by_time = [row.squeeze(0).transpose(0, 1) for row in rows]
    return pad_sequence(by_time, batch_first=True, padding_side="left").transpose(1, 2)
