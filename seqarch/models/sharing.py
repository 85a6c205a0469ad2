"""Mixers and channel mixers that several layers of a stack share: the same numbers, once.

Each occurrence is a module of its own, with its own state and perhaps adapters, whose tensors are those of the first
occurrence. A state dict has them once, by the names of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from seqarch.layers.modules.adapters import adapt
from seqarch.ops.dispatch.checks import fits, show

OPTIONS = ("share", "adapter_rank", "adapted")
"""What an occurrence in a pattern says of sharing, beside the options of its mixer."""


def check_sharing(name: str, own: Mapping[str, Any]) -> None:
    """Raise unless an occurrence's options of sharing fit together.

    Raises:
        ValueError: naming the option.
    """
    if not own:
        return
    share, rank, adapted = (own.get(option) for option in OPTIONS)
    if not isinstance(share, str):
        raise ValueError(f"{name}: share is {show(share)}, expected a name, as adapters belong to shared layers")
    if "adapter_rank" in own and not (isinstance(rank, int) and fits(rank, (int,)) and rank > 0):
        raise ValueError(f"{name}: adapter_rank is {show(rank)}, expected an int of at least 1")
    if "adapted" in own and (rank is None or not adapted or not all(isinstance(each, str) for each in adapted)):
        raise ValueError(f"{name}: adapted is {show(adapted)}, expected names of parts, beside an adapter_rank")


def share(occurrences: Sequence[tuple[str, nn.Module, Mapping[str, Any]]]) -> list[tuple[nn.Module, nn.Module]]:
    """Put adapters where occurrences ask for them; modules whose tensors are another's, and that one, for :func:`tie`.

    Args:
        occurrences: of each mixer and channel mixer its name, the module and what its occurrence says of sharing.

    Raises:
        ValueError: occurrences of one name differ in their options.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = []
    first: dict[tuple[str, str], Any] = {}
    for name, module, own in occurrences:
        if not own:
            continue
        known: Any = first.setdefault((name, own["share"]), module)
        if known is not module:
            if known.config != module.config:
                raise ValueError(
                    f"{name}(share={own['share']}) has other options than its first occurrence: {module.config},"
                    f" expected {known.config}"
                )
            pairs += zip(_shared(module), _shared(known), strict=True)
    for _, module, own in occurrences:  # afterwards: the modules of all are alike until then
        if "adapter_rank" in own:
            adapt(module, own["adapter_rank"], own.get("adapted"))
    return pairs


def _shared(module: Any) -> Iterator[nn.Module]:
    """The modules in one whose tensors are shared, but for those that it names as each layer's own."""
    yield module
    for name, child in module.named_children():
        if name not in module.unshared:
            yield from child.modules()


def tie(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Make the tensors of each module those of the other again."""
    for module, first in pairs:
        module._parameters.update(first._parameters)
        module._buffers.update(first._buffers)


def copies(stack: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> dict[str, str]:
    """By the name of each tensor that is another's, in the stack, the name of that one."""
    paths = {id(module): path for path, module in stack.named_modules(remove_duplicate=False)}
    return {
        f"{paths[id(module)]}.{name}": f"{paths[id(first)]}.{name}"
        for module, first in pairs
        for name in (*first._parameters, *first._buffers)
    }
