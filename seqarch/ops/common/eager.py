"""Whether torch runs calls just as they are made, so that other code may take their place."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from seqarch.ops.common.autocast import autocast_is_on


def as_made(device: torch.device) -> bool:
    """Whether neither autocast, a compiler nor a transform of ``torch.func`` takes part."""
    return (
        not autocast_is_on(device)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    )


def watched() -> bool:
    """Whether a mode sees each of torch's calls, such as a FLOP counter."""
    return bool(torch._C._len_torch_dispatch_stack())  # type: ignore[attr-defined]


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is its class's ``forward`` and nothing more: no hooks, no ``forward`` of its own."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and not global_hooks._has_any_global_hook() and "forward" not in vars(module)
