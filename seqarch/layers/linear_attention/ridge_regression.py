"""The base of mixers that solve, for every token, a regression of values on keys: its weights and their gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.mixer import Boundaries, Device, choose_heads
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.heads import HeadsConfig
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.ops.dispatch.eager import active_transform, is_batched
from seqarch.ops.linear_attention import flops as linear_attention_flops
from seqarch.ops.native.custom_op import by_torch


@dataclass(frozen=True, kw_only=True)
class RidgeRegressionConfig(HeadsConfig):
    """Options of mixers that solve a regression for every token.

    Attributes:
        key_width: K; by default ``D / H``.
        value_width: V; by default K.
        iterations: of conjugate gradients, the same for every token, in training as in decoding; K of them are exact
            but for rounding.
        conv_width: width of the short convolutions; 0 for none.
        norm_eps: added to the mean square in the norm of the output.
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    key_width: int | None = None
    value_width: int | None = None
    iterations: int = 30
    conv_width: int = 4
    norm_eps: float = 1e-5

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads, self.key_width)

    @property
    def keys(self) -> int:
        """K."""
        return self.key_width or self.head_width

    @property
    def values(self) -> int:
        """V."""
        return self.value_width or self.keys


class RidgeRegressionState(NamedTuple):
    """State of a mixer that solves a regression for every token.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        recurrent: the decayed sums of ``k^T v``, ``[B, H, K, V]``.
        covariance: those of ``k^T k``, ``[B, H, K, K]``, of which an inverse is taken: held in full in any case.
    """

    conv: Tensor | None
    recurrent: Tensor
    covariance: Tensor


class Covariance(NamedTuple):
    """What makes ``A_t = H_t + ridge_t``, ``H_t = exp(log_decay_t) H_{t-1} + written_t^T k_t``, symmetric.

    Attributes:
        k, written: ``[B, T, H, K]``, one a positive multiple of the other, token by token.
        log_decay: ``[B, T, H]``.
        ridge: the diagonal that is added, which broadcasts with ``[B, T, H, K]``.
        state: ``[B, H, K, K]`` before the first token.
    """

    k: Tensor
    written: Tensor
    log_decay: Tensor
    ridge: Tensor
    state: Tensor

    def sums(self, x: Tensor, values: Tensor, state: Tensor, cu_seqlens: Boundaries) -> tuple[Tensor, Tensor]:
        """``x_t`` times the decayed sums of ``written^T values``, and the last of these sums."""
        given = {"scale": 1.0, "state": state, "cu_seqlens": cu_seqlens}
        return ops.linear_attention(x, self.written, values, self.log_decay, **given)

    def times(self, x: Tensor, cu_seqlens: Boundaries) -> tuple[Tensor, Tensor]:
        """``A_t x_t`` of every token, ``[B, T, H, K]``, and the last H."""
        product, last = self.sums(x, self.k, self.state, cu_seqlens)
        return product + self.ridge * x, last


class Projected(NamedTuple):
    """What a mixer makes of its input before it solves.

    Attributes:
        q, v: ``[B, T, H, K]`` and ``[B, T, H, V]``, in the state's dtype, as the covariance.
        covariance: of what is solved.
        conv: the convolution's last inputs.
    """

    q: Tensor
    v: Tensor
    covariance: Covariance
    conv: Tensor | None


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], q: Tensor, iterations: int) -> Tensor:
    """x with ``A x = q`` for symmetric positive A, each row of ``q [..., K]`` for itself, from 0 on (Hestenes and
    Stiefel 1952). A row whose residual is at the rounding of its q is left as it is, so that nothing is divided by 0.
    """
    x, r, p = torch.zeros_like(q), q, q
    size = q.square().sum(-1, keepdim=True)
    least = size * torch.finfo(q.dtype).eps ** 2
    for _ in range(iterations):
        product, going = multiply(p), size > least
        curvature = torch.where(going, (p * product).sum(-1, keepdim=True), 1)
        step = torch.where(going, size / curvature, 0)
        x, r = x + step * p, r - step * product
        after = r.square().sum(-1, keepdim=True)
        p = r + torch.where(going, after / torch.where(going, size, 1), 0) * p
        size = after
    return x


class _ImplicitGradient(torch.autograd.Function):
    """x, with the gradient of ``x + A^-1 (q - A x)`` whose A^-1 and x are constants: q's is A^-1 times that of x.

    That takes a solve as x did. A's own follows in the graph of the residual, so that no iteration is kept. A backward
    pass that is to be differentiated again, or that is batched, goes through :func:`solve_directly`.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, iterations: int, cu_seqlens: Boundaries, *given: Tensor):
        ctx.iterations, ctx.cu_seqlens = iterations, cu_seqlens
        ctx.save_for_backward(*given)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (gradient,), given, cu_seqlens = upstream, ctx.saved_tensors, ctx.cu_seqlens
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_batched(gradient)):

            def plain(q: Tensor, *parts: Tensor) -> Tensor:
                return solve_directly(q, Covariance(*parts), cu_seqlens)

            return None, None, None, None, *by_torch(plain, given, ctx.needs_input_grad[4:], upstream)
        covariance = Covariance(*given[1:])
        solved = conjugate_gradients(lambda x: covariance.times(x, cu_seqlens)[0], gradient, ctx.iterations)
        return solved, None, None, None, *[None] * len(given)


def solve_directly(q: Tensor, covariance: Covariance, cu_seqlens: Boundaries) -> Tensor:
    """``A_t^-1 q_t`` by the A of every token, ``[B, T, H, K, K]``: to be differentiated in any way.

    Iterations are not: where they end early their own derivatives are not those of the solution.
    """
    k, written, log_decay, ridge, state = covariance
    one, outer = torch.ones_like(log_decay).unsqueeze(-1), written.unsqueeze(-1) * k.unsqueeze(-2)
    given = {"scale": 1.0, "state": state.flatten(2).unsqueeze(2), "cu_seqlens": cu_seqlens}
    sums, _ = ops.linear_attention(one, one, outer.flatten(-2), log_decay, **given)
    matrix = sums.view(outer.shape) + torch.diag_embed(ridge.expand(q.shape))
    return torch.linalg.solve(matrix, q.unsqueeze(-1)).squeeze(-1)


def solve(q: Tensor, covariance: Covariance, iterations: int, cu_seqlens: Boundaries) -> tuple[Tensor, Tensor]:
    """``A_t^-1 q_t`` of every token, ``[B, T, H, K]``, and the last H.

    Each iteration is one call of linear attention. Gradients are those of the solution, by implicit differentiation,
    and take as many iterations again; forward-mode derivatives, transforms of ``torch.func`` and second derivatives go
    by :func:`solve_directly`.
    """
    if active_transform() is not None:
        return solve_directly(q, covariance, cu_seqlens), covariance.times(q, cu_seqlens)[1]
    last: list[Tensor] = []

    def multiply(x: Tensor) -> Tensor:
        product, after = covariance.times(x, cu_seqlens)
        if not last:
            last.append(after)
        return product

    with torch.no_grad():
        x = conjugate_gradients(multiply, q, iterations)
    if not (torch.is_grad_enabled() and any(each.requires_grad for each in (q, *covariance))):
        return x, last[0]
    product, after = covariance.times(x, cu_seqlens)
    return _ImplicitGradient.apply(q - product, x, iterations, cu_seqlens, q, *covariance), after


class RidgeRegression(RecurrentMixer):
    """Reads the values' regression on the keys: ``o_t = x_t G_t``, ``x_t`` near ``(H_t + ridge_t)^-1 q_t``.

    ``H_t`` and ``G_t`` are decayed sums of ``k^T k`` and ``k^T v``. Subclasses make the queries, what is written, the
    decays and the ridge, and say what becomes of x and of the outputs.
    """

    config: Any
    out_proj: nn.Linear

    @from_options
    def __init__(self, config: Any):
        super().__init__(config)
        self.state_shape = (config.heads, config.keys, config.values)

    @abstractmethod
    def project(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> Projected:
        """What is solved and read, from the mixer's input x."""

    @abstractmethod
    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """The outputs ``[B, T, H, V]`` normalised, from the mixer's input x."""

    def read(self, x: Tensor, q: Tensor, solved: Tensor) -> Tensor:
        """By what the sums of values are read: the solution."""
        return solved

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        q, v, covariance, conv = self.project(x, state, cu_seqlens)
        solved, last = solve(q, covariance, self.config.iterations, cu_seqlens)
        o, recurrent = covariance.sums(self.read(x, q, solved), v, state.recurrent, cu_seqlens)
        y = self.out_proj(rearrange(self.finish(x, o.to(x.dtype)), "b t h v -> b t (h v)"))
        return y, RidgeRegressionState(conv, recurrent, last)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        conv, recurrent = super().new_state(batch_size, max_length, device, dtype)
        heads, keys, _ = self.state_shape
        return RidgeRegressionState(conv, recurrent, recurrent.new_zeros(batch_size, heads, keys, keys))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, keys, values = self.state_shape
        solving = self.config.iterations * linear_attention_flops(length, heads, keys, keys, batch_size)
        return solving + linear_attention_flops(length, heads, keys, values, batch_size)
