"""Initialisation or architecture: recall under two initial embeddings and two initial gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from experiments.studies.protocol import Arm, Protocol
from experiments.studies.study import Claim, Study, Version

SLOW = {
    "gla": "model.mixers.gla.decay_bias=4",
    "gated_delta_net": "model.mixers.gated_delta_net.dt_min=1e-4 model.mixers.gated_delta_net.dt_max=1e-3",
    "kda": "model.mixers.kda.dt_min=1e-4 model.mixers.kda.dt_max=1e-3",
    "mamba": "model.mixers.mamba.A_scale=0.01 model.mixers.mamba.dt_min=0.1 model.mixers.mamba.dt_max=1",
    "mamba2": "model.mixers.mamba2.A_min=0.01 model.mixers.mamba2.A_max=0.1 model.mixers.mamba2.dt_min=0.1"
    " model.mixers.mamba2.dt_max=1",
    "mlstm": "model.mixers.mlstm.forget_min=6 model.mixers.mlstm.forget_max=9",
}
"""Gates that at first keep what they have for several times the length of a sequence, by mixer."""

MIXERS = ("attention", "delta_net", *SLOW)
EMBEDDINGS = {"narrow": "0.02", "wide": "1"}
LEARNT = 0.9
"""Of validation accuracy: a mixer that has this much has understood the task."""
MARGIN = 0.05
"""Of recall accuracy: less would change nobody's choice of a mixer."""


def arm(mixer: str, embedding: str, gates: str) -> Arm:
    """A mixer with one initial embedding, and gates that start as released or slow (``none`` where it has none)."""
    overrides = f"model={mixer} model.embedding_std={EMBEDDINGS[embedding]}"
    slow = f" {SLOW[mixer]}" if gates == "slow" else ""
    name = f"{mixer}, {embedding}" + ("" if gates == "none" else f", {gates}")
    return Arm(name, overrides + slow, {"mixer": mixer, "embedding": embedding, "gates": gates})


def arms(mixers: tuple[str, ...] = MIXERS) -> tuple[Arm, ...]:
    gates = {mixer: ("released", "slow") if mixer in SLOW else ("none",) for mixer in mixers}
    return tuple(arm(mixer, embedding, gate) for mixer in mixers for gate in gates[mixer] for embedding in EMBEDDINGS)


def claims() -> tuple[Claim, ...]:
    own = [
        Claim(
            f"{mixer}: the start decides",
            f"{mixer} recalls more from a wide embedding and slow gates than as released (expected before the runs)",
            ((f"{mixer}, wide, slow", f"{mixer}, narrow, released"),),
            "more",
            MARGIN,
        )
        for mixer in SLOW
    ]
    speed = [
        Claim(
            f"{mixer}: the start sets the pace",
            f"As released, {mixer} takes more than twice as many steps to recall {LEARNT:.0%} as from a wide embedding"
            " and slow gates (expected before the runs)",
            ((f"{mixer}, narrow, released", f"{mixer}, wide, slow"),),
            "more",
            1.0,
            threshold=LEARNT,
        )
        for mixer in SLOW
    ]
    embeddings = [(f"{mixer}, wide, released", f"{mixer}, narrow, released") for mixer in SLOW]
    gates = [(f"{mixer}, narrow, slow", f"{mixer}, narrow, released") for mixer in SLOW]
    released, slow = "narrow, released", "wide, slow"
    return (
        *own,
        *speed,
        Claim("the embedding alone", "A wide embedding alone raises recall, over all mixers with gates",
              tuple(embeddings), "more", MARGIN),
        Claim("the gates alone", "Slow gates alone raise recall, over all mixers with gates",
              tuple(gates), "more", MARGIN),
        Claim("the delta rule above Mamba-2 as released", "The delta rule recalls more than Mamba-2 (zoology's figure)",
              (("delta_net, narrow", f"mamba2, {released}"),), "more", MARGIN),
        Claim("and from the other start", "and does so from a wide embedding and slow gates",
              (("delta_net, wide", f"mamba2, {slow}"),), "more", MARGIN),
        Claim("the gated delta rule is no worse",
              "The gated delta rule recalls as much as the delta rule once both start well (Yang et al. 2024: no less)",
              ((f"gated_delta_net, {slow}", "delta_net, wide"),), "equal", MARGIN),
    )  # fmt: skip


class Initialisation(Study):
    name = "initialisation"
    title = "Initialisation or architecture?"
    question = (
        "How much of the differences in recall between mixers is decided by the initial embedding and the initial"
        " gates, and how much by the architecture?"
    )
    history = ("validation_accuracy", "validation_loss")
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version("experiment=initialisation", arms(), Protocol(), claims()),
        "small": Version(
            "experiment=initialisation task.pairs=4 task.length=32 train.steps=400 train.plateau_tokens=102400"
            " train.target=0.98",
            arms(("attention", "mamba2", "gated_delta_net")),
            Protocol(rates=(-5, -4), most_rates=2, tuning_seeds=(100,), reporting_seeds=(0, 1)),
        ),
    }
