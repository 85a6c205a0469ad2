"""The binary counter of states, and rows that stand at the same token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import sequences
from seqarch.ops.log_linear_attention.inputs import LogLinearAttentionInputs

Pair = tuple[Tensor, Tensor]
PER_TOKEN = ("q", "k", "v", "level_weight", "beta", "log_decay")


def bits(number: int) -> list[int]:
    """The places of a number's ones, lowest first."""
    return [place for place in range(number.bit_length()) if number >> place & 1]


def start_of(number: int, bit: int) -> int:
    """The first of the ``2^bit`` tokens that this bit of a count stands for: the count's higher bits."""
    return number >> (bit + 1) << (bit + 1)


def carried(states: dict[int, Tensor], own: Tensor, lowest: int) -> None:
    """Count one more: the state of the tokens that are new goes to the lowest free place from ``lowest`` on, and
    those that its carry passes are added to it."""
    place = lowest
    while place in states:
        own = own + states.pop(place)
        place += 1
    states[place] = own


def as_slots(states: dict[int, Tensor], like: Tensor, dim: int) -> Tensor:
    """States by their place, side by side in ``dim``, as many as there: zeros for the others. The one that as many
    tokens as the levels serve end with has no place, as nothing can follow."""
    empty = like.new_zeros(()).expand_as(like.select(dim, 0))
    return torch.stack([states.get(place, empty) for place in range(like.shape[dim])], dim)


def over_rows(compute: Callable[[LogLinearAttentionInputs], Pair], inputs: LogLinearAttentionInputs) -> Pair:
    """Compute rows that stand at the same token together, packed sequences one by one: calls without offsets."""
    if inputs.offsets is not None:
        given = (getattr(inputs, name) for name in PER_TOKEN)
        pieces = zip(sequences(inputs.offsets, inputs.state, *given), inputs.before, strict=True)
        made = [
            compute(inputs.replace(**dict(zip(PER_TOKEN, own, strict=True)), state=row, before=(count,), offsets=None))
            for (row, *own), count in pieces
        ]
        outputs, states = zip(*made, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)
    if len(set(inputs.before)) <= 1:
        return compute(inputs)
    outputs, states, order = [], [], []
    for count in dict.fromkeys(inputs.before):
        rows = [row for row, other in enumerate(inputs.before) if other == count]
        index = torch.tensor(rows, device=inputs.device)
        tensors = {name: getattr(inputs, name) for name in (*PER_TOKEN, "state")}
        own = {name: None if each is None else each.index_select(0, index) for name, each in tensors.items()}
        o, state = compute(inputs.replace(**own, before=(count,) * len(rows)))
        outputs.append(o)
        states.append(state)
        order += rows
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=inputs.device)
    return torch.cat(outputs).index_select(0, back), torch.cat(states).index_select(0, back)
