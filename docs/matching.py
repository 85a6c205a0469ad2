"""What matching reaches: the sizes that give each mixer a state and a number of parameters, for the page on it."""

from __future__ import annotations

from itertools import chain

import torch

from experiments.config.matching import NothingClose, matched, shown, sizes
from experiments.config.targets import MatchConfig
from experiments.util.blocks import table
from seqarch.layers import FAMILIES
from seqarch.models import LanguageModel, LMConfig

STATES = ("8KiB", "20KiB", "64KiB")
PARAMETERS = {64: "140k", 128: "500k"}
"""In the layers, by the width of the stream."""

VOCABULARY, LENGTH, DEPTH = 8192, 256, 2


def reached(name: str, width: int, state: str) -> tuple[LMConfig, int, int]:
    """The options of a model of one mixer that is matched, its bytes of state and the parameters in its layers.

    Raises:
        NothingClose: it cannot be.
    """
    given = LMConfig(vocab_size=VOCABULARY, d_model=width, pattern=name, depth=DEPTH)
    match = MatchConfig(parameters=PARAMETERS[width], state_bytes=state, count="layers")
    options = matched(given, match, LENGTH)
    with torch.device("meta"):
        stack = LanguageModel(options).stack
    return options, stack.state_bytes(LENGTH), sum(parameter.numel() for parameter in stack.parameters())


def matching_table(width: int) -> str:
    """A row for each mixer: what is solved for each state, with the errors; or what stands against it."""
    rows = [(f"[`{name}`](mixers.md#{name})", *_cells(name, width)) for name in chain(*FAMILIES.values())]
    return table(("mixer", *(state.replace("KiB", " KiB") for state in STATES)), rows)


def _cells(name: str, width: int) -> list[str]:
    wanted = MatchConfig(parameters=PARAMETERS[width]).wanted_parameters
    cells = []
    for state in STATES:
        try:
            options, held, parameters = reached(name, width, state)
        except NothingClose as error:
            if error.totals is None:
                why = "its state grows" if "grows with the sequence" in str(error) else "its state has one size"
                return [f"no: {why}"] * len(STATES)
            cells.append(f"no: at least {error.totals['parameters'] / 1000:.0f} k parameters")
            continue
        asked = MatchConfig(state_bytes=state).wanted_state
        assert asked is not None
        assert wanted is not None
        own = ", ".join(f"`{shown(each)}`" for each in sizes(options).values())
        cells.append(f"{own}: {_error(held / asked)}, {_error(parameters / wanted)}")
    return cells


def _error(ratio: float) -> str:
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"
