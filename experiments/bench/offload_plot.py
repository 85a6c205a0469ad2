"""The picture of experts that are not all in memory: hit rates and tokens per second against how many are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.util.plot_style import COLOURS, DASHES, QUIET, Axes, figure

POLICY_COLOURS = dict(zip(("lru", "lfu", "layer_before"), COLOURS.values(), strict=False))


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel of hit rates for each text, and one of tokens per second."""
    texts = list(dict.fromkeys(row["text"] for row in found["replayed"]))
    with figure([path], columns=len(texts) + 1, size=(4.2 * (len(texts) + 1), 4.0)) as (drawing, panels):
        model = found["model"]
        drawing.suptitle(
            f"{model['layers']} layers of {model['experts']} experts, {model['top_k']} a token: all of each layer's"
            " experts, or some, in memory",
            fontsize=11,
        )
        for axes, text in zip(panels, texts, strict=False):
            _hit_rates(axes, text, [row for row in found["replayed"] if row["text"] == text])
        _speeds(panels[len(texts)], found["decoded"])


def _hit_rates(axes: Axes, text: str, rows: list[dict[str, Any]]) -> None:
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        colour = POLICY_COLOURS.get(policy, QUIET)
        style = {"color": colour, "linestyle": DASHES[0 if policy in POLICY_COLOURS else 2]}
        axes.plot([row["places"] for row in own], [row["hit_rate"] for row in own], label=policy, **style)
    axes.set_title(f"{text}, replayed", fontsize=10)
    axes.set_xlabel("Experts of each layer in memory")
    axes.set_ylabel("Share found in memory")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, loc="lower right")


def _speeds(axes: Axes, rows: list[dict[str, Any]]) -> None:
    whole, *others = rows
    axes.axhline(whole["tokens_per_second"], color=QUIET, linestyle=DASHES[2], label="all in memory")
    for policy, colour in POLICY_COLOURS.items():
        for files, dash in (("system's memory", DASHES[0]), ("disk", DASHES[1])):
            own = [row for row in others if row["policy"] == policy and row["files"] == files]
            values = [row["tokens_per_second"] for row in own]
            axes.plot([row["places"] for row in own], values, color=colour, linestyle=dash, label=f"{policy}, {files}")
    axes.set_title("decoded", fontsize=10)
    axes.set_xlabel("Experts of each layer in memory")
    axes.set_ylabel("Tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="lower right")
