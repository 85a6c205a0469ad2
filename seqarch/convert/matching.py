"""What the stages of a conversion make small: how far a student's mixers, or its logits, are from a teacher's.

The teacher runs layer by layer without gradients, and each of the student's mixers gets the input that the teacher's
had, so that no layer learns to make up for another, and no more than the graph of one layer is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.convert.conversion import changed_layers, layers_of
from seqarch.convert.planning import check_alike
from seqarch.layers import materialize
from seqarch.models import LanguageModel
from seqarch.models.stack_layer import INPUT, StackLayer, run_layer
from seqarch.models.streams import first, split
from seqarch.ops.dispatch.checks import accumulation_dtype

Discrepancy = Callable[[StackLayer, StackLayer, Tensor, Tensor | None], Tensor]
"""Of a teacher's and a student's layer, what their mixers read ``[B, T, D]``, and which tokens count ``[B, T]``."""


def check_pair(teacher: LanguageModel, student: LanguageModel, of_layers: bool) -> None:
    """Raise unless a student can be trained to be as a teacher.

    Args:
        of_layers: whether its mixers are, and not its logits alone: then both have one width and depth, and differ in
            mixers only.

    Raises:
        ValueError: naming what differs; or nothing does where mixers should.
    """
    if not of_layers:
        theirs, own = teacher.config.vocab_size, student.config.vocab_size
        if theirs != own:
            raise ValueError(f"the teacher has a vocabulary of {theirs}, expected {own} as here")
        return
    check_alike(teacher.config, student.config)
    if not changed_layers(teacher, student):
        raise ValueError("the teacher has the same mixers in every layer: there is nothing to match")


def layer_by_layer(
    teacher: LanguageModel,
    student: LanguageModel,
    tokens: Tensor,
    discrepancy: Discrepancy,
    token_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """The discrepancy of each layer with other mixers, over the number of these layers: scalars with the graph of that
    layer's mixers alone, each to be differentiated before the next is asked for.

    Args:
        tokens: ``[B, T]``; ``token_mask`` is false where one is padding, after the tokens of its row.

    Raises:
        ValueError: as of the discrepancy, with the layer's number.
    """
    pairs = list(zip(layers_of(teacher), layers_of(student), strict=True))
    changed = changed_layers(teacher, student)
    with torch.no_grad():
        x = split(teacher.embedded(tokens), teacher.config.residual_streams)
    handed: Mapping[str, Any] = {INPUT: first(x)}
    for i, (theirs, own) in enumerate(pairs[: max(changed, default=-1) + 1]):
        if i in changed:
            with torch.no_grad():
                read = theirs.mixer_input(x)
            try:
                found = discrepancy(theirs, own, read, token_mask)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from error
            yield found / len(changed)
        with torch.no_grad():
            x, _, handed = run_layer(theirs, x, (None,) * theirs.branches, None, token_mask, None, handed)


def of_outputs(theirs: StackLayer, own: StackLayer, read: Tensor, token_mask: Tensor | None) -> Tensor:
    """``sum |y - y'|^2 / sum |y'|^2`` of what two layers' mixers add to the residual stream, y' the teacher's.

    The attention transfer of Zhang et al. 2024, "LoLCATs", section 3.2, and Goldstein et al. 2025, "RADLADS", step 1;
    of the outputs after their last projection, and relative to the teacher's, so that layers count alike.
    """
    with torch.no_grad():
        wanted = theirs.mixed(read)
    return _relative(own.mixed(read), wanted, None if token_mask is None else token_mask.unsqueeze(-1))


def of_matrices(theirs: StackLayer, own: StackLayer, read: Tensor, token_mask: Tensor | None) -> Tensor:
    """``sum |M - M'|^2 / sum |M'|^2`` of the matrices ``[B, H, T, T]`` by which two mixers mix along time.

    The matrix orientation of Bick et al. 2024, "Transformers to SSMs" (MOHAWK), section 3.1, relative to the teacher's.
    The matrices are those of :func:`seqarch.layers.materialize`, of the operations alone: a sum that linear attention
    divides by, and norms, are outside of them.

    Raises:
        ValueError: there are several mixers side by side, a mixer's operation is not linear in its values, or the two
            have different numbers of heads.
    """
    if theirs.branches > 1 or own.branches > 1:
        raise ValueError(f"{max(theirs.branches, own.branches)} mixers side by side, expected one to have a matrix")
    (old,), (new,) = theirs.mixers, own.mixers
    mixers: tuple[Any, Any] = (old, new)
    wanted = materialize(mixers[0], read * theirs.factors[0][0])
    found = materialize(mixers[1], read * own.factors[0][0], gradients=True)
    shapes = [[list(each.matrix.shape) for each in side] for side in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{type(new).__name__} has matrices {shapes[0]}, expected {shapes[1]} as the teacher's {type(old).__name__}"
        )
    mask = None if token_mask is None else token_mask[:, None, :, None]
    losses = [_relative(a.matrix, b.matrix, mask) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(losses).mean()


def _relative(found: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    wide = accumulation_dtype(found)
    difference, size = (found.to(wide) - wanted.to(wide)).square(), wanted.to(wide).square()
    if mask is not None:
        difference, size = difference * mask, size * mask
    return difference.sum() / size.sum().clamp(min=torch.finfo(wide).tiny)


def of_logits(found: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """``t^2 KL(softmax(z' / t) || softmax(z / t))`` of logits z ``[M, vocab_size]``, the teacher's z', summed over M.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2; in float32 at least.

    Args:
        temperature: t; the factor ``t^2`` keeps gradients of one size whatever it is.
    """
    wide = accumulation_dtype(found)
    own, theirs = ((each.to(wide) / temperature).log_softmax(-1) for each in (found, wanted))
    return temperature**2 * F.kl_div(own, theirs, reduction="sum", log_target=True)
