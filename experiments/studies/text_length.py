"""Text far beyond the training length: who predicts a file better the more of it has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes

from experiments.report.figures import mark_length
from experiments.report.statistics import Verdict, mean_interval, verdict
from experiments.studies import plots
from experiments.studies.claims import decide, lacks, scores_of
from experiments.studies.protocol import IN_MINUTES, LONG_RUNS, Arm, Progress
from experiments.studies.study import Figure, Table
from experiments.studies.text_programs import Program, TextResults, between, measure, read_results
from experiments.studies.trained import Claim, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import median_text, so_text
from experiments.tasks.byte_text import position_bins
from experiments.util.plot_style import QUIET

CORPUS = "task.corpus=golang-1.19-src"
COMMON = f"experiment=text_length {CORPUS} match.parameters=250k match.count=layers match.tolerance=3%"
"""The widths of every arm are solved for these parameters in the four layers."""

LENGTHENED = (
    f"experiment=text_length {CORPUS} task.length=2048 task.eval_length=65536 train.batch_size=16 train.steps=1200"
    " model.d_model=128 match.parameters=900k match.count=layers match.tolerance=3%"
)
"""Windows and files of twice the length, 39 MB of text, layers of twice the width."""

STATE = "match.state_bytes=80KiB"
"""Of a recurrence's four layers together; in the large version too."""

HALF = "match.state_length=1 match.state_bytes=41KiB"
"""Of the hybrid after one byte: as much in its two recurrent layers, the rest is one byte of attention's cache."""

DELTA = "gated_delta_net"
MODELS = {
    "attention, rotary": "model=attention",
    "sliding_window": "model=sliding_window",
    "mamba2": f"model=mamba2 {STATE}",
    DELTA: f"model={DELTA} {STATE}",
    f"{DELTA}, passed states": f"model={DELTA} {STATE} train.first_state=passed",
    f"attention and {DELTA}": f"model=hybrid_delta {HALF}",
}
"""Five models of four layers, one of them twice: from the states that other texts have left, too. Attention beside a
recurrence has no positions."""

MARGIN = 0.02
"""Bits per byte: 1 % or so of what models of this size take."""

FROM = 64
"""Bytes of a file after which the plot's height is measured: the first ones take many bits, and nothing follows."""


def arms(names: Sequence[str] = tuple(MODELS)) -> tuple[Arm, ...]:
    return tuple(Arm(name, MODELS[name], {"model": name}) for name in names)


def claims() -> tuple[Claim, ...]:
    def claim(name: str, said: str, left: str, right: str, margin: float = MARGIN) -> Claim:
        return Claim(name, said, ((left, right),), "more", margin)

    return (
        claim("a recurrence outlasts rotary positions", "Over files 32 times as long as the windows in training, the"
              " gated delta rule takes fewer bits than attention with rotary positions (expected before the runs)",
              DELTA, "attention, rotary"),
        claim("so does Mamba-2", "and so does Mamba-2 (expected before the runs)", "mamba2", "attention, rotary"),
        claim("the delta rule above Mamba-2", "The gated delta rule takes fewer bits than Mamba-2 (Yang et al. 2024)",
              DELTA, "mamba2"),
        claim("a state tells more than a window", "The gated delta rule takes fewer bits than windows of 256 bytes in"
              " each of four layers (expected before the runs)", DELTA, "sliding_window"),
        claim("passed states cost nothing", "Trained from states that other texts have left, the gated delta rule"
              " takes no more bits (Buitrago Ruiz and Gu 2025 have it take fewer)",
              f"{DELTA}, passed states", DELTA, -MARGIN),
        claim("passed states help", "and takes fewer", f"{DELTA}, passed states", DELTA),
        claim("a layer of attention helps", "Attention without positions in two of the four layers takes fewer bits"
              " than the gated delta rule in all (Waleffe et al. 2024)", f"attention and {DELTA}", DELTA),
    )  # fmt: skip


class TextLength(TrainedStudy):
    name = "text_length"
    title = "Who predicts text better the more of it has been read?"
    question = (
        "Trained on windows of 1024 bytes of source code, which models predict files of 32,768 bytes well throughout,"
        " and do they predict them better than compressors and n-grams do?"
    )
    history = ("validation_bits_per_byte", "validation_loss")
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(),
            replace(LONG_RUNS, fixed_budget=True),
            claims(),
        ),
        "small": Version(
            "experiment=text_length name=studies/text_length task=stdlib_text task.length=64 task.eval_length=512"
            " task.validation_files=4"
            " task.test_files=4 train.batch_size=4 train.steps=20 train.warmup=2 train.eval_every=20"
            " model.depth=2 model.d_model=32",
            arms(("sliding_window", DELTA)),
            replace(IN_MINUTES, fixed_budget=True),
        ),
        "large": Version(
            LENGTHENED,
            arms(),
            replace(LONG_RUNS, fixed_budget=True),
            claims(),
        ),
    }  # fmt: skip

    def complete(self, version: Version, folder: Path, runs: Path, jobs: int) -> int:
        measure(version, folder)
        return super().complete(version, folder, runs, jobs)

    def read(self, version: Version, folder: Path) -> TextResults:
        return read_results(version, folder, super().read(version, folder))

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}

        def said(name: str) -> str:
            return so_text(answers.get(name))

        return (
            "That over files 32 times as long as the windows in training the gated delta rule takes fewer bits than"
            f" attention with rotary positions is {said('a recurrence outlasts rotary positions')}, and than Mamba-2"
            f" {said('the delta rule above Mamba-2')}; that two layers of attention without positions take fewer beside"
            f" it is {said('a layer of attention helps')}. Differences count from {MARGIN:g} bits per byte on."
            f"{beaten(results)}"
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "position",
                "Bits per byte along the files that are tested, less is better: the mean of the reporting seeds, and"
                " their range as a band. No model was trained beyond the dotted line. Grey: programs on the same bytes;"
                " the n-grams were counted in as much text as a model reads.",
                lambda axes: draw_positions(axes, results),
                size=(9.6, 5.6),
            )
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        bands = bands_of(results.version)
        header = ["", *(f"{left:,} to {right:,}" for left, right in bands), "whole files"]
        rows = [[progress.arm.name, *row] for progress in results.arms.values() if (row := bits_row(progress, bands))]
        rows += [program_row(each, bands) for each in programs(results)]
        beside = [["arm", *(each.label for each in programs(results))]]
        beside += [[progress.arm.name, *(against(progress, each) for each in programs(results))]
                   for progress in results.arms.values()]  # fmt: skip
        return [
            Table("Bits per byte by the bytes of the file: median (and range) of the reporting seeds", [header, *rows]),
            Table("Bits per byte fewer than compressors and n-grams take: mean (95 % interval)", beside,
                  f"In bold: whether it is more than {MARGIN:g}."),
        ]  # fmt: skip


def bands_of(version: Version) -> list[tuple[int, int]]:
    """Stretches of a file for which a table gives means: a training window's length, to eight times that, the rest."""
    length, end = lengths_of(version)
    return [*pairwise([0, *(edge for edge in (length, 8 * length) if edge < end), end])]


def lengths_of(version: Version) -> tuple[int, int]:
    """Bytes of a training window, and of a file that is tested."""
    task = version.fixed["configuration"]["task"]
    return task["length"], task["eval_length"]


def programs(results: Results) -> Sequence[Program]:
    """The programs that read the same files."""
    return results.programs if isinstance(results, TextResults) else ()


def beaten(results: Results) -> str:
    """A sentence on how many arms take fewer bits than every program; empty before an arm is done."""
    rivals, done = programs(results), [progress for progress in results.arms.values() if not lacks(progress)]
    if not rivals or not done:
        return ""
    better = sum(all(_verdict(progress, each)[0].answer == "yes" for each in rivals) for progress in done)
    best = min(rivals, key=lambda each: each.per_file.mean())
    return (
        f" {better} of {len(done)} arms take fewer bits than every compressor and the n-grams, by more than {MARGIN:g};"
        f" the best of these, {best.label}, takes {best.per_file.mean():.3f}."
    )


def against(progress: Progress, program: Program) -> str:
    """How many bits fewer than a program an arm takes, and whether that is more than the margin."""
    decided, text = _verdict(progress, program)
    return f"{text}: {'unresolved' if decided.answer == 'unresolved' else f'**{decided.answer}**'}" if text else ""


def _verdict(progress: Progress, program: Program) -> tuple[Verdict, str]:
    lacking = lacks(progress)
    scores = scores_of(progress, Claim("", "", (), "more", MARGIN))
    if len(scores) < 2:
        return verdict(None, MARGIN, "more", lacking), ""
    found = mean_interval(program.per_file + scores)  # Scores are bits with a minus: of them more is better.
    text = f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return verdict(found, MARGIN, "more", lacking), text


def bits_row(progress: Progress, bands: Sequence[tuple[int, int]]) -> list[str]:
    """The bits of an arm in each band and in whole files; empty before its first run."""
    runs = [run for run in progress.reporting if run.finished]
    curves = [run.record["results"]["curve"] for run in runs]
    values = [[*(between(curve["y"], curve["x_end"], left, right) for left, right in bands), run.result("test")]
              for run, curve in zip(runs, curves, strict=True)]  # fmt: skip
    return [median_text(each) for each in zip(*values, strict=True)]


def program_row(program: Program, bands: Sequence[tuple[int, int]]) -> list[str]:
    """The bits of a program in each band and in whole files."""
    values = [*(between(program.along, program.length, left, right) for left, right in bands), program.per_file.mean()]
    return [program.label, *(f"{value:.3f}" for value in values)]


def draw_positions(panels: Sequence[Axes], results: Results) -> None:
    axes, ends, shown = panels[0], [], []
    for program in programs(results):
        edges = position_bins(program.length)
        x = [float(np.sqrt((low + 1) * high)) for low, high in pairwise(edges)]
        axes.plot(x, program.along, color=QUIET, linewidth=1.0, zorder=1)
        shown.append(program.along[-1])
        ends.append((program.label, QUIET, (x[-1], program.along[-1])))
    trained_to, last = lengths_of(results.version)
    for progress in results.arms.values():
        runs, name = [run for run in progress.reporting if run.finished], progress.arm.name
        if not runs:
            continue
        x = runs[0].record["results"]["curve"]["x"]
        bits = np.array([run.record["results"]["curve"]["y"] for run in runs])
        line = plots.dashed(" and " in name or "passed" in name)
        style = plots.mixer_style(name.partition(",")[0].replace(" and ", " ")) | {"marker": ""}
        plots.draw_band(axes, [*zip(x, bits.T.tolist(), strict=True)], style, **line)
        ends.append((name, style["color"], (x[-1], float(bits.mean(axis=0)[-1]))))
        shown += bits[:, np.array(x) >= FROM].ravel().tolist()
    if shown:
        axes.set_ylim(min(shown) - 0.1, max(shown) + 0.3)
    plots.logarithmic(axes, [2**power for power in range(6, 17, 2)], lambda value: f"{value:,.0f}")
    axes.set_xlim(FROM, last)
    mark_length(axes, trained_to)
    axes.set_xlabel("Position in the file (bytes, logarithmic)")
    axes.set_ylabel("Bits per byte")
    plots.label_lines(axes, ends)
