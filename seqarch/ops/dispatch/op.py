"""Op, Backend, dispatch: how a public operation picks the code that computes it.

An operation is a folder ``seqarch/ops/NAME``. A backend of it is a module in that folder, named by its form and its
engine (``chunk_torch``). It is imported with the operation, so it imports a vendor's package no sooner than it needs
it, and holds

- ``run(*arguments)``: computes the operation on the arguments that the op's ``prepare`` returned;
- ``refuse(*arguments) -> str | None``, optional: why it cannot serve this call;
- ``yields(*arguments) -> str | None``, optional: why ``"auto"`` passes it over for this call, though it can serve it;
- ``TRANSFORMABLE = True``, optional: it is made of torch's own functions, so that forward-mode derivatives and the
  transforms of ``torch.func`` go through it. Where one of these is under way, other backends refuse the call;
- ``unavailable() -> str | None``, optional: why it cannot run on this machine at all. A module whose import raises
  ``ImportError`` is unavailable for that reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import BackendError, typed, unknown_name
from seqarch.ops.dispatch.eager import transform
from seqarch.ops.dispatch.scoped import Scoped


@dataclass(frozen=True)
class Call:
    """One call of an operation: its public arguments, the backend that served it and what that returned."""

    op: str
    backend: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


_chosen: Scoped[dict[str, str]] = Scoped("backends", {})
_observers: Scoped[tuple[Callable[[Call], None], ...]] = Scoped("observers", ())


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation: its module, or ``None`` and why that cannot be imported."""

    name: str
    module: Any
    missing: str | None = None

    @classmethod
    def load(cls, op: str, name: str) -> Backend:
        """The backend in ``seqarch/ops/OP/NAME.py``."""
        try:
            return cls(name, importlib.import_module(f"seqarch.ops.{op}.{name}"))
        except ImportError as error:
            return cls(name, None, str(error))

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or ``None`` if it can."""
        if self.module is None:
            return self.missing
        return self.module.unavailable() if hasattr(self.module, "unavailable") else None

    def refuse(self, *arguments: Any) -> str | None:
        """Why this backend cannot serve a call with these prepared arguments, or ``None`` if it can."""
        reason = self.unavailable()
        if reason is None and not self.transformable:
            reason = transform()
        if reason is None and hasattr(self.module, "refuse"):
            reason = self.module.refuse(*arguments)
        return reason

    @property
    def transformable(self) -> bool:
        """Whether torch's transforms go through this backend."""
        return getattr(self.module, "TRANSFORMABLE", False)

    def passed_over(self, *arguments: Any) -> str | None:
        """Why ``"auto"`` does not take this backend for these prepared arguments, or ``None`` if it does."""
        reason = self.refuse(*arguments)
        if reason is None and hasattr(self.module, "yields"):
            reason = self.module.yields(*arguments)
        return reason

    def run(self, *arguments: Any) -> Any:
        return self.module.run(*arguments)


@dataclass(frozen=True)
class Explanation:
    """What ``backend="auto"`` would run for a call, and why each other backend would not."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} would run"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


@dataclass(frozen=True)
class Op:
    """An operation and its backends.

    Attributes:
        name: the folder's and the public function's name.
        prepare: takes the public function's arguments (without ``backend``), checks them and returns the tuple that
            every backend takes.
        order: the backends in the order in which ``"auto"`` tries them.
        reference: the backend that defines what is right.
        step_order: the order for calls of one token, where it differs.
        named: further backends, which only their name chooses: vendors' packages.
        autocast: whether ``torch.autocast`` may lower the dtype of this operation's products. Where it may not, as in
            recurrences, which add up thousands of them, the backends compute as if there were none.
    """

    name: str
    prepare: Callable[..., tuple[Any, ...]]
    order: tuple[str, ...]
    reference: str
    step_order: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    autocast: bool = False
    backends: dict[str, Backend] = field(init=False)

    def __post_init__(self):
        names = dict.fromkeys((*self.order, *self.step_order, self.reference, *self.named))
        object.__setattr__(self, "prepare", typed(self.name, self.prepare))
        object.__setattr__(self, "backends", {name: Backend.load(self.name, name) for name in names})

    def __call__(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        arguments = self.prepare(*args, **kwargs)
        chosen = self.select(backend, arguments)
        result = self._run(chosen, arguments)
        for observe in _observers.get():
            observe(Call(self.name, chosen.name, args, kwargs, result))
        return result

    def _run(self, chosen: Backend, arguments: tuple[Any, ...]) -> Any:
        with nullcontext() if self.autocast else without_autocast(arguments[0].device):
            return chosen.run(*arguments)

    def auto_order(self, arguments: tuple[Any, ...]) -> tuple[str, ...]:
        one_token = bool(self.step_order) and arguments[0].shape[1] == 1
        return self.step_order if one_token else self.order

    def select(self, backend: str, arguments: tuple[Any, ...]) -> Backend:
        """The backend that serves these prepared arguments.

        Raises:
            ValueError: no backend has that name.
            BackendError: the named backend, or under ``"auto"`` every backend, refuses the call.
        """
        name = _chosen.get().get(self.name, backend) if backend == "auto" else backend
        if name != "auto":
            if not isinstance(name, str) or name not in self.backends:
                raise unknown_name(f"backend of {self.name}", name, [*self.backends, "auto"])
            reason = self.backends[name].refuse(*arguments)
            if reason is not None:
                raise BackendError(
                    f"{self.name}: backend {name!r} cannot serve this call: {reason}; {self._served(arguments)}"
                )
            return self.backends[name]
        for candidate in self.auto_order(arguments):
            if self.backends[candidate].passed_over(*arguments) is None:
                return self.backends[candidate]
        raise BackendError(str(self.explain(arguments)))

    def _served(self, arguments: tuple[Any, ...]) -> str:
        able = [name for name, backend in self.backends.items() if backend.refuse(*arguments) is None]
        return f"expected one of {', '.join(able)}" if able else "no other backend can"

    def explain(self, arguments: tuple[Any, ...]) -> Explanation:
        pick: str | None = None
        reasons: dict[str, str] = {}
        order = self.auto_order(arguments)
        forced = _chosen.get().get(self.name)
        for name in dict.fromkeys((*order, *self.backends)):
            backend = self.backends[name]
            reason = (backend.passed_over if forced is None else backend.refuse)(*arguments)
            if reason is not None:
                reasons[name] = reason
            elif forced not in (None, name):
                reasons[name] = f"{forced} was chosen for this block"
            elif forced is None and name not in order:
                reasons[name] = f"it is not in the order {', '.join(order)}"
            elif pick is not None:
                reasons[name] = f"{pick} stands before it in the order {', '.join(order)}"
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


def left_alone() -> bool:
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
    """Collect the calls of operations within the block, arguments and results included."""
    calls: list[Call] = []
    with _observed_by(calls.append):
        yield calls
