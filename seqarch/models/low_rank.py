"""LoRA: low-rank changes of some matrices of a model, which learn in the place of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seqarch.models.language_model import LanguageModel
from seqarch.models.projections import Projection, choose
from seqarch.ops.dispatch.autocast import without_autocast


class LowRankChange(nn.Module):
    """``W + (alpha / r) sum_i B_i A_i`` of a matrix ``W [..., M, N]``, or of one stacked on another.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3. ``A_i [..., r, N]``
    starts uniform within ``1 / sqrt(N)``, as in the authors' release (normal in the paper), ``B_i [..., M, r]`` at 0.
    The product is computed in the dtype of W, under autocast as well, so that it is the same whenever it is merged.

    Args:
        weight: W.
        parts: of each i, whether it changes all of W (no role), some rows of it, or some columns (``"o"``).
        rank: r.
        alpha: the change's factor, times r.
    """

    def __init__(self, weight: Tensor, parts: Sequence[Projection], rank: int, alpha: float):
        super().__init__()
        self.parts, self.scale = tuple(parts), alpha / rank
        like = {"device": weight.device, "dtype": weight.dtype}
        *stacked, rows, columns = weight.shape
        down, up = [], []
        for part in parts:
            read = part.size if part.role == "o" else columns
            made = part.size if part.role not in (None, "o") else rows
            drawn = torch.empty(*stacked, rank, read, device=None if weight.is_meta else "cpu").uniform_(-1, 1)
            down.append(nn.Parameter((drawn * read**-0.5).to(**like)))
            up.append(nn.Parameter(torch.zeros(*stacked, made, rank, **like)))
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)

    def forward(self, weight: Tensor) -> Tensor:
        with without_autocast(weight.device):
            for part, down, up in zip(self.parts, self.down, self.up, strict=True):
                change = self.scale * (up @ down)
                if part.role is None:
                    weight = weight + change
                else:
                    dim = -1 if part.role == "o" else -2
                    after = weight.shape[dim] - part.start - part.size
                    before = (part.start, after) if dim == -1 else (0, 0, part.start, after)
                    weight = weight + nn.functional.pad(change, before)
        return weight


class LoraAdapters:
    """Puts adapters on projections of a model, which are not to learn themselves.

        train_only(model, [])  # or names of what is to learn besides
        adapters = LoraAdapters(model, rank=8, alpha=16, targets=["q", "k", "v", "o"])

    The model computes with the changed matrices themselves, in every form of every layer, so that it gives to the bit
    what it gives with the changes merged. A gradient of a changed matrix is made on the way to its adapters': a step
    takes about the time of training all, and the memory of its gradients and moments is saved.

    Args:
        model: its matrices are changed in place of its own, which stay as they are.
        rank: of each change.
        alpha: each is multiplied by ``alpha / rank``.
        targets: names of layers, projections and roles of heads, as of :func:`seqarch.models.projections.choose`; all
            projections without any. Each role has a change of its own.

    Raises:
        ValueError: the rank is below 1, a name matches nothing, a matrix learns or belongs to several layers, or the
            model has a ``mup_base_width``, which has no rates for adapters.
    """

    def __init__(self, model: LanguageModel, rank: int, alpha: float, targets: Sequence[str] = ()):
        if rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1")
        if model.config.mup_base_width is not None:
            raise ValueError("the model has a mup_base_width, by which adapters have no learning rate: leave it out")
        chosen = sorted(choose(model, targets, with_roles=True), key=lambda each: (each.tensor, each.start))
        _check(model, chosen)
        self._model, self._names = model, list(model.state_dict())
        self._inside: dict[str, str] = {}  # by the name of a changed matrix that of its own numbers
        self._changes: dict[str, tuple[nn.Module, str, LowRankChange]] = {}
        for path, parts in groupby(chosen, key=lambda each: each.tensor):
            owner, _, name = path.rpartition(".")
            self._inside[path] = f"{owner}.parametrizations.{name}.original"
            change = LowRankChange(model.get_parameter(path), list(parts), rank, alpha)
            self._changes[path] = model.get_submodule(owner), name, change
        self._put_on()

    def _put_on(self) -> None:
        for module, name, change in self._changes.values():
            # Which is not computed to see whether it fits: it may be without memory, or drawn from nothing.
            parametrize.register_parametrization(module, name, change, unsafe=True)

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """Within the block the model is as it was without them, for what goes by its modules."""
        for module, name, _ in self._changes.values():
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        try:
            yield
        finally:
            self._put_on()

    @property
    def num_parameters(self) -> int:
        """Of the adapters alone."""
        return sum(each.numel() for _, _, change in self._changes.values() for each in change.parameters())

    def plain(self) -> dict[str, Tensor]:
        """The model's tensors without the changes, by the names that they have without adapters; they can be filled."""
        there = self._model.state_dict()
        return {name: there[self._inside.get(name, name)] for name in self._names}

    def unchanged(self) -> dict[str, Tensor]:
        """Those of them that no adapter changes."""
        return {name: tensor for name, tensor in self.plain().items() if name not in self._changes}

    def merged(self) -> dict[str, Tensor]:
        """The tensors of a model without adapters that computes the same, to the bit."""
        with torch.no_grad():
            return {**self.plain(), **{name: getattr(module, own) for name, (module, own, _) in self._changes.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """What changed matrices are made of: ``matrix/base``, ``matrix/down.i`` and ``matrix/up.i``; can be filled."""
        found, plain = {}, self.plain()
        for name, (_, _, change) in self._changes.items():
            found[f"{name}/base"] = plain[name]
            found |= {f"{name}/{own}": each.detach() for own, each in change.named_parameters()}
        return found


def _check(model: LanguageModel, chosen: Sequence[Projection]) -> None:
    """Raise where a matrix learns itself, or is that of several layers, which would have to be changed alike."""
    shared = {id(module) for pair in model.stack.shared for module in pair}
    for each in chosen:
        owner = each.tensor.rpartition(".")[0]
        if model.get_parameter(each.tensor).requires_grad:
            raise ValueError(f"{each.tensor} learns itself, and is to have an adapter: choose one of the two")
        if id(model.get_submodule(owner)) in shared:
            raise ValueError(f"{each.tensor} belongs to several layers (share): choose targets without {each.layer}")
