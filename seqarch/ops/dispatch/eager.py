"""Whether torch runs calls just as they are made, so that other code may take their place.

A custom operator knows first derivatives in reverse mode. Forward mode passes it by in silence, as if nothing depended
on its inputs; transforms of ``torch.func`` and batched backward passes (``is_grads_batched``) have no rule for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from seqarch.ops.dispatch.autocast import autocast_is_on


def is_eager(device: torch.device) -> bool:
    """Whether neither autocast, a compiler nor a transform takes part."""
    return not autocast_is_on(device) and not torch.compiler.is_compiling() and active_transform() is None


def active_transform() -> str | None:
    """The transform under way, if any, that custom operators do not support, since it differentiates torch's own."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vmap, jvp, ...) is under way"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives (torch.autograd.forward_ad) are being taken"
    return None


_BATCHED_GRADIENT = torch._C._dispatch_key_parse("Batched")
"""Of tensors in backward passes by ``is_grads_batched``, which are no transforms of ``torch.func``."""


def is_batched(x: Tensor) -> bool:
    """Whether a ``vmap`` under way stands for many tensors by this one, whose values nobody can ask for."""
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active():
        return torch._C._dispatch_keys(x).has(_BATCHED_GRADIENT)
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_traced() -> bool:
    """Whether operations are being written down, by a compiler or ``make_fx``, and values are not to be asked for."""
    proxy = torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(proxy) is not None  # type: ignore[attr-defined]


def knows_values(x: Tensor) -> bool:
    """Whether shapes may depend on the values of ``x``: on a CPU, where nothing is written down or transformed."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not is_traced()
        and active_transform() is None
        and not is_batched(x)
    )


def has_dispatch_mode() -> bool:
    """Whether a mode sees each of torch's calls, such as a FLOP counter."""
    return bool(torch._C._len_torch_dispatch_stack())  # type: ignore[attr-defined]


def are_fake(*tensors: Tensor | None) -> bool:
    """Whether these have shapes and no memory, and nobody but their own mode sees torch's calls: a dry run."""
    if torch._C._len_torch_dispatch_stack() != 1:  # type: ignore[attr-defined]
        return False
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # type: ignore[attr-defined]
    return mode is not None and all(each is None or isinstance(each, FakeTensor) for each in tensors)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody gave a module hooks or a ``forward`` of its own. Hooks of all modules are FLOP counters'."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is its class's ``forward`` and nothing more: no hooks, no ``forward`` of its own."""
    return is_untouched(module) and not global_hooks._has_any_global_hook()
