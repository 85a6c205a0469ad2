"""What the study of decoding shows: verdicts, plots and tables of measured conditions."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.bench.decoding import FILLED
from experiments.report.figures import bytes_text
from experiments.studies.measured import Decision, Measured, Point, TimeClaim
from experiments.studies.plots import logarithmic, mixer_style
from experiments.studies.study import Figure, Table
from experiments.util.plot_style import spread

DASHED = (0, (4, 1.5))
STYLES: dict[str, dict[str, Any]] = {
    "attention, 1 key head": {"linestyle": DASHED, "marker": "v"},
    "mla": {"linestyle": (0, (1, 1))},
    "sliding_window": {"linestyle": (0, (5, 1, 1, 1))},
    "attention in 1 of 8": {"linestyle": DASHED, "marker": "s"},
}
"""What is not in a model's colour and marker by its pattern."""


def times(decision: Decision) -> str:
    """``3.1 times (3 to 3.2)``."""
    if decision.interval is None:
        return "an unknown number of times"
    ends = (decision.interval.estimate, decision.interval.low, decision.interval.high)
    middle, low, high = (f"{math.exp(end):.3g}" for end in ends)
    return f"{middle} times ({low} to {high})"


def verdicts(decisions: Sequence[Decision]) -> Table:
    header = ["said", "margin", "ratio seen (95 % interval)", "verdict"]
    rows = [[each.claim.said, _margin(each.claim), "" if each.interval is None else times(each), _answer(each)]
            for each in decisions]  # fmt: skip
    return Table("Verdicts", [header, *rows])


def _margin(claim: TimeClaim) -> str:
    if claim.kind == "equal":
        return f"{1 / claim.factor:.3g} to {claim.factor:.3g} times"
    return f"{'>' if claim.kind == 'more' else '<'} {claim.factor:g} times"


def _answer(decision: Decision) -> str:
    if decision.verdict.answer != "unresolved":
        return f"**{decision.verdict.answer}**"
    return f"unresolved: {decision.verdict.reason if decision.interval is None else 'the interval holds the margin'}"


def tables(main: Measured) -> list[Table]:
    """Of the condition that decides."""
    contexts = main.condition.contexts
    header = ["model", *(f"{context:,}" for context in contexts)]

    def over(title: str, cell: Callable[[Point], str]) -> Table:
        rows = [[model, *(cell((model, context)) if context in main.contexts(model) else "" for context in contexts)]
                for model in main.models]  # fmt: skip
        return Table(title, [header, *rows])

    return [
        over("Milliseconds per token by context: median (quartiles)", lambda point: _milliseconds(main, point)),
        over("Time per token as a multiple of attention's in the same round: median",
             lambda point: _ratio(main, point)),
        over("Share of the time that reading weights and state once would take at the memory's measured rate: median",
             lambda point: f"{np.median(main.bound(point)):.0%}" if len(main.seconds(point)) else ""),
        _state(main, header),
        _sizes(main),
        _prefill(main),
    ]  # fmt: skip


def _milliseconds(main: Measured, point: Point) -> str:
    if not len(seconds := main.seconds(point)):
        return ""
    low, middle, high = (f"{1e3 * value:.3g}" for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{middle} ({low} to {high})"


def _ratio(main: Measured, point: Point) -> str:
    ratios = main.ratio(point, ("attention", point[1]))
    return f"{math.exp(np.median(ratios)):.3g}" if len(ratios) else ""


def _state(main: Measured, header: list[str]) -> Table:
    rows = [[model, *(bytes_text(size) for size in sizes["state_bytes"].values())]
            for model, sizes in main.models.items()]  # fmt: skip
    return Table("Bytes of state by formula", [header, *rows])


def _sizes(main: Measured) -> Table:
    header = ["model", "parameters", "inner width of SwiGLU", "weights read per token", "formula is measured",
              "filled, as a multiple of read"]  # fmt: skip
    return Table("Sizes and checks", [header, *(_size_row(main, model) for model in main.models)])


def _size_row(main: Measured, model: str) -> list[str]:
    sizes = main.models[model]
    measured = {key: size for key, size in sizes["measured_state_bytes"].items() if key != FILLED}
    same = sum(sizes["state_bytes"][key] == size for key, size in measured.items())
    ratios = main.ratio((model, FILLED), (model, main.condition.prefilled))
    low, middle, high = np.exp(np.quantile(ratios, (0.25, 0.5, 0.75))) if len(ratios) else (0.0, 0.0, 0.0)
    return [
        model,
        f"{sizes['parameters']:,}",
        f"{sizes['hidden']:,}",
        bytes_text(sizes["read_weight_bytes"]),
        f"at {same} of {len(measured)} contexts",
        f"{middle:.3f} ({low:.3f} to {high:.3f})" if len(ratios) else "",
    ]


def _prefill(main: Measured) -> Table:
    """Tokens per second of reading a prompt: up to what was read, and nothing beyond."""
    contexts = main.condition.read
    header = ["model", *(f"{context:,}" for context in contexts)]
    rows = []
    for model in main.models:
        found = [[line["seconds"][model][str(context)] for line in main.passes] for context in contexts]
        rows.append([model, *(f"{main.condition.batch * context / statistics.median(seconds):,.0f}" if seconds else ""
                              for context, seconds in zip(contexts, found, strict=True))])  # fmt: skip
    return Table(f"Tokens per second of reading a prompt of so many tokens: median of {len(main.passes)} passes;"
                 " longer ones were not measured", [header, *rows])  # fmt: skip


def others(measured: Sequence[Measured], claims: Sequence[TimeClaim], decisions: Sequence[Decision]) -> list[Table]:
    """The same claims under the other conditions, of which ``decisions`` has as many for each claim."""
    if not measured:
        return []
    header = ["claim", *(each.condition.name for each in measured)]
    rows = []
    for place, claim in enumerate(claims):
        found = decisions[place * len(measured) : (place + 1) * len(measured)]
        if any(each.interval is not None for each in found):
            cells = (f"{each.verdict.answer}, {times(each)}" if each.interval is not None else "" for each in found)
            rows.append([claim.said, *cells])
    return [Table("The same claims under other conditions", [header, *rows])] if rows else []


def figures(measured: Sequence[Measured], patterns: Mapping[str, str]) -> list[Figure]:
    styles = {name: mixer_style(pattern) | {"linestyle": "-"} | STYLES.get(name, {}) for name, pattern in
              patterns.items()}  # fmt: skip
    main, rest = measured[0], [each for each in measured[1:] if each.rounds]
    found = [
        Figure(
            "context",
            f"Left: tokens per second that are decoded after a context, medians of {len(main.rounds)} rounds; bars"
            " are quartiles, mostly smaller than the marks. Right: bytes of state after that context. Both axes are"
            f" logarithmic; {main.condition.name}.",
            lambda axes: _draw_main(axes, main, styles),
            columns=2,
            size=(13.2, 5.4),
        )
    ]
    if rest:
        columns = min(len(rest), 2)
        rows = math.ceil(len(rest) / columns)
        found.append(
            Figure(
                "conditions",
                "Tokens per second, of all sequences together, against the context under the other conditions."
                " A line ends where its state found no room in this machine's memory.",
                lambda axes: _draw_rest(axes, rest, styles),
                columns=columns,
                rows=rows,
                size=(6.6 * columns, 4.6 * rows),
            )
        )
    return found


def _draw_main(panels: Sequence[Axes], main: Measured, styles: Mapping[str, Any]) -> None:
    _draw_speed(panels[0], main, styles)
    panels[0].set_title("Speed")
    panels[0].set_ylabel("Tokens per second (logarithmic)")
    axes, ends = panels[1], []
    for model, sizes in main.models.items():
        bytes_at = {int(key): size for key, size in sizes["state_bytes"].items()}
        ends.append(_draw_line(axes, model, list(bytes_at), list(bytes_at.values()), styles))
    sizes = [size for model in main.models.values() for size in model["state_bytes"].values()]
    low, high = math.floor(math.log2(min(sizes)) / 2), math.ceil(math.log2(max(sizes)) / 2)
    logarithmic(axes, [4.0**power for power in range(low, high + 1)], bytes_text, "y")
    axes.set_title("State")
    axes.set_ylabel("Bytes of state (logarithmic)")
    _finish(axes, main, ends)


def _draw_rest(panels: Sequence[Axes], rest: Sequence[Measured], styles: Mapping[str, Any]) -> None:
    for axes, measured in zip(panels, rest, strict=False):
        _draw_speed(axes, measured, styles)
        axes.set_title(measured.condition.name)
    for axes in panels[len(rest) :]:
        axes.set_visible(False)
    for axes in panels[::2]:
        axes.set_ylabel("Tokens per second (logarithmic)")


def _draw_speed(axes: Axes, measured: Measured, styles: Mapping[str, Any]) -> None:
    """Medians as lines, quartiles as bars."""
    ends, speeds = [], []
    for model in measured.models:
        found = {context: measured.condition.batch / measured.seconds((model, context))
                 for context in measured.contexts(model) if len(measured.seconds((model, context)))}  # fmt: skip
        if not found:
            continue
        middle = [float(np.median(values)) for values in found.values()]
        for context, values in found.items():
            axes.plot([context] * 2, np.quantile(values, (0.25, 0.75)), "-", color=styles[model]["color"], alpha=0.4,
                      linewidth=3, solid_capstyle="butt", zorder=2)  # fmt: skip
        ends.append(_draw_line(axes, model, list(found), middle, styles))
        speeds += middle
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    low, high = (np.searchsorted(ticks, bound) for bound in (min(speeds, default=1.0), max(speeds, default=10.0)))
    logarithmic(axes, ticks[max(low - 1, 0) : high + 1], lambda value: f"{value:g}", "y")
    _finish(axes, measured, ends)


def _draw_line(
    axes: Axes, model: str, x: Sequence[float], y: Sequence[float], styles: Mapping[str, Any]
) -> tuple[str, str, tuple[float, float]]:
    axes.plot(x, y, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6, zorder=3, **styles[model])
    return model, styles[model]["color"], (x[-1], y[-1])


def _finish(axes: Axes, measured: Measured, ends: Sequence[tuple[str, str, tuple[float, float]]]) -> None:
    contexts = measured.condition.contexts
    logarithmic(axes, contexts, lambda value: f"{value:,.0f}")
    axes.set_xlim(contexts[0] / 1.25, contexts[-1] * 1.15)
    axes.set_xlabel("Context (tokens, logarithmic)")
    _label_logarithmic(axes, ends)


def _label_logarithmic(axes: Axes, ends: Sequence[tuple[str, str, tuple[float, float]]]) -> None:
    """Names at the right of all lines, apart by what they take on a logarithmic axis, with strokes to the ends."""
    low, high = (math.log(bound) for bound in axes.get_ylim())
    inches = axes.get_position().height * axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
    wanted = [(math.log(y) - low) / (high - low) for *_, (_, y) in ends]
    for (label, colour, end), place in zip(ends, spread(wanted, 12 / (72 * inches), 0.0, 1.0), strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3,
                  "relpos": (0, 0.5)}  # fmt: skip
        axes.annotate(label, end, xytext=(1.07, place), textcoords="axes fraction", color=colour, fontsize=8.5,
                      va="center", annotation_clip=False, arrowprops=leader)  # fmt: skip


def provenance(measured: Sequence[Measured]) -> str:
    lines = []
    for each in measured:
        if each.settled is None:
            continue
        hardware, software, code = (each.settled[part] for part in ("hardware", "software", "code"))
        shares = [line["others"] for line in (*each.rounds, *each.passes) if line["others"] is not None]
        cores = f"{hardware['cores']} cores, {hardware['threads']} thread{'' if hardware['threads'] == 1 else 's'}"
        rates = f"{np.median(each.rates()) / 1e9:.3g} GB/s" if each.rounds else "unknown"
        fastest = Counter(max(line["bandwidth"], key=line["bandwidth"].get) for line in each.rounds).most_common(1)
        commit = (code["commit"] or "unknown")[:10] + (" with changes" if code["dirty"] else "")
        lines.append(
            f"- {each.condition.name}: {hardware['cpu']}, {cores},"
            f" {bytes_text(hardware['memory_bytes'])} of memory read at {rates}"
            + (f" ({fastest[0][0]})" if fastest else "")
            + f"; Python {software['python']}, torch {software['packages']['torch']}; code {commit}; {len(each.rounds)}"
            f" rounds, {each.discarded} discarded"
            + (f", others took at most {max(shares):.1%} of the machine in those that count" if shares else "")
        )
    return "\n".join(lines)
