"""The house keeps its order: who imports whom, and one name for one thing."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from seqarch.layers import CHANNEL_MIXERS, MIXERS, Mixer
from seqarch.ops import OPS
from tests.support.house import FILES, FLOORS, ROOMS, arrows, imported, imports, may_import, module_name, room_of
from tests.support.paths import ROOT

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
    "tokenizers": {
        "seqarch/checkpoints/tokenizers.py",
        "experiments/tasks/text_tokens.py",
        "experiments/harness/tokenizer_folder.py",
    },
    "gguf": {"seqarch/pretrained/gguf_file.py"},
    "lm_eval": {"experiments/harness/adapter.py", "experiments/harness/evaluate.py"},
    "safetensors": {"seqarch/pretrained/shards.py", "seqarch/pretrained/tensor_files.py", "seqarch/state/files.py"},
    "transformers": {
        *(f"seqarch/interop/hf/{name}.py" for name in ("__init__", "cache", "config", "model", "routers")),
        *("experiments/bench/baselines.py", "experiments/bench/models.py"),
    },
    "sympy": {"seqarch/decoding/capture.py"},
    "joblib": {"experiments/sweeps/workers.py"},
    "optuna": {"experiments/sweeps/search.py"},
    "wandb": {"experiments/trackers/wandb.py"},
    "torch.utils.tensorboard": {"experiments/trackers/tensorboard.py"},
    "matplotlib": {
        "experiments/util/plot_style.py",
        "experiments/report/figures.py",
        "experiments/report/maps.py",
        "experiments/studies/",
    },
    "ctypes": {f"seqarch/ops/native/{name}.py" for name in ("arguments", "cpu_library", "cuda_library", "huge_pages")},
}
"""Packages that stand at the edge, and the files, or folders, that may import them."""

PACKAGES = "mamba_ssm|causal_conv1d|flash_attn"
BACKEND = re.compile(rf"(recurrent|chunk|parallel|grouped)_(torch|sdpa|mm|cpp|cuda|triton|{PACKAGES})")
NATIVE = "seqarch.ops.native.cpu_library", "seqarch.ops.native.cuda_library"
"""The compiled libraries' loaders."""


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


def test_imports_go_down():
    """To the rooms on floors below, or to those on the same floor that ``FLOORS`` names."""
    wrong = []
    for file in FILES:
        room = room_of(module_name(file))
        others = {other: room_of(other) for other in imported(file)} if room is not None else {}
        wrong += [
            f"{file} in {room.name}: {other} in {to.name}"
            for other, to in others.items()
            if to is not None and not may_import(room, to)
        ]
    assert not wrong


def test_every_folder_is_a_room():
    folders = {module_name(f"{Path(file).parent}/__init__.py") for file in FILES} - {"seqarch"}
    held = {package for room in ROOMS.values() for package in room.holds}
    assert not folders - held, "give it a floor in tests/support/house.py"
    there = folders | {module_name(file) for file in FILES}
    assert not held - there, "held by a room of tests/support/house.py, and gone"
    assert [file for file in FILES if room_of(module_name(file)) is None] == ["seqarch/__init__.py"]


def test_rooms_on_one_floor_import_only_those_before_them():
    for floor in FLOORS.values():
        names = [room.name for room in floor]
        for i, room in enumerate(floor):
            assert set(room.beside) <= set(names[:i]), room.name
            assert set(room.beside) <= arrows()[room.name], f"{room.name} needs none of that any more"


def test_the_runner_has_at_most_six_floors():
    floors = [floor for floor in FLOORS.values() if all(room.holds[0].startswith("experiments") for room in floor)]
    assert len(floors) <= 6
    assert {room.name for floor in floors for room in floor} >= {"commands", "config", "sweeps", "studies"}


def test_no_module_of_the_runner_imports_itself_through_others():
    """``TYPE_CHECKING`` is no way out: what only the types need is a dependency as well."""
    modules = [file for file in FILES if file.startswith("experiments/") and not file.endswith("__init__.py")]
    names, graph = {module_name(file): file for file in modules}, {}
    for name, file in names.items():
        found = set(imported(file)) | {other.rpartition(".")[0] for other in imported(file)}
        graph[name] = (found & names.keys()) - {name}
    assert graph["experiments.train"] > {"experiments.training.run_record"}
    TopologicalSorter(graph).prepare()


def test_the_library_needs_little():
    for file in (file for file in FILES if file.startswith("seqarch/")):
        edge = {package for package, files in EDGES.items() if file in files}
        assert {other.split(".")[0] for other in imported(file)} <= LIBRARY | set(ENGINES) | edge, file


def test_no_operation_imports_another():
    for file in (file for file in FILES if file.startswith("seqarch/ops/") and file != "seqarch/ops/__init__.py"):
        own = operation(module_name(file))
        assert {operation(other) for other in imported(file)} <= {own, None}, file


def test_backends_are_known_to_their_operation_alone():
    foreign = [
        (file, other)
        for file in FILES
        for other in imported(file)
        if is_backend(other) and operation(other) != operation(module_name(file))
    ]
    assert not foreign


def test_engines_stay_in_their_backends():
    for file, other in [(each, other) for each in FILES for other in imported(each)]:
        engine = ENGINES.get(other.split(".")[0])
        shared = Path(file).stem == "kernels" or (engine == "triton" and file.startswith("seqarch/ops/triton/"))
        assert engine is None or Path(file).stem.endswith(f"_{engine}") or shared, (file, other)
        if any(below(other, loader) for loader in NATIVE):
            tellers = ("seqarch/__main__.py", "experiments/util/environment.py")
            own = Path(file).stem.endswith(("_cpp", "_cuda")) or file.startswith("seqarch/ops/native/")
            assert own or file in tellers, (file, other)


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


def test_files_and_functions_are_short():
    for file in FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text.count("\n") <= 400, file
        nodes = ast.walk(ast.parse(text))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        assert not {name: length for name, length in lengths.items() if length > 60}, file


def test_lines_of_cpp_are_no_longer_than_those_of_python():
    for file in (path for top in ("csrc", "tests") for path in (ROOT / top).rglob("*") if path.is_file()):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh"):
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            assert not [number for number, line in lines if len(line) > 120], file


def test_every_file_says_what_it_is():
    silent = [file for file in FILES if not ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))]
    assert not silent
