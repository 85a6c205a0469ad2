"""States of models as things to work with: saved and loaded, copied, chosen by rows, joined, taken back.

    import seqarch

    _, state = model(tokens)
    seqarch.state.save(state, "prompt.safetensors", model)
    state = seqarch.state.load("prompt.safetensors", model)
    both = seqarch.state.join([state, other])       # rows of sequences of any lengths, in one batch
    rest = seqarch.state.leave(both, [0])           # without the first of them

What is here is true of every mixer: a state is a named tuple of tensors with a row for each sequence.
"""

from seqarch.layers.mixer import clone_state as clone
from seqarch.layers.rows import join_rows as join
from seqarch.layers.rows import leave_rows as leave
from seqarch.layers.rows import row_count
from seqarch.layers.rows import state_rows as select
from seqarch.state.checkpoints import Checkpoints
from seqarch.state.files import STATE_VERSION, StateError, fingerprint, load, save
from seqarch.state.prefix_cache import PrefixCache

__all__ = [
    "STATE_VERSION",
    "Checkpoints",
    "PrefixCache",
    "StateError",
    "clone",
    "fingerprint",
    "join",
    "leave",
    "load",
    "row_count",
    "save",
    "select",
]
