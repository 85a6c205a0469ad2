"""Whether what a program was written from is still as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from seqarch.ops.dispatch.eager import is_plain
from seqarch.ops.native.view import Unserved

WATCHED = (Tensor, nn.Module, bool, int, float, str)
"""What a module's forward pass may depend on."""


TAKEN = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16)
"""Of parameters: float32, bfloat16, and codes and scales of quantised weights; their instructions alone read whole
numbers."""


class Watch:
    """The sources of a program: modules, their hooks, submodules, numbers and names, and the parameters' memory.

    It is asked at every token, when its own data has left the cache: the fewer objects it looks at, the better.
    Nothing in it changes once the program is written.

    Raises:
        Unserved: a module has hooks, or a forward pass that somebody gave it.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        if odd := [module for module in modules if not is_plain(module)]:
            raise Unserved(f"{type(odd[0]).__name__} has hooks, or a forward pass of its own")
        self.attributes = list(map(vars, modules))
        self.sizes = list(map(len, self.attributes))
        entries = [
            (owner, name)
            for module in modules
            for owner in (vars(module), module._parameters, module._buffers, module._modules)
            for name, value in list(owner.items())
            if isinstance(value, WATCHED)
        ]
        self.owners, self.names = (list(each) for each in zip(*entries, strict=True))
        self.values = list(map(getitem, self.owners, self.names))
        self.hooks: list[Any] = [each for m in modules for each in (m._forward_hooks, m._forward_pre_hooks)]
        self.tensors: list[Tensor] = []
        self.addresses: list[int] = []

    def take(self, tensor: Tensor) -> int:
        """The address of a parameter, a buffer or a constant."""
        if tensor.dtype not in TAKEN or not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter):
            kind = type(tensor).__name__
            raise Unserved(f"a parameter is a {kind} of {tensor.dtype} on {tensor.device}")
        self.tensors.append(tensor)
        self.addresses.append(tensor.data_ptr())
        return self.addresses[-1]

    def objects(self) -> Iterator[Any]:
        """What :meth:`hold` looks at."""
        yield from (self.attributes, self.owners, self.names, self.values, self.hooks, self.tensors, self.addresses)
        yield from chain(self.attributes, self.owners, self.values, self.hooks, self.tensors)

    def hold(self) -> list[UntypedStorage] | None:
        """The parameters' memory, to be kept while the program runs: another thread may give a parameter other memory.

        ``None`` where the layers are no longer as they were when the program was written.
        """
        memory = list(map(Tensor.untyped_storage, self.tensors))  # first: what is kept stays where it is found next
        same = (
            not any(self.hooks)
            and list(map(len, self.attributes)) == self.sizes
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )
        return memory if same else None
