"""The house keeps its order: who imports whom, and one name for one thing."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from seqarch.layers import CHANNEL_MIXERS, MIXERS, Mixer
from seqarch.ops import OPS
from tests.support.paths import ROOT

FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("seqarch", "experiments") for path in ROOT.glob(f"{top}/**/*.py")
)
TIERS = ("seqarch.ops", "seqarch.layers", "seqarch.models", "seqarch.parallel", "seqarch.interop", "experiments")
LIBRARY = {"seqarch", "torch", "numpy", "einops", *sys.stdlib_module_names}
"""What any file of the library may import."""

ENGINES = {
    "triton": "triton",
    "mamba_ssm": "mamba_ssm",
    "selective_scan_cuda": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "flash_attn": "flash_attn",
}
"""Packages that only backends named for an engine import."""

EDGES = {
    "hydra": {"experiments/run.py", "experiments/config/overrides.py"},
    "omegaconf": {"experiments/run.py", "experiments/config/overrides.py"},
    "joblib": {"experiments/sweeps/workers.py"},
    "optuna": {"experiments/search.py"},
    "wandb": {"experiments/trackers/__init__.py"},
    "torch.utils.tensorboard": {"experiments/trackers/__init__.py"},
    "matplotlib": {"experiments/util/plot_style.py", "experiments/report/figures.py", "experiments/studies/"},
    "ctypes": {f"seqarch/ops/native/{name}.py" for name in ("cpu_library", "cuda_library", "huge_pages")},
}
"""Packages that stand at the edge, and the files, or folders, that may import them."""

PACKAGES = "mamba_ssm|causal_conv1d|flash_attn"
BACKEND = re.compile(rf"(recurrent|chunk|parallel|grouped)_(torch|sdpa|mm|cpp|cuda|triton|{PACKAGES})")
NATIVE = "seqarch.ops.native.cpu_library", "seqarch.ops.native.cuda_library"
"""The compiled libraries' loaders."""


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str, package: str) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imported(file: str) -> list[str]:
    name = module_name(file)
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
    return list(imports((ROOT / file).read_text(encoding="utf-8"), package))


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def operation(name: str) -> str | None:
    """The operation in whose folder a module lies."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["seqarch", "ops"] and len(parts) > 2 and parts[2] in OPS else None


@cache
def is_backend(name: str) -> bool:
    """Whether a name is a backend's module, or something in it."""
    return any(below(name, f"seqarch.ops.{op.name}.{backend}") for op in OPS.values() for backend in op.backends)


def test_imports_are_read_in_every_form():
    lines = (
        "import a.b as c",
        "from d import e, f",
        "from . import g",
        "from .h import i",
        "def l():",
        "    from ..j import k",
    )
    source = "\n".join(lines)
    assert sorted(imports(source, "p.q")) == ["a.b", "d.e", "d.f", "p.j.k", "p.q.g", "p.q.h.i"]


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    name = module_name(file)
    own = next((i for i, tier in enumerate(TIERS) if below(name, tier)), len(TIERS))
    later = [other for other in imported(file) for tier in TIERS[own + 1 :] if below(other, tier)]
    assert not later
    if own < TIERS.index("experiments"):
        assert {other.split(".")[0] for other in imported(file)} <= LIBRARY | set(ENGINES)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("seqarch/ops/")])
def test_no_operation_imports_another(file):
    if file != "seqarch/ops/__init__.py":
        own = operation(module_name(file))
        assert {operation(other) for other in imported(file)} <= {own, None}


@pytest.mark.parametrize("file", FILES)
def test_backends_are_known_to_their_operation_alone(file):
    foreign = [
        other for other in imported(file) if is_backend(other) and operation(other) != operation(module_name(file))
    ]
    assert not foreign


@pytest.mark.parametrize("file", FILES)
def test_engines_stay_in_their_backends(file):
    for other in imported(file):
        engine = ENGINES.get(other.split(".")[0])
        shared = Path(file).stem == "kernels" or (engine == "triton" and file.startswith("seqarch/ops/triton/"))
        assert engine is None or Path(file).stem.endswith(f"_{engine}") or shared, other
        if any(below(other, loader) for loader in NATIVE):
            tellers = ("seqarch/__main__.py", "experiments/util/environment.py")
            own = Path(file).stem.endswith(("_cpp", "_cuda")) or file.startswith("seqarch/ops/native/")
            assert own or file in tellers, other


@pytest.mark.parametrize("package", EDGES)
def test_what_stands_at_the_edge_stays_there(package):
    folders = tuple(place for place in EDGES[package] if place.endswith("/"))
    files = {file for file in FILES if any(below(other, package) for other in imported(file))}
    assert {file for file in files if not file.startswith(folders)} == EDGES[package] - set(folders)


@pytest.mark.parametrize("name", OPS)
def test_an_operations_folder_holds_what_it_names(name):
    op, folder = OPS[name], ROOT / "seqarch" / "ops" / name
    assert op.name == name
    assert op.reference in op.order
    backends = {path.stem for path in folder.glob("*.py") if BACKEND.fullmatch(path.stem)}
    assert backends == set(op.backends)
    assert len(set(op.order)) == len(op.order)
    assert set(op.step_order) <= set(op.order)


def test_every_folder_of_an_operation_is_registered():
    folders = {path.parent.name for path in (ROOT / "seqarch" / "ops").glob("*/__init__.py")}
    assert folders - {"chunked", "dispatch", "native", "triton"} == set(OPS)


@pytest.mark.parametrize("name", [*MIXERS, *CHANNEL_MIXERS])
def test_a_layer_lives_in_the_file_of_its_name(name):
    """Or in that of the mixer which it narrows; the small channel mixers share a file."""
    layer = MIXERS[name] if name in MIXERS else CHANNEL_MIXERS[name]
    file = layer.__module__.rpartition(".")[2]
    wider = [other for other, kind in MIXERS.items() if kind is not layer and issubclass(layer, kind)]
    shared = [] if issubclass(layer, Mixer) else ["mlp"]
    assert file in (name, *wider, *shared)
    assert layer.Config.__name__ == f"{layer.__name__}Config"
    assert layer.__name__.lower() == name.replace("_", "") or name == "moe"


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_can_be_chosen_by_its_name(name):
    lines = (ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert {f"name: {name}", f"pattern: {name}"} <= set(lines)


@pytest.mark.parametrize("group", ["task", "tracker"])
def test_tasks_and_trackers_can_be_chosen_by_their_names(group):
    registry = {"task": TASKS, "tracker": TRACKERS}[group]
    assert {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} == set(registry)


def test_tasks_live_in_the_files_of_their_names():
    for name, task in TASKS.items():
        assert task.name == name == task.__module__.rpartition(".")[2]


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= 60}
    assert not long


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
