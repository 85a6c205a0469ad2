"""A page for each mixer, channel mixer and operation, from what docs.tables and the docstrings already say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.costs import WIDTH, costs
from docs.docstrings import markdown, module_docstring, source
from docs.site.notation import latex
from docs.tables import ROOT, Layer, layers, op_page, operations, options
from experiments.util.blocks import table
from seqarch.layers import CHANNEL_MIXERS, FAMILIES, MIXERS
from seqarch.ops import OPS

_SPAN = re.compile(r"`([^`]+)`")
_MATH = re.compile(r"```math\n.*?\n```", re.DOTALL)
_EQUATION = re.compile(r"\s(?:=|<=|>=)\s")


def equations(docstring: str) -> list[str]:
    """The equations of a docstring's first paragraph, as LaTeX."""
    first = inspect.cleandoc(docstring).split("\n\n")[0]
    spans = _SPAN.findall(markdown(first))
    return [found for span in spans if _EQUATION.search(span) and (found := latex(span)) is not None]


def rendered(text: str) -> str:
    """Markdown whose code is equations where it can be read as such."""

    def span(match: re.Match[str]) -> str:
        found = latex(match[1]) if _EQUATION.search(match[1]) else None
        return match[0] if found is None else f"{{math}}`{found}`"

    return _SPAN.sub(span, text)


def layer_page(name: str, matrix: str = "", arms: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a mixer or channel mixer; links as from docs/mixers.md.

    Args:
        matrix: what its picture, ``matrices/NAME.png`` beside the page, shows; none where it is empty.
        arms: of the studies, what they have measured of models of this mixer alone.
    """
    layer = layers()[name]
    written = equations(layer.__doc__ or "")
    parts = [
        f"# {name}",
        f"*{_kind(name)}.* {source(layer.__doc__ or '', name)}.",
        *(f"```math\n{equation}\n```" for equation in written),
        rendered(markdown(inspect.cleandoc(layer.__doc__ or ""))),
        *_picture(name, matrix),
        *_costs(name),
        *_measured(arms),
        *_operations(name),
        "## Options",
        options(layer),
        "## Use",
        _use(name, layer),
    ]
    return "\n\n".join(parts) + "\n"


def _kind(name: str) -> str:
    if name in CHANNEL_MIXERS:
        return "Channel mixer"
    family = next((family for family, members in FAMILIES.items() if name in members), "other")
    return f"Mixer: {family}"


def _picture(name: str, matrix: str) -> Iterator[str]:
    if matrix:
        yield "## Its matrix"
        yield (
            f"```{{figure}} matrices/{name}.png\n:alt: The T x T matrix of {name}, T = 48\n:class: matrix\n\n"
            f"Row t is the output of token t, column s token s: {matrix}, each row divided by its largest, of a module"
            " that was not trained, on an input whose second half repeats its first.\n```"
        )


def _costs(name: str) -> Iterator[str]:
    if name in MIXERS:
        yield "## What it costs"
        yield (
            f"At `d_model` {WIDTH:,} by default options; FLOPs of a token in training, forward over T tokens, and"
            " of one more token after T; bytes of the state in float32, one sequence, D the width. Once T is beyond"
            " every window. The [chooser](site/pages/chooser.md) has it at other widths and lengths."
        )
        yield table(("parameters", "FLOPs, training", "FLOPs, decoding", "bytes of state"), [costs(name)])


def _measured(arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if arms:
        yield "## What it recalls"
        rows = []
        for arm in arms:
            study = f"[{arm['study']}](results/{arm['page']}.md)"
            score = f"{arm['mean']:.3f} ({arm['low']:.3f} to {arm['high']:.3f})"
            sizes = f"{arm['layers']} layers of width {arm['width']}, {arm['length']} tokens"
            rows.append((study, arm["arm"], sizes, arm["metric"], score, str(len(arm["seeds"]))))
        yield table(("study", "arm", "models", "measure", "mean (95 % interval)", "seeds"), rows)


def _operations(name: str) -> Iterator[str]:
    used = operations(name)
    yield "## What computes it"
    if not used:
        yield "Torch alone."
    for op in used:
        backends = ", ".join(f"`{backend}`" for backend in OPS[op].backends)
        yield f"[`{op}`](ops/{op}.md), by default options, on {backends}."
        module = markdown(module_docstring(ROOT / "seqarch" / "ops" / op / "__init__.py"))
        yield from _MATH.findall(module)[:1]
        if measured(op):
            yield f"[Measured times](ops/{op}.md#measured) of its backends."


def _use(name: str, layer: Layer) -> str:
    build = "build_mixer" if name in MIXERS else "build_channel_mixer"
    call = "y, state = layer(torch.randn(1, 16, 64))" if name in MIXERS else "y = layer(torch.randn(1, 16, 64))"
    return (
        f"In a pattern by its name, `{name}`; alone as `seqarch.{layer.__name__}`:\n\n```python\nimport torch\n"
        f'from seqarch import {build}\n\nlayer = {build}("{name}", d_model=64)\n{call}\n```'
    )


def measured(op: str) -> list[str]:
    """The pictures of an operation's measured times, as paths of the repository."""
    found = sorted((ROOT / "docs" / "results" / "cpu").glob(f"{op}*.png"))
    if op == "attention":
        found = [ROOT / "docs" / "results" / "cpu" / "window_attention.png"]
    return [path.relative_to(ROOT).as_posix() for path in found if path.exists()]


def operation_page(name: str) -> str:
    """The page of docs/ops, with what was measured; links as from there."""
    text = op_page(name)
    if pictures := measured(name):
        said = "## Measured\n\nOn two cores; [the bench](../bench.md) says how and beside what."
        shown = [f"![Measured times: {Path(path).stem}](../{path.removeprefix('docs/')})" for path in pictures]
        text += "\n" + "\n\n".join([said, *shown])
    return text + "\n"
