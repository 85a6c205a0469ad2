"""The generated parts of docs/choosing.md: states by the library's own formulas, and what the studies have found."""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np
import torch

from experiments.report.figures import bytes_text
from experiments.studies import STUDIES, records
from experiments.studies.measured import Measured
from experiments.studies.page import PAGES, recorded
from experiments.util.blocks import table
from experiments.util.paths import ROOT
from seqarch import LanguageModel
from seqarch.layers import FAMILIES

WIDTH, DEPTH, VOCABULARY = 768, 12, 50_304
"""A model of the size of the smallest GPT-2."""

CONTEXTS = (1024, 8192, 32_768, 262_144)
"""Tokens of one sequence."""

HYBRIDS = ("3*gated_delta_net attention", "5*mamba2 attention", "5*kda mla")
"""Of which one layer in 4 or 6 has a cache that grows."""

QUALITY = {
    "recall": "recall_state",
    "a needle in a long text": "needle",
    "following a state": "state_tracking",
    "how a model starts": "initialisation",
}
"""Studies by what they are about."""

TOKENS, MEMORY = 32_768, 100_000_000
"""The question of README.md: a sequence of so many tokens, and so many bytes for its state."""

BOARD = ("Raspberry Pi 5", 17.1e9, 153e9)
"""A small board: bytes a second from memory and FLOPs a second in float32, by its data sheet, as in the chooser."""

ANSWERS = (
    *("mamba2", "gated_delta_net", "kda", "5*kda mla", "3*gated_delta_net attention(window=4096)"),
    *("3*gated_delta_net attention", "attention"),
)
"""What README.md compares."""


def state_table() -> str:
    """Bytes of the state of one sequence by context, and FLOPs of a token there, for every mixer and three hybrids."""
    patterns = [*chain(*FAMILIES.values()), *HYBRIDS]
    rows = [(f"[`{name}`](mixers.md#{name})" if name not in HYBRIDS else f"`{name}`", *_state_row(name))
            for name in sorted(patterns, key=_held)]  # fmt: skip
    held = [f"state after {context:,}" for context in CONTEXTS]
    return table(("mixer", *held, f"MFLOPs of a token after {CONTEXTS[-2]:,}"), rows, align="---:")


@cache
def _model(pattern: str) -> LanguageModel:
    """The model without numbers, of as many whole periods of its pattern as are nearest to ``DEPTH`` layers."""
    period = sum(int(part.partition("*")[0]) if "*" in part else 1 for part in pattern.split())
    with torch.device("meta"):
        return LanguageModel(
            vocab_size=VOCABULARY, d_model=WIDTH, pattern=pattern, depth=period * round(DEPTH / period)
        )


def _held(pattern: str) -> tuple[int, str]:
    return _model(pattern).state_bytes(CONTEXTS[-2]), pattern


def _state_row(pattern: str) -> list[str]:
    model = _model(pattern)
    held = [bytes_text(model.state_bytes(context)) for context in CONTEXTS]
    return [*held, f"{model.step_flops(CONTEXTS[-2]) / 1e6:.0f}"]


def answer() -> str:
    """What fits into the memory at these tokens, and how long one more token takes at least on a small board."""
    board, bandwidth, arithmetic = BOARD
    mixers = [*chain(*FAMILIES.values())]
    fitting = sum(_model(name).state_bytes(TOKENS) <= MEMORY for name in mixers)
    rows = []
    for pattern in ANSWERS:
        model = _model(pattern)
        held = model.state_bytes(TOKENS)
        read = 4 * (model.num_parameters() - VOCABULARY * WIDTH) + held  # of the embedding a token reads one row
        seconds = max(read / bandwidth, model.step_flops(TOKENS) / arithmetic)
        rows.append((f"`{pattern}`", bytes_text(held), "yes" if held <= MEMORY else "no", f"{1e3 * seconds:.0f} ms"))
    room = f"{MEMORY // 10**6} MB"
    heads = ("layers", "state", f"within {room}", "least time of a token")
    said = (
        f"In {DEPTH} layers of width {WIDTH} and float32, {fitting} of {len(mixers)} mixers hold what they know of"
        f" {TOKENS:,} tokens within {room}. None that keeps every token does, but one layer of attention in four or six"
        f" fits, with a window or compressed. The device is a {board}:"
    )
    return f"{said}\n\n{table(heads, rows, align='---:')}"


def speed_table() -> str:
    """Milliseconds of a token by context, measured, with the state that is read for it."""
    study, folder = STUDIES["decoding"], ROOT / "docs" / "results" / "decoding"
    if not (folder / records.FILE).exists():
        return "**Not measured yet** ([what a context costs a decoded token](results/decoding.md))."
    measured: Measured = recorded(study, study.versions["recorded"], folder)[0]
    contexts = [context for context in measured.condition.contexts if context >= CONTEXTS[0]]
    rows = [(name, *(_speed(measured, name, context) for context in contexts)) for name in measured.models]
    said = f"Condition: {measured.condition.name}. Medians of {len(measured.rounds)} rounds."
    return table(("model", *(f"ms after {context:,}" for context in contexts)), rows, align="---:") + f"\n\n*{said}*"


def _speed(measured: Measured, name: str, context: int) -> str:
    seconds = measured.seconds((name, context))
    if not len(seconds):
        return ""
    return f"{1e3 * np.median(seconds):.3g} ({bytes_text(measured.models[name]['state_bytes'][str(context)])})"


def quality_table() -> str:
    """The answers of the studies so far."""
    rows = []
    for about, name in QUALITY.items():
        study, folder = STUDIES[name], ROOT / "docs" / "results" / name
        link = f"[{study.title}](results/{PAGES[name].name})"
        if not (folder / records.FILE).exists():
            rows.append((about, link, "not run yet"))
            continue
        found = recorded(study, study.versions["recorded"], folder)
        unfinished = "".join(f"{said} " for said in study.unfinished(found))
        rows.append((about, link, unfinished + study.answer(found)))
    return table(("about", "study", "answer so far"), rows)
