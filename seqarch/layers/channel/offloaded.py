"""The experts of a mixture of which some are in memory, and the others where a reader finds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seqarch.layers.channel.expert_cache import ExpertCache, Policy
from seqarch.ops.experts import offloaded
from seqarch.ops.experts.inputs import Matrices


class ExpertReader(Protocol):
    """Where a layer's experts come from.

    Attributes:
        form: ``w_in``, ``w_out`` and, of gated experts, ``w_gate`` ``[E, ...]``, on the meta device.
    """

    form: dict[str, Tensor]

    def read(self, expert: int, into: Matrices) -> int:
        """Fill one expert's matrices; the bytes that were read for it."""
        ...


class OffloadedExperts(nn.Module):
    """In the place of a :class:`seqarch.layers.channel.moe.MixtureOfExperts`' matrices: room for a few experts.

    What a call asks for is read where it is not in memory. No result depends on which are: products are those of all
    experts in memory, and are made in the same order. A reader's error leaves the rest as it is, and the next call
    tries again. Threads take turns. There are no gradients.

    Args:
        reader: of the experts.
        places: how many are in memory at once.
        policy: of this layer's cache.
        worker: reads ahead.

    Attributes:
        cache: which experts are in memory.
        following: the next layer's experts, which are read ahead of its calls where the policy expects some.
    """

    def __init__(self, reader: ExpertReader, places: int, policy: Policy, worker: ThreadPoolExecutor):
        super().__init__()
        self.reader, self.form, self._worker = reader, reader.form, worker
        for name, matrices in reader.form.items():
            room = torch.empty((places, *matrices.shape[1:]), dtype=matrices.dtype, device="cpu")
            self.register_buffer(name, room, persistent=False)
        self.cache = ExpertCache(places, policy)
        self.following: tuple[OffloadedExperts, ...] = ()  # not a module of this one
        self._pending: dict[int, Future[int]] = {}
        self._lock = RLock()
        self.number = offloaded.register(self)

    def precede(self, other: OffloadedExperts) -> None:
        """The other's layer is the next with experts."""
        self.following, self.cache.following = (other,), other.cache

    def forward(
        self, x: Tensor, index: Tensor, weight: Tensor, *, activation: str, limit: float | None, value_offset: float,
        **biases: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As :func:`seqarch.ops.experts` of ``x [N, D]`` with ``index`` and ``weight`` ``[N, k]``.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            raise RuntimeError("experts that are not all in memory have no gradients: decode under torch.no_grad()")
        unit = {"activation": activation, "limit": limit or 0.0, "value_offset": value_offset}
        return offloaded.offloaded_experts(x, index, weight, self.number, **biases, **unit)

    def matrices(self, experts: Sequence[int]) -> Iterator[tuple[int, Matrices]]:
        """Each of some experts with its matrices ``[D, F]`` or ``[F, D]``, those in memory first."""
        with self._lock:
            for expert, place, is_missing in self.cache.call(experts):
                yield expert, self._filled(expert, place, is_missing)
        for following in self.following:
            following.read_ahead()

    def read_ahead(self) -> None:
        """Begin to read the experts that the policy expects."""
        with self._lock:
            for expert, place in self.cache.ahead():
                self._settled(place)
                self._pending[place] = self._worker.submit(self.reader.read, expert, self._matrices(place))

    def all_of(self, name: str) -> Iterator[Tensor]:
        """A matrix of each expert in turn, whatever is in memory."""
        into = {each: torch.empty(m.shape[1:], dtype=m.dtype, device="cpu") for each, m in self.form.items()}
        for expert in range(len(self.form[name])):
            self.reader.read(expert, into)
            yield into[name]

    @property
    def weights(self) -> int:
        """How many numbers all experts have."""
        return sum(matrices.numel() for matrices in self.form.values())

    @property
    def expert_bytes(self) -> int:
        """Of one expert in memory."""
        return sum(room[0].nbytes for room in self._buffers.values() if room is not None)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in self.form.items())
        return f"{shapes}; {self.cache.places} in memory"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("experts that are not all in memory cannot be copied or pickled: read their folder again")

    def _matrices(self, place: int) -> Matrices:
        rooms: Mapping[str, Tensor | None] = self._buffers
        return {name: room[place] for name, room in rooms.items() if room is not None}

    def _filled(self, expert: int, place: int, is_missing: bool) -> Matrices:
        try:
            if not self._settled(place) or is_missing:
                self.cache.use.bytes += self.reader.read(expert, self._matrices(place))
        except BaseException:
            self.cache.forget(expert)
            raise
        return self._matrices(place)

    def _settled(self, place: int) -> bool:
        """Wait for what is being read into a place: whether it has come. What has not, whoever asks for it reads."""
        reading = self._pending.pop(place, None)
        if reading is not None and reading.exception() is None:
            self.cache.use.bytes += reading.result()
        return reading is None or reading.exception() is None

    def _apply(self, fn: Any, recurse: bool = True) -> OffloadedExperts:
        with self._lock:
            wait(self._pending.values())  # what is being read goes into the memory as it is now
            return super()._apply(fn, recurse)
