"""The contract of every mixer: one call, one frozen config, honest accounting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from seqarch.layers.modules.configured import Configured, build_config, build_layer, from_options  # noqa: F401
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.options import check_options
from seqarch.layers.modules.quantized import QuantizedLinear
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.modules.state_form import StateForm
from seqarch.ops.dispatch.checks import fits, sequence_offsets, show

CuSeqlens = Tensor | Sequence[int] | None
"""Boundaries of the sequences packed into ``B = 1``, from 0 to T; ``None`` where nothing is packed."""

Boundaries = tuple[int, ...] | None
"""``cu_seqlens`` once they are checked, as every mixer's own code gets them."""

Device = torch.device | str | None

MAPS = (nn.Linear, QuantizedLinear)
"""What counts as a linear map."""

MOST_COUNTED = 2**31 - 1
"""The most rows, tokens or words that are made room for."""

State = Any
"""A pytree (named tuples) of tensors: whatever one mixer carries from token to token."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Options of a mixer or channel mixer; subclasses add theirs and check them in ``__post_init__``.

    Attributes:
        d_model: width D of the residual stream.
    """

    d_model: int

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width",)
    """The numbers among the options that 0 turns off; all others are positive."""

    size_options: ClassVar[dict[str, str]] = {}
    """The whole-number options that a match of parameters or state may change, at most three: each with the attribute
    of the config that has its value where it is not given, ``{"key_width": "keys"}``. State and parameters are to be
    polynomials of at most degree 2 in each, over values that the config takes."""

    head_options: ClassVar[dict[str, str]] = {}
    """The options that give a mixer the heads of another one whose projections it is to take, each with what it is set
    to: the other's number of ``heads``, of ``kv_heads``, their widths ``keys`` and ``values``, or ``inner``, the values
    of all heads together."""

    kept_options: ClassVar[tuple[str, ...]] = ()
    """Options that it then has as the other one, which has them too: what those projections were learnt with."""

    slow_gates: ClassVar[dict[str, float]] = {}
    """Options with which gates forget more slowly at first than as released, as the study of initialisation has them:
    for several hundred tokens. Empty where there are no such options."""

    def __post_init__(self):
        check_options(self, self.may_be_zero)


class Layer(Configured, ABC):
    """The base of mixers and channel mixers: a config, a cost, and what training adds to the loss.

    Made of its config or, as any subclass, of its options: ``Mamba2(d_model=256, d_state=64)``.
    """

    Config: ClassVar[type[LayerConfig]]
    config: Any
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    """Names of own matrices that the paper trains without weight decay (vectors never take any)."""
    projections: ClassVar[tuple[str, ...]] = ()
    """Names of own tensors that multiply features as linear maps do, for low-rank adapters; submodules have theirs."""
    unquantized: ClassVar[tuple[str, ...]] = ()
    """Names of submodules that :func:`seqarch.quantize` leaves as they are, such as what makes decays."""
    unshared: ClassVar[tuple[str, ...]] = ()
    """Names of submodules that stay each layer's own where a pattern says ``share``."""

    @from_options
    def __init__(self, config: Any):
        super().__init__()
        expected = getattr(type(self), "Config", LayerConfig)
        if not isinstance(config, expected):
            own = f"expected a {expected.__name__}, or options as keywords"
            raise ValueError(f"{type(self).__name__}: config is {show(config)}, {own}")
        self.config = config

    @abstractmethod
    def flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of the forward pass over ``length`` tokens from an empty state.

        Two per multiply-add, in matrix products, convolutions and recurrences; ``2.5 n log2 n`` per real FFT of n
        numbers. Elementwise work is not counted.
        """

    def check_input(self, x: Tensor) -> None:
        """Raise unless x is floating point ``[B, T, D]``."""
        check_features(type(self).__name__, x, self.config.d_model)

    def check_dtype(self, x: Tensor, error: RuntimeError) -> None:
        """Raise where x is of another dtype than the parameters, which is why a call has failed with this error.

        Afterwards, since which dtypes go together depends on autocast and on what the submodules are.
        """
        own = first_tensor(self).dtype
        if x.dtype != own:
            raise ValueError(
                f"{type(self).__name__}: x is {x.dtype}, its parameters are {own}: expected one dtype"
                " (or torch.autocast around the call)"
            ) from error

    def auxiliary_loss(self) -> Tensor | None:
        """The term that training adds to the loss for the last forward pass, weighted: a scalar, or ``None``."""
        return None


class Mixer(Layer):
    """Mixes along time: ``y, state = mixer(x, state)`` with ``x, y: [B, T, D]``; a step is a call with T = 1.

    Any split of a sequence into calls gives the same outputs. A state passed in is consumed: to branch, clone it first
    (:func:`clone_state`). ``cu_seqlens`` packs several sequences into ``B = 1``; the state then has one row per
    sequence.
    """

    gives: tuple[str, ...] = ()
    """Names of what a stack hands on to later layers, as :meth:`exchange` returns it."""

    takes: tuple[str, ...] = ()
    """Names of what this mixer needs of an earlier layer of its stack; ``"input"`` is what the stack was given."""

    most_tokens: int | None = None
    """Of one sequence, where the state counts no more."""

    takes_any_state: ClassVar[bool] = False
    """Whether any numbers are a state ``recurrent``: nothing is divided by one of them."""

    kept_parts: ClassVar[tuple[str, ...]] = ()
    """Names of further submodules and parameters that mean the same in every mixer which names them here."""

    @overload
    def __call__(self, x: Tensor, state: State | None = None, cu_seqlens: CuSeqlens = None) -> tuple[Tensor, State]: ...

    @overload
    def __call__(
        self, x: Tensor, state: State | None, cu_seqlens: CuSeqlens, taken: Mapping[str, Any]
    ) -> tuple[Tensor, State, Mapping[str, Any]]: ...

    def __call__(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: CuSeqlens = None,
        taken: Mapping[str, Any] | None = None,
    ) -> Any:
        self.check_input(x)
        boundaries = sequence_offsets(type(self).__name__, cu_seqlens, x.shape[0], x.shape[1])
        if missing := [name for name in self.takes if taken is None or name not in taken]:
            raise ValueError(
                f"{type(self).__name__}: it takes {' and '.join(missing)} from an earlier layer of a stack, and was"
                f" given {', '.join(taken or ()) or 'none'}"
            )
        if state is not None and not torch.compiler.is_compiling():
            self.check_state(state, row_count(x, boundaries))
        exchanged = () if taken is None else ({name: taken[name] for name in self.takes},)
        try:
            return super().__call__(x, state, boundaries, *exchanged)
        except RuntimeError as error:
            self.check_dtype(x, error)
            raise

    def check_state(self, state: State, rows: int) -> None:
        """Raise unless the state is one of this mixer's, with so many rows.

        Raises:
            ValueError: it is of another type or shape.
        """
        name, form = type(self).__name__, self._state_form
        if type(state) is not form.kind:
            given = type(state).__name__
            raise ValueError(f"{name}: state is {given}, expected {form.kind.__name__}, as this mixer returns")
        form.check(name, "state", state, rows)

    @cached_property
    def _state_form(self) -> StateForm:
        return StateForm(*(self.new_state(1, length, "meta", None) for length in (0, 1 << 40)))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Boundaries = None,
        taken: Mapping[str, Any] | None = None,
    ) -> Any:
        state = self.start(x, cu_seqlens) if state is None else state
        return self.mix(x, state, cu_seqlens) if taken is None else self.exchange(x, state, cu_seqlens, taken)

    def exchange(
        self, x: Tensor, state: Any, cu_seqlens: Boundaries, taken: Mapping[str, Any]
    ) -> tuple[Tensor, Any, Mapping[str, Any]]:
        """As :meth:`mix`, of a mixer with ``takes`` or ``gives``, with what it takes; and by name what it gives.

        What is given is of the tokens of this call, ``[B, T, ...]``, or also of what this mixer's own state holds of
        those before them, so that sequences may be split and packed.
        """
        return *self.mix(x, state, cu_seqlens), {}

    def head_maps(self) -> list[HeadMap]:
        """Which of its linear maps are queries, keys, values and what reads the heads, in attention's terms.

        :func:`seqarch.convert.convert` copies them from one mixer to another. One role may be in several places, which
        then all take the same; a mixer that does not have one leaves it out.
        """
        return []

    def check_giver(self, giver: Mixer) -> None:
        """Raise where this mixer cannot take what the earlier one gives.

        Raises:
            ValueError: saying why, without the names of the two.
        """

    @abstractmethod
    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        """Mix ``x: [B, T, D]`` from a state on; the outputs ``[B, T, D]`` and the state after them.

        Args:
            cu_seqlens: boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        """

    def start(self, x: Tensor, cu_seqlens: Boundaries) -> State:
        """The state before a call on x that was given none."""
        return self.new_state(row_count(x, cu_seqlens), 0, x.device, x.dtype)

    def init_state(
        self, batch_size: int, max_length: int | None = None, device: Device = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token.

        Args:
            batch_size: rows of the state.
            max_length: tokens to reserve room for, in states that grow; ``None`` lets them grow as they go.
            device, dtype: default to those of the parameters.

        Raises:
            ValueError: ``batch_size`` or ``max_length`` is no whole number from 0 to :data:`MOST_COUNTED`, or the
                ``dtype`` is none of floating point.
        """
        for name, count in (("batch_size", batch_size), ("max_length", 0 if max_length is None else max_length)):
            if not fits(count, (int,)) or not 0 <= count <= MOST_COUNTED:
                least = f"an int of at least 0 (and at most {MOST_COUNTED})"
                raise ValueError(f"{type(self).__name__}: {name} is {show(count)}, expected {least}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{type(self).__name__}: dtype is {show(dtype)}, expected a floating point torch.dtype")
        return self.new_state(batch_size, max_length or 0, device, dtype)

    @abstractmethod
    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> State:
        """The state that :meth:`init_state` returns, of checked arguments: a named tuple of tensors, rows first."""

    @abstractmethod
    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes of the state after ``length`` tokens."""

    @abstractmethod
    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        """The part of :meth:`flops` that is neither a linear map nor a short convolution: the operation along time."""

    @property
    def short_conv(self) -> ShortConvolution | None:
        """The short convolution inside this mixer, at whatever depth."""
        return next((module for module in self.modules() if isinstance(module, ShortConvolution)), None)

    def flops(self, length: int, batch_size: int = 1) -> int:
        own = sum(linear_flops(m, batch_size * length) for m in self.modules() if isinstance(m, MAPS))
        convolutions = (m for m in self.modules() if isinstance(m, ShortConvolution))
        own += sum(convolution.flops(length, batch_size) for convolution in convolutions)
        return own + self.sequence_flops(length, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of one more token after ``length`` of them, counted as in :meth:`flops`."""
        return self.flops(length + 1, batch_size) - self.flops(length, batch_size)


class ChannelMixer(Layer):
    """Mixes along channels, each token for itself: ``y = channel(x)`` with ``x, y: [B, T, D]``.

    ``token_mask [B, T]`` is false where a token is padding. One that counts tokens, as routers do, sets ``takes_mask``
    and gets it as a second argument of ``forward``; to all others padding is a token like any.
    """

    takes_mask: ClassVar[bool] = False

    def __call__(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        self.check_input(x)
        arguments: tuple[Tensor, ...] = ()
        if token_mask is not None and self.takes_mask:
            check_mask(type(self).__name__, token_mask, x)
            arguments = (token_mask,)
        try:
            return super().__call__(x, *arguments)
        except RuntimeError as error:
            self.check_dtype(x, error)
            raise

    def router_metrics(self) -> dict[str, Any]:
        """Statistics of the last forward pass's routing; empty where there is no router."""
        return {}

    def update_router(self) -> None:
        """Make the router's updates that need no gradient, once per optimizer step, after it."""
        return


def check_features(name: str, x: Any, width: int) -> None:
    """Raise unless x is floating point ``[B, T, width]``."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
        given = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: x is {given}, expected floating point [B, T, {width}]")


def check_mask(name: str, mask: Any, x: Tensor) -> None:
    """Raise unless the mask is bool, and ``[B, T]`` as x is ``[B, T, ...]``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else show(mask)
        expected = f"torch.bool {list(x.shape[:2])}, true for real tokens"
        raise ValueError(f"{name}: token_mask is {given}, expected {expected}")


def row_count(x: Tensor, cu_seqlens: Boundaries) -> int:
    """Rows of the state of a call on x: one per sequence."""
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def choose_heads(d_model: int, num_heads: int | None, width: int | None = None) -> int:
    """The number of heads: the one given, or heads of width 64 where that divides ``d_model``, else as many
    as are at least 32 wide, but one at least.

    Args:
        width: of each head; where it is given, any number of heads may be.

    Raises:
        ValueError: the heads do not divide ``d_model``, and have to.
    """
    if num_heads is not None and width is not None:
        return num_heads
    if num_heads is None:
        num_heads = max(1, d_model // (64 if d_model % 64 == 0 else 32))
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads ({num_heads}) must divide d_model ({d_model})")
    return num_heads


def linear_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of a linear map of ``tokens`` rows, or of those inside a module in its place."""
    maps = [module] if isinstance(module, MAPS) else [m for m in module.modules() if isinstance(m, MAPS)]
    return sum(2 * each.in_features * each.out_features * tokens for each in maps)


def first_tensor(module: nn.Module) -> Tensor:
    """The first floating-point parameter or buffer of a module: its dtype and device are the module's."""
    named = chain(module.parameters(), module.buffers())
    found = next((tensor for tensor in named if tensor.is_floating_point()), None)
    return torch.empty(0) if found is None else found


def clone_state(state: State) -> State:
    """A copy that a later call may consume while the original lives on."""
    return pytree.tree_map_only(Tensor, Tensor.clone, state)


def detach_state(state: State) -> State:
    """The same state without its graph: no gradient goes back beyond it, as in truncated backpropagation."""
    return pytree.tree_map_only(Tensor, Tensor.detach, state)


def measured_state_bytes(state: State) -> int:
    """Bytes of the tensors that a state holds."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
