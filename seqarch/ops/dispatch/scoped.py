"""Values that ``with`` blocks set: each thread and each task has its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")


class _OfThread(threading.local):
    """The value for ``torch.compile``, which makes a guard of it: it knows no context variables."""

    value: Any = None


class Scoped(Generic[Value]):
    """A value that is ``default`` outside of all blocks.

    Another thread or task begins with the default. The threads in which torch runs the backward passes of a block see
    the block's value: there activation checkpoints compute their forward passes again.
    """

    def __init__(self, name: str, default: Value):
        self._default, self._key = default, f"seqarch.{name}"
        self._own: ContextVar[Value | None] = ContextVar(self._key, default=None)
        self._of_thread = _OfThread()

    def get(self) -> Value:
        if torch.compiler.is_compiling():
            value = self._of_thread.value
            return self._default if value is None else value
        value: Value | None = self._own.get()
        if value is None and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls(self._key):
            value = torch._C._get_obj_in_tls(self._key)
        return self._default if value is None else value

    @contextmanager
    def set(self, value: Value) -> Iterator[None]:
        """Within the block, the value is this one."""
        before = self._own.get()
        self._put(value)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, value: Value | None) -> None:
        self._own.set(value)
        self._of_thread.value = value
        torch._C._stash_obj_in_tls(self._key, value)  # torch hands this on to the threads of its backward passes
