"""States in programs of ``torch.export``: named tuples that can be saved and loaded with a program."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def register_states(state: Any) -> None:
    """Give each kind of named tuple in a state the name by which ``torch.export.save`` and ``load`` know it.

    To be called before a program with a state among its inputs or outputs is saved, and in the process that loads it:
    ``register_states(model.init_state(1))``. Calling it again does nothing.
    """
    if hasattr(state, "_fields"):
        kind = type(state)
        if kind not in pytree.SUPPORTED_NODES:
            pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            torch.serialization.add_safe_globals([kind])  # a program is saved with the inputs of its example
    if isinstance(state, (tuple, list)):
        for each in state:
            register_states(each)
