"""How a public operation picks the backend that computes it.

An operation is a folder ``seqarch/ops/NAME``:

- ``inputs.py``: a frozen dataclass, what every backend takes (:class:`~seqarch.ops.dispatch.inputs.Inputs`);
- ``__init__.py``: ``OP``, which lists the backends in order, and the public function, which checks its arguments and
  returns ``OP(backend, inputs)``;
- a module per backend, named by its form and its engine (``chunk_torch``).

A backend's module imports a vendor's package no sooner than it needs it, and holds

- ``run(inputs)``: computes the operation;
- ``unsupported(inputs) -> str | None``, optional: why it cannot serve this call;
- ``deprioritised(inputs) -> str | None``, optional: why ``"auto"`` passes it over for a call that it can serve;
- ``TRANSFORMABLE = True``, optional: it is made of torch's own functions, so that forward-mode derivatives and the
  transforms of ``torch.func`` go through it. Where one of these is active, other backends do not serve the call;
- ``unavailable() -> str | None``, optional: why it cannot run on this machine at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import BackendError, P, R, typed, unknown_name
from seqarch.ops.dispatch.eager import active_transform
from seqarch.ops.dispatch.inputs import Inputs
from seqarch.ops.dispatch.scoped import Scoped


@dataclass(frozen=True)
class Call:
    """One call of an operation: its inputs, the backend that served it and its result."""

    op: str
    backend: str
    inputs: Any
    result: Any


_chosen: Scoped[dict[str, str]] = Scoped("backends", {})
_observers: Scoped[tuple[Callable[[Call], None], ...]] = Scoped("observers", ())
_INPUTS_ONLY: Any = object()
"""In the place of a backend's name: the inputs themselves are wanted, not the result."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    module: Any

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or ``None`` if it can."""
        return self.module.unavailable() if hasattr(self.module, "unavailable") else None

    def unsupported(self, inputs: Inputs) -> str | None:
        """Why this backend cannot serve a call with these inputs, or ``None`` if it can."""
        reason = self.unavailable()
        if reason is None and not self.transformable:
            reason = active_transform()
        if reason is None and hasattr(self.module, "unsupported"):
            reason = self.module.unsupported(inputs)
        return reason

    @property
    def transformable(self) -> bool:
        """Whether torch's transforms go through this backend."""
        return getattr(self.module, "TRANSFORMABLE", False)

    def passed_over(self, inputs: Inputs) -> str | None:
        """Why ``"auto"`` does not take this backend for these inputs, or ``None`` if it does."""
        reason = self.unsupported(inputs)
        if reason is None and hasattr(self.module, "deprioritised"):
            reason = self.module.deprioritised(inputs)
        return reason

    def run(self, inputs: Inputs) -> Any:
        return self.module.run(inputs)


@dataclass(frozen=True)
class Explanation:
    """The backend that ``"auto"`` would run for a call, and why each other backend would not."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} would run"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


class Op:
    """An operation and its backends.

    Args:
        name: the folder's and the public function's name.
        order: the modules of the backends in the order in which ``"auto"`` tries them.
        reference: the backend that defines what is right.
        step_order: the order for calls of one token, where it differs.
        opt_in: further backends, which only their name chooses: vendors' packages.
        autocast: whether ``torch.autocast`` may lower the dtype of this operation's products. Where it may not, as in
            recurrences, which add up thousands of them, the backends compute as if there were none.

    The attributes are the names of these backends; ``backends`` holds all of them by name.
    """

    def __init__(
        self,
        name: str,
        order: Sequence[ModuleType],
        reference: ModuleType,
        step_order: Sequence[ModuleType] = (),
        opt_in: Sequence[ModuleType] = (),
        autocast: bool = False,
    ):
        self.name, self.autocast = name, autocast
        found = map(Backend, dict.fromkeys((*order, *step_order, reference, *opt_in)))
        self.backends = {backend.name: backend for backend in found}
        self.reference = Backend(reference).name
        self.order, self.step_order, self.opt_in = (
            tuple(Backend(module).name for module in modules) for modules in (order, step_order, opt_in)
        )
        self._function: Callable[..., Any] | None = None

    def public(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate the public function: the types of its arguments are checked, and :meth:`inputs` calls it."""
        self._function = checked = typed(self.name, function)
        return checked

    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs of a call of the public function with these arguments, which is not run; errors as there."""
        assert self._function is not None
        if "backend" in kwargs:
            raise TypeError(f"{self.name}: its inputs are the same for every backend, but backend was given")
        return self._function(*args, **kwargs, backend=_INPUTS_ONLY)

    def __call__(self, backend: str, inputs: Inputs) -> Any:
        if backend is _INPUTS_ONLY:
            return inputs
        chosen = self.select(backend, inputs)
        with nullcontext() if self.autocast else without_autocast(inputs.device):
            result = chosen.run(inputs)
        for observe in _observers.get():
            observe(Call(self.name, chosen.name, inputs, result))
        return result

    def auto_order(self, inputs: Inputs) -> tuple[str, ...]:
        return self.step_order if self.step_order and inputs.length == 1 else self.order

    def select(self, backend: str, inputs: Inputs) -> Backend:
        """The backend that serves these inputs.

        Raises:
            ValueError: no backend has that name.
            BackendError: the named backend, or under ``"auto"`` every backend, cannot serve the call.
        """
        name = _chosen.get().get(self.name, backend) if backend == "auto" else backend
        if name != "auto":
            if not isinstance(name, str) or name not in self.backends:
                raise unknown_name(f"backend of {self.name}", name, [*self.backends, "auto"])
            reason = self.backends[name].unsupported(inputs)
            if reason is not None:
                raise BackendError(
                    f"{self.name}: backend {name!r} cannot serve this call: {reason}; {self._able(inputs)}"
                )
            return self.backends[name]
        for candidate in self.auto_order(inputs):
            if self.backends[candidate].passed_over(inputs) is None:
                return self.backends[candidate]
        raise BackendError(str(self.explain(inputs)))

    def _able(self, inputs: Inputs) -> str:
        able = [name for name, backend in self.backends.items() if backend.unsupported(inputs) is None]
        return f"expected one of {', '.join(able)}" if able else "no other backend can"

    def explain(self, inputs: Inputs) -> Explanation:
        pick: str | None = None
        reasons: dict[str, str] = {}
        order = self.auto_order(inputs)
        forced = _chosen.get().get(self.name)
        for name in dict.fromkeys((*order, *self.backends)):
            backend = self.backends[name]
            reason = (backend.passed_over if forced is None else backend.unsupported)(inputs)
            if reason is not None:
                reasons[name] = reason
            elif forced not in (None, name):
                reasons[name] = f"{forced} was chosen for this block"
            elif forced is None and name not in order:
                reasons[name] = f"it is not in the order {', '.join(order)}"
            elif pick is not None:
                reasons[name] = f"{pick} comes before it in the order {', '.join(order)}"
            else:
                pick = name
        return Explanation(self.name, pick, reasons)


@contextmanager
def choose_backends(choices: dict[str, str]) -> Iterator[None]:
    """Within the block, what ``backend="auto"`` means, by the names of operations."""
    with _chosen.set({**_chosen.get(), **choices}):
        yield


def _observed_by(observe: Callable[[Call], None]) -> AbstractContextManager[None]:
    return _observers.set((*_observers.get(), observe))


def is_unobserved() -> bool:
    """Whether nobody has chosen backends, and nobody collects which run."""
    return not _chosen.get() and not _observers.get()


@contextmanager
def record_backends() -> Iterator[dict[str, dict[str, int]]]:
    """Collect, per operation, how often each backend really ran within the block."""
    record: dict[str, dict[str, int]] = {}

    def count(call: Call) -> None:
        counts = record.setdefault(call.op, {})
        counts[call.backend] = counts.get(call.backend, 0) + 1

    with _observed_by(count):
        yield record


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Collect the calls of operations within the block, inputs and results included."""
    calls: list[Call] = []
    with _observed_by(calls.append):
        yield calls
