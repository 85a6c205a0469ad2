"""Compiles csrc/cuda by ``nvcc`` for GPUs that need not be here, and reads what the kernels need of them.

    python -m tests.support.cuda_resources            writes tests/data/cuda_resources.json
    python -m tests.support.cuda_resources --check    compares with it

``nvcc`` is looked for as the build does: in ``CUDA_HOME``, ``CUDA_PATH``, the path and ``/usr/local/cuda``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.paths import ROOT

RECORD = ROOT / "tests" / "data" / "cuda_resources.json"
CAPABILITIES = (80, 90, 120)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

Needs = dict[str, dict[str, dict[str, int]]]
"""By kernel and compute capability: registers and spilled bytes of a thread."""


def find_nvcc() -> str | None:
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    first, second, last = (f"{folder}/bin" if folder else "" for folder in folders)
    return shutil.which("nvcc", path=os.pathsep.join([first, second, os.environ.get("PATH", ""), last]))


def version(nvcc: str) -> str:
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release .*V([\d.]+)", shown).group(1)  # type: ignore[union-attr]


def build_flags() -> list[str]:
    """Those of CMakeLists.txt that change code."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.search(r"set\(CUDA_FLAGS ([^$]*)", text).group(1).split()  # type: ignore[union-attr]


def compile_source(nvcc: str, source: Path, capability: int) -> str:
    """ptxas's report on the source's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"--generate-code=arch=compute_{capability},code=sm_{capability}"
        command = [nvcc, *build_flags(), target, f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas=-v", "-cubin"]
        done = subprocess.run([*command, str(source), "-o", f"{folder}/code"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {capability / 10}:\n{done.stderr}")
    return done.stderr


def read(report: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Each kernel's name, without its arguments and namespaces, and its needs."""
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    names = subprocess.run(["c++filt"], input="\n".join(entry[0] for entry in entries), capture_output=True, text=True)
    for name, (_, stores, loads, registers) in zip(names.stdout.splitlines(), entries, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|seqarch::cuda::(scan::)?|^void ", "", name)
        yield short.partition("(")[0], {"registers": int(registers), "spilled": max(int(stores), int(loads))}


def find_needs(nvcc: str) -> Needs:
    jobs = [(source, capability) for source in SOURCES for capability in CAPABILITIES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: compile_source(nvcc, *job), jobs))
    found: Needs = {}
    for (_, capability), report in zip(jobs, reports, strict=True):
        for name, needs in read(report):
            found.setdefault(name, {})[f"{capability / 10}"] = needs
    return dict(sorted(found.items()))


def differences(nvcc: str) -> list[str]:
    """Where the kernels are not those of the record: exactly, by the nvcc that wrote it; by another, in their names."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    found, same = find_needs(nvcc), record.pop("nvcc") == version(nvcc)
    names = [f"{name}: only {'here' if name in found else 'in the record'}" for name in found.keys() ^ record.keys()]
    changed = [
        f"{name} on {capability}: {needs}, in the record {record[name][capability]}"
        for name in found.keys() & record.keys()
        for capability, needs in found[name].items()
        if same and needs != record[name][capability]
    ]
    return sorted([*names, *changed])


def main() -> None:
    command = argparse.ArgumentParser(
        "python -m tests.support.cuda_resources", description=(__doc__ or "").splitlines()[0]
    )
    command.add_argument("--check", action="store_true", help="compare with the record, and write nothing")
    asked = command.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("there is no nvcc here: install the CUDA toolkit, or its pip packages, and set CUDA_HOME")
    if asked.check:
        wrong = differences(nvcc)
        sys.exit("\n".join(wrong) if wrong else None)
    rows = [f"{json.dumps(name)}: {json.dumps(needs)}" for name, needs in find_needs(nvcc).items()]
    RECORD.write_text("{\n" + ",\n".join([f'"nvcc": "{version(nvcc)}"', *rows]) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
