"""The tables of docs/bench.md, from what ``python -m experiments.bench`` left in docs/results: in cpu, with its
``targets``, and in gpu."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench import quantized, tokens
from experiments.bench.benchmarks import BENCHMARKS, names_on
from experiments.bench.decode import HEADER as HEADER_OF_DECODE
from experiments.bench.decode import cells as decode_cells
from experiments.bench.offload import HEADER as HEADER_OF_OFFLOAD
from experiments.bench.offload import cells as offload_cells
from experiments.bench.sizes import CUDA
from experiments.bench.targets import HEADER, Result
from experiments.util.blocks import table

RESULTS = Path(__file__).parent / "results" / "cpu"
GPU_RESULTS = Path(__file__).parent / "results" / "gpu"


def bench_tables() -> str:
    """A section per benchmark: what it measured, on which machine, and its times by implementation and length."""
    sections = [part for record in _records(RESULTS) for part in _section(record, _cpu(record))]
    return "\n\n".join(sections) or "No measurements are kept yet."


def gpu_tables() -> str:
    """Which benchmarks were measured on a GPU, and a section for each of those."""
    records = _records(GPU_RESULTS)
    measured = {record["benchmark"] for record in records}
    overview = table(
        ("benchmark", "", ""),
        ((name, CUDA.describe(BENCHMARKS[name].title), "measured" if name in measured else "not measured")
         for name in names_on("cuda")),
    )  # fmt: skip
    return "\n\n".join([overview, *(part for record in records for part in _section(record, _gpu(record)))])


def kept_targets() -> tuple[list[Result], dict[str, Any]]:
    """The results of the kept run, and its machine and versions."""
    kept = json.loads((RESULTS / "targets.json").read_text(encoding="utf-8"))
    return [Result(**row) for row in kept.pop("targets")], kept


def target_table() -> str:
    """The project's targets beside what was reached, and on which machine."""
    results, kept = kept_targets()
    machine = kept["hardware"]
    return (
        f"{sum(each.met is True for each in results)} of {len(results)} are met. {machine['cpu']}, {machine['threads']}"
        f" threads, load {machine['load']:.1f} at the end, torch {kept['software']['packages']['torch']}, code"
        f" {str(kept['code']['commit'])[:10]}.\n\n" + table(HEADER, (each.cells for each in results))
    )


def token_table() -> str:
    """A decoded token of each mixer beside reading its weights and state."""
    return _of_tokens("tokens", tokens.HEADER, tokens.Token, left=1)


def quantized_table() -> str:
    """A decoded token by the form of the weights, beside float32."""
    return _of_tokens("quantized", quantized.HEADER, quantized.Token, left=2)


def _of_tokens(name: str, header: tuple[str, ...], kind: type[tokens.Token | quantized.Token], left: int) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8"))
    machine, rows = kept["hardware"], [kind(**row) for row in kept[name]]
    about = (
        f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']:.1f} at the end, torch"
        f" {kept['software']['packages']['torch']}, code {str(kept['code']['commit'])[:10]}; medians of"
        f" {min(row.rounds for row in rows)} turns of {tokens.TOKENS} tokens or more."
    )
    return "\n\n".join([about, table(header, (row.cells for row in rows), align="--:", left=left)])


def _records(folder: Path) -> list[dict[str, Any]]:
    """Those of benchmarks, by the names of their files; other records are not among them."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if "benchmark" in record]


def _cpu(record: dict[str, Any]) -> str:
    machine, ceilings = record["hardware"], record["ceilings"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']:.1f} at the end,"
        f" torch {record['software']['packages']['torch']}; ceilings"
        f" {ceilings['flops'][record['dtype']] / 1e9:.0f} GFLOP/s and {ceilings['bandwidth'] / 1e9:.0f} GB/s."
    )


def _gpu(record: dict[str, Any]) -> str:
    machine, ceilings, packages = record["hardware"], record["ceilings"], record["software"]["packages"]
    return (
        f"{machine['name']}, driver {machine['driver']}, torch {packages['torch']},"
        f" Triton {packages.get('triton', 'not installed')}, commit {str(record['code']['commit'])[:10]}; ceilings"
        f" {ceilings['flops'][record['dtype']] / 1e12:.3g} TFLOP/s and {ceilings['bandwidth'] / 1e9:.0f} GB/s;"
        f" {record['checked'].get('passed', 0)} checks passed before."
    )


def _section(record: dict[str, Any], machine: str) -> Iterator[str]:
    on_a_gpu = record["device"] == "cuda"
    yield f"### {record['benchmark']}, {record['dtype']}{', on a GPU' if on_a_gpu else ''}"
    yield f"{record['title']}. {machine}"
    yield _table(record["rows"], widths=on_a_gpu)
    if record["absent"]:
        yield f"Absent: {'; '.join(f'{name}: {reason}' for name, reason in record['absent'].items())}."
    if record["failed"]:
        yield f"Failed: {'; '.join(_failure(each, on_a_gpu) for each in record['failed'])}."


def _failure(one: dict[str, Any], widths: bool) -> str:
    where = f"width {one['width']}, {one['batch']} x {one['length']}" if widths else f"T = {one['length']}"
    return f"{one['implementation']}, {one['mode']}, {where}: {one['reason']}"


def _table(rows: list[dict[str, Any]], widths: bool) -> str:
    """Milliseconds and, in brackets, the share of the nearer ceiling; a dash is where there is no time."""
    shapes = sorted({(row["length"], row["batch"]) for row in rows})
    columns = [f"{batch} x {length}" if widths else f"T = {length}" for length, batch in shapes]
    header, lines = ["", *(["width"] if widths else []), "implementation", *columns], []
    for mode, width, name in dict.fromkeys((row["mode"], row["width"], row["implementation"]) for row in rows):
        own = [row for row in rows if (row["mode"], row["width"], row["implementation"]) == (mode, width, name)]
        cells = {(row["length"], row["batch"]): row for row in own}
        titles = [mode, *([str(width)] if widths else []), name]
        lines.append([*titles, *(_cell(cells.get(shape)) for shape in shapes)])
    return table(header, lines, align="--:", left=len(header) - len(shapes))


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['median_ms']:.3g} ({row['share']:.0%})"


def offload_tables() -> str:
    """What experts on disk cost: the model, the picture, decoding by policy and number, and the replayed hit rates."""
    path = RESULTS / "offload.json"
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8"))
    model, machine, rows = kept["model"], kept["hardware"], kept["decoded"]
    whole, mega = rows[0], 1e6
    of_expert = next(row["memory_bytes"] / row["places"] for row in rows if row["places"]) / model["layers"]
    about = (
        f"{model['layers']} layers of {model['experts']} experts of {of_expert / mega:.2f} MB, {model['top_k']} a"
        f" token, {model['parameters'] / mega:.0f} million parameters in all. {machine['cpu']}, {machine['threads']}"
        f" threads, torch {kept['software']['packages']['torch']}, code {str(kept['code']['commit'])[:10]}; others"
        f" took {kept['others']:.0%} of the machine. The disk gave {kept['disk_bytes_per_second'] / mega:.0f} MB/s."
        f" With all experts in memory: {whole['tokens_per_second']:.0f} tokens/s."
    )
    picture = "![Hit rates and tokens per second against the experts of each layer in memory](cpu/offload.png)"
    speeds = table(
        HEADER_OF_OFFLOAD,
        (offload_cells(row) for row in rows[1:]),
        align="--:",
        left=3,
    )
    return "\n\n".join([about, picture, "### Decoded", speeds, "### Replayed", _replayed(kept["replayed"])])


def _replayed(rows: list[dict[str, Any]]) -> str:
    """Hit rates by text and policy, a column for each number of experts in memory."""
    places = sorted({row["places"] for row in rows})
    found = {(row["text"], row["policy"], row["places"]): row["hit_rate"] for row in rows}
    names = dict.fromkeys((row["text"], row["policy"]) for row in rows)
    lines = ([*name, *(f"{found[*name, number]:.1%}" for number in places)] for name in names)
    return table(("text", "policy", *map(str, places)), lines, align="--:", left=2)


def decode_tables() -> str:
    """Whole models beside what one would pick instead: the machine, the picture, the rows, and what could not run."""
    path = RESULTS / "decode.json"
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8"))
    machine, packages = kept["hardware"], kept["software"]["packages"]
    measured = [row for row in kept["rows"] if "absent" not in row]
    about = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {packages['torch']},"
        f" code {str(kept['code']['commit'])[:10]}; other processes took"
        f" {kept['others']:.0%} of the machine. Memory was read at {kept['memory_bytes_per_second'] / 1e9:.0f} GB/s."
    )
    picture = "![Tokens per second against context, a panel a model](results/cpu/decode.png)"
    rows = table(HEADER_OF_DECODE, map(decode_cells, measured), align="--:", left=2)
    absent = dict.fromkeys(f"{row['implementation']}: {row['absent']}" for row in kept["rows"] if "absent" in row)
    return "\n\n".join([about, picture, rows, *([f"Absent: {'; '.join(absent)}."] if absent else [])])
