"""The generated parts of the documentation: ``python -m docs.tables`` writes them, a test fails where they are stale.

README.md, docs/architecture.md, docs/bench.md, docs/choosing.md, docs/matching.md, docs/mixers.md, docs/tasks.md and
the pages of docs/results hold blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the pages of docs/ops/
and the pictures of the rooms are generated whole. All of it comes from the registries, the docstrings, the imports and
the measurements kept in docs/results, so it is the same on every machine, whatever backends run there.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from docs.benchmarks import (
    bench_tables,
    decode_tables,
    gpu_tables,
    offload_tables,
    quantized_table,
    target_table,
    token_table,
)
from docs.choosing import answer, quality_table, speed_table, state_table
from docs.costs import costs
from docs.docstrings import (
    cell,
    first_sentence,
    markdown,
    module_docstring,
    option_rows,
    source,
)
from docs.matching import PARAMETERS, matching_table
from docs.rooms import picture, room_table
from docs.tasks import task_sections, task_table
from experiments.studies.coordinate_check_page import coordinate_check_table
from experiments.studies.page import PAGES, blocks
from experiments.studies.small_states_page import small_states_table
from experiments.util.blocks import fill, table
from experiments.util.docstrings import entries, split_sections
from seqarch import ops
from seqarch.layers import CHANNEL_MIXERS, FAMILIES, MIXERS, ChannelMixer, Mixer, build_channel_mixer, build_mixer
from seqarch.ops import OPS, Op
from seqarch.testing import LAWS

ROOT = Path(__file__).resolve().parents[1]
MIXERS_PAGE = Path("docs/mixers.md")
Layer = type[Mixer] | type[ChannelMixer]


def layers() -> dict[str, Layer]:
    return {**MIXERS, **CHANNEL_MIXERS}


@cache
def operations(name: str) -> list[str]:
    """The operations that a layer with its default options calls in training, as recorded on a few tokens.

    On more than 2048 of them where attention is sparse: below, one of these mixers chooses all tokens.
    """
    build = build_mixer if name in MIXERS else build_channel_mixer
    layer = build(name, d_model=32)
    with ops.record_backends() as used:
        layer(torch.zeros(1, 2100 if name in FAMILIES["sparse attention"] else 4, 32))
    return sorted(used)


def op_link(name: str, folder: str) -> str:
    return f"[`{name}`]({folder}/{name}.md)"


def layer_table(registry: dict[str, Any], folder: str) -> str:
    rows = []
    for name, layer in registry.items():
        used = ", ".join(op_link(op, f"{folder}/ops") for op in operations(name)) or "torch alone"
        rows.append((f"[`{name}`]({folder}/mixers.md#{name})", cell(source(layer.__doc__, name)), used))
    return table(("name", "source", "operations"), rows)


def families() -> dict[str, tuple[str, ...]]:
    """The mixers by family; those that none lists come last."""
    listed = set(chain(*FAMILIES.values()))
    rest = tuple(name for name in MIXERS if name not in listed)
    return FAMILIES | ({"other": rest} if rest else {})


def family_table() -> str:
    rows = [
        (family, ", ".join(f"[`{name}`](docs/mixers.md#{name})" for name in members))
        for family, members in families().items()
    ]
    return table(("family", "mixers"), rows)


def cost_table() -> str:
    """Every mixer: its paper, what it costs, what computes it, and how many of the laws it passes."""
    rows, laws = [], f"{len(LAWS) + 1} of {len(LAWS) + 1}"  # the suite tries all laws on all mixers: none may fail
    for name in chain(*families().values()):
        used = operations(name)
        backends = dict.fromkeys(backend for op in used for backend in OPS[op].backends)
        rows.append(
            (
                f"[`{name}`](#{name})",
                cell(source(MIXERS[name].__doc__ or "", name)),
                *costs(name),
                ", ".join(f"`{backend}`" for backend in backends) or "torch alone",
                laws,
            )
        )
    return table(
        ("mixer", "paper", "parameters", "training", "decoding", "state", "backends", "laws"),
        rows,
    )


def channel_table() -> str:
    return layer_table(CHANNEL_MIXERS, "docs")


def backend_order(op: Op) -> list[str]:
    """The names, in the order in which ``"auto"`` tries them for more than one token; what is not tried is marked."""
    marks = {op.reference: " (reference)"} | dict.fromkeys(op.opt_in, " (by name)")
    return [f"`{name}`{marks.get(name, '')}" for name in op.backends]


def operation_table() -> str:
    users = {name: operations(name) for name in layers()}
    rows = []
    for name, op in OPS.items():
        on_it = ", ".join(f"`{layer}`" for layer, used in users.items() if name in used)
        rows.append((op_link(name, "docs/ops"), ", ".join(backend_order(op)), on_it))
    return table(("operation", "backends, in the order in which `auto` tries them", "layers on it"), rows)


def options(layer: Layer) -> str:
    """The options of a layer's config but for its width, with their defaults and what its docstrings say of them."""
    return table(("option", "default", "meaning"), option_rows(layer.Config, but="d_model"))


def layer_sections() -> str:
    parts = []
    for title, registry in (("Mixers", MIXERS), ("Channel mixers", CHANNEL_MIXERS)):
        parts.append(f"## {title}")
        for name, layer in registry.items():
            prose = markdown(inspect.cleandoc(layer.__doc__))
            used = ", ".join(op_link(op, "ops") for op in operations(name)) or "none, torch alone"
            parts += [f"### {name}", prose, f"Operations, with the default options: {used}.", options(layer)]
    return "\n\n".join(parts)


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    Path("README.md"): {
        "answer": answer,
        "families": family_table,
        "channel mixers": channel_table,
        "operations": operation_table,
    },
    Path("docs/architecture.md"): {"rooms": room_table},
    Path("docs/bench.md"): {
        "targets": target_table,
        "decode": decode_tables,
        "tokens": token_table,
        "quantized": quantized_table,
        "bench": bench_tables,
        "gpu bench": gpu_tables,
    },
    Path("docs/choosing.md"): {"states": state_table, "speed": speed_table, "quality": quality_table},
    Path("docs/results/offload.md"): {"offload": offload_tables},
    Path("docs/matching.md"): {f"matching {width}": partial(matching_table, width) for width in PARAMETERS},
    Path("docs/tasks.md"): {"overview": task_table, "tasks": task_sections},
    MIXERS_PAGE: {"costs": cost_table, "layers": layer_sections},
    **{page: blocks(name) for name, page in PAGES.items()},
    Path("docs/results/small_states.md"): {
        "small states": partial(small_states_table, ROOT / "docs/results/small_states")
    },
}
BLOCKS[PAGES["mup"]]["coordinate check"] = partial(coordinate_check_table, ROOT / "docs/results/mup/check")


def signature(name: str) -> str:
    """The public function's signature without its annotations, which the table of arguments says better."""
    call = inspect.signature(getattr(ops, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in call.parameters.values()]
    shown = call.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    return f"ops.{name}{shown}".replace("'", '"')


def backend_list(op: Op) -> str:
    folder = ROOT / "seqarch" / "ops" / op.name
    rows = []
    for name, shown in zip(op.backends, backend_order(op), strict=True):
        rows.append((shown, cell(first_sentence(module_docstring(folder / f"{name}.py")))))
    text = table(("backend", "what it does"), rows)
    if op.opt_in:
        text += "\n\nWhat is marked so runs only where its name is given."
    if op.step_order:
        text += f"\n\nCalls of one token try {', '.join(f'`{name}`' for name in op.step_order)} in this order."
    return text


def op_page(name: str) -> str:
    """A page of docs/ops/, from the docstrings of the operation's folder."""
    op = OPS[name]
    module = module_docstring(ROOT / "seqarch" / "ops" / name / "__init__.py")
    _, sections = split_sections(getattr(ops, name).__doc__)
    arguments = table(("argument", "meaning"), ((f"`{k}`", cell(v)) for k, v in entries(sections["Args"]).items()))
    errors = "\n".join(f"- `{k}`: {cell(v)}" for k, v in entries(sections["Raises"]).items())
    users = [layer for layer in layers() if name in operations(layer)]
    links = ", ".join(f"[`{layer}`](../mixers.md#{layer})" for layer in users)
    return "\n\n".join(
        (
            f"<!-- Generated by `python -m docs.tables` from seqarch/ops/{name}. Change the docstrings there. -->",
            f"# {name}",
            markdown(module).strip(),
            f"## Call\n\n```python\n{signature(name)}\n```",
            arguments,
            f"Returns {cell(sections['Returns'])}",
            f"Raises\n\n{errors}",
            f"## Backends\n\nIn the order in which `auto` tries them:\n\n{backend_list(op)}",
            f"## Layers on it\n\nWith their default options: {links}.\n",
        )
    )


PICTURES = {Path(f"docs/images/rooms-{top}.svg"): top for top in ("seqarch", "experiments")}


PAGES_WITH_PARTS = (*BLOCKS, *PICTURES, *(Path("docs/ops") / f"{name}.md" for name in OPS))
"""Of the repository, by their paths below it."""


def page(path: Path) -> str:
    """A page with generated parts as it should be."""
    if path in BLOCKS:
        return fill((ROOT / path).read_text(encoding="utf-8"), BLOCKS[path])
    return picture(PICTURES[path]) if path in PICTURES else op_page(path.stem)


def main() -> None:
    for path, text in {path: page(path) for path in PAGES_WITH_PARTS}.items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    argparse.ArgumentParser("python -m docs.tables", description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
