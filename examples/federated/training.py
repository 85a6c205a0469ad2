"""A small hybrid, trained and tested on a client's text: what a client does, with Flower or without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from texts import Reader, test_rows
from torch import Tensor
from torch.nn import functional as F

from seqarch import LanguageModel, detach_state

PATTERN = "3*gated_delta_net attention(window=128)"
LR = 3e-3


def new_model() -> LanguageModel:
    """The model that everybody begins with."""
    torch.manual_seed(0)
    return LanguageModel(vocab_size=256, d_model=64, pattern=PATTERN, depth=4)


def train(model: LanguageModel, readers: Sequence[Reader]) -> float:
    """A step on the next piece of each reader, in this order; the mean loss in bits per byte.

    A state goes on from piece to piece of its text, without a gradient. Weights change by a step in between, which a
    state bears; what all clients have learnt in a round is more, so that a federation makes readers anew for each
    round, without a state; those of central training and of a client alone go on. AdamW begins anew with each call,
    too: its averages are of gradients at weights that are no longer there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model.train()
    total = 0.0
    for reader in readers:
        piece = reader.piece()
        logits, state = model(piece[:, :-1], reader.state)
        reader.state = detach_state(state)
        loss = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / math.log(2)
    return total / len(readers)


@torch.no_grad()
def bits_per_byte(model: LanguageModel, client: str) -> float:
    """On the end of a client's text, which nobody trains on."""
    model.eval()
    rows = test_rows(client)
    logits, _ = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item() / math.log(2)


def shared(model: LanguageModel, own_norms: bool) -> dict[str, Tensor]:
    """What clients send and are sent: all weights, or all but those of norms.

    Weights are all that there is: norms here divide by what is in the token at hand and keep no averages over batches,
    of which those of uneven clients would fit none. A state is of one text and holds what it says: it is never sent.
    """
    return {name: tensor for name, tensor in model.state_dict().items() if not (own_norms and "norm" in name)}
