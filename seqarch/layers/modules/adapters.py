"""Low-rank adapters that belong to a model: what one occurrence of shared linear maps adds to them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.linear import Linear


class AdaptedLinear(nn.Module):
    """``y = W x + U D x``, a matrix D of ``rank`` rows and U at first 0 (Hu et al. 2021, "LoRA", section 4.1).

    Args:
        inner: the linear map.
        rank: of each adapter.
        sizes: of the parts of y that have an adapter each.
    """

    def __init__(self, inner: nn.Linear, rank: int, sizes: Sequence[int]):
        super().__init__()
        self.inner = inner
        self.down = nn.ModuleList(Linear(inner.in_features, rank, bias=False) for _ in sizes)
        self.up = nn.ModuleList(Linear(rank, size, bias=False) for size in sizes)
        for each in self.up:
            nn.init.zeros_(each.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        added = [up(down(x)) for down, up in zip(self.down, self.up, strict=True)]
        return self.inner(x) + (added[0] if len(added) == 1 else torch.cat(added, dim=-1))


def adapt(module: nn.Module, rank: int, names: Collection[str] | None = None) -> None:
    """Put adapters of this rank around linear maps in a module: each, or those in the submodules of these names.

    The projection to the heads of an attention has one for each of queries, keys and values.

    Raises:
        ValueError: a name is of no submodule with linear maps, or there are none at all, as in plain experts.
    """
    found = []
    for path, inner in module.named_modules():
        for name, child in inner.named_children():
            whole = f"{path}.{name}".lstrip(".")
            if isinstance(child, nn.Linear) and (names is None or any(_within(whole, each) for each in names)):
                sizes = inner.sizes if isinstance(inner, HeadProjection) else [child.out_features]
                found.append((whole, inner, name, AdaptedLinear(child, rank, sizes)))
    if not found and not names:
        raise ValueError(f"adapter_rank is {rank}, but {type(module).__name__} has no linear maps to adapt")
    for each in names or ():
        if not any(_within(whole, each) for whole, *_ in found):
            raise ValueError(f"adapted names {each!r}, expected a part with linear maps")
    for _, inner, name, adapted in found:
        setattr(inner, name, adapted)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")
