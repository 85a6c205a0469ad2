"""What installing gives: the package, its compiled library or the reason for its absence, and the page of versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import seqarch
from seqarch import __main__ as page
from seqarch import ops
from seqarch.ops.native import cuda_library
from tests.support.cuda_resources import find_nvcc
from tests.support.paths import ROOT
from tests.support.runs import TINY

OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]
LIBRARIES = Path(torch.__file__).parents[1]


def pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def install(folder: Path, *settings: str, **environment: str) -> tuple[Path, list[str]]:
    """Build the wheel, unpack it into ``folder/site``; the wheel and the files in it."""
    given = [f"--config-settings={each}" for each in (f"build-dir={folder / 'build'}", *settings)]
    pip("wheel", ROOT, *OFFLINE, "--quiet", "--wheel-dir", folder, *given, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return wheel, archive.namelist()


def tool(path: Path, script: str) -> Path:
    """A program in place of a compiler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, list[str], Path]:
    """The wheel of this machine, its files, and a folder with both; CUDA kernels were asked for, and nvcc failed."""
    folder = tmp_path_factory.mktemp("compiled")
    script = 'if [ "$1" = --list-gpu-arch ]; then echo compute_90; else exit 1; fi'
    nvcc = tool(folder / "cuda" / "bin" / "nvcc", script)
    wheel, files = install(folder, "cmake.define.SEQARCH_CUDA=ON", CUDA_HOME=str(nvcc.parents[1]))
    return wheel, files, folder


def run_page(folder: Path, **environment: str) -> str:
    """The page as the package in ``folder/site`` prints it; -S keeps this checkout's own install out of the way."""
    program = "import sys; sys.path += sys.argv[1:]; from seqarch.__main__ import main; main()"
    paths = [str(folder / "site"), str(LIBRARIES)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *paths],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_installing_without_a_compiler_gives_the_package_alone(tmp_path):
    wheel, files = install(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert wheel.name == f"seqarch-{seqarch.__version__}-py3-none-any.whl"
    assert {"seqarch/ops/dispatch/op.py", "experiments/report/explorer_page/page.html"} <= set(files)
    assert not [name for name in files if name.endswith(".so")]
    shown = run_page(tmp_path)
    assert re.search(r"causal_conv1d +parallel_cpp +the compiled library is not installed: .*C\+\+ compiler", shown)
    assert re.search(r"causal_conv1d +parallel_torch \(reference\) +available", shown)


@pytest.mark.slow
def test_asking_what_would_be_installed_compiles_nothing(tmp_path):
    """Nor does a build for CPUs ask nvcc anything."""
    called = tmp_path / "called"
    compilers = {name: str(tool(tmp_path / name, f"echo {name} >> {called}; exit 1")) for name in ("CC", "CXX")}
    nvcc = tool(tmp_path / "cuda" / "bin" / "nvcc", f"echo nvcc >> {called}; exit 1")
    pip("install", "--dry-run", *OFFLINE, "--ignore-installed", ROOT, **compilers, CUDA_HOME=str(nvcc.parents[1]))
    pip("download", *OFFLINE, "--dest", tmp_path / "downloads", ROOT, **compilers, CUDA_HOME=str(nvcc.parents[1]))
    assert not called.exists()
    environment = os.environ | {"CUDA_HOME": str(nvcc.parents[1])}
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path / "build"], check=True, capture_output=True, env=environment)
    assert not called.exists()


COMPILES = pytest.mark.timeout(1800)
"""Two minutes of processor time go into the kernels for three instruction sets."""


@COMPILES
@pytest.mark.slow
def test_with_a_compiler_one_wheel_serves_every_python(compiled):
    """An nvcc that fails costs the CUDA kernels alone."""
    wheel, files, folder = compiled
    libraries = [name for name in files if name.startswith("seqarch/lib/")]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or subprocess.run([compiler, "--version"], capture_output=True).returncode:
        assert not libraries
        return
    assert any("_baseline." in name for name in libraries), "a compiler is here, but csrc did not compile"
    assert "seqarch/lib/seqarch.h" in libraries, "the structures of arguments are read from it"
    assert not any("_cuda." in name for name in libraries)
    assert re.fullmatch(rf"seqarch-{seqarch.__version__}-py3-none-(?!any)\w+\.whl", wheel.name)
    shown = run_page(folder, SEQARCH_ISA="baseline")
    assert re.search(r"library +baseline of ", shown)
    assert re.search(r"selective_scan +chunk_cuda +the CUDA library is not installed: .*nvcc", shown)


@COMPILES
@pytest.mark.slow
def test_a_wheel_holds_the_library_the_runner_and_its_configurations(compiled):
    """And no tests, pages or sources of kernels."""
    _, files, folder = compiled
    info = f"seqarch-{seqarch.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"seqarch", "experiments", info}
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in files if name.endswith(".yaml")} == {f"experiments/{name}" for name in configs}
    sources = {path.relative_to(ROOT).as_posix() for top in ("seqarch", "experiments")
               for path in (ROOT / top).rglob("*.py")}  # fmt: skip
    assert {name for name in files if name.endswith(".py")} == sources
    assert f"{info}/licenses/LICENSE" in files
    points = (folder / "site" / info / "entry_points.txt").read_text().split()
    assert points == ["[console_scripts]", "seqarch", "=", "experiments.__main__:main"]


@pytest.fixture
def installed(compiled, tmp_path) -> Path:
    """The programs of a fresh virtual environment with the wheel; it sees the libraries here, and no checkout."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{LIBRARIES}\n")
    pip("--python", environment / "bin" / "python", "install", *OFFLINE, "--no-warn-script-location", compiled[0])
    return environment / "bin"


@COMPILES
@pytest.mark.slow
def test_the_installed_command_trains_and_reports_in_an_empty_folder(installed, tmp_path):
    """Whatever lies in it: a package of the runner's name does not take its place, and modules there are found."""
    place = tmp_path / "place"
    (place / "experiments").mkdir(parents=True)
    (place / "experiments" / "__init__.py").write_text("raise SystemExit('this is not the runner')\n")
    (place / "my_module.py").write_text("")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # The virtual environment is in somebody's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SEQARCH"))}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "cwd": place, "env": environment | {"OMP_NUM_THREADS": "1"}}
        return subprocess.run([installed / "seqarch", *arguments], **options)

    assert command("--version").stdout == f"seqarch {seqarch.__version__}\n"
    sweep = ["run", "-m", *TINY, "train.steps=2", "seed=0,1", "imports=[my_module]", "launcher=joblib"]
    trained = command(*sweep)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "2 runs: 2 finished" in trained.stdout
    (first, _) = sorted(place.glob("runs/mqar/attention-*-seed*/run.json"))
    record = json.loads(first.read_text())
    assert record["command"].startswith("seqarch run -m ")
    code = record["code"]
    assert (code["commit"], code["dirty"], code["version"]) == (None, None, seqarch.__version__)
    assert len(code["sources_sha256"]) == 64
    reported = command("report", "runs/mqar")
    assert reported.returncode == 0, reported.stdout + reported.stderr
    assert f"code version {seqarch.__version__}" in (place / "runs" / "mqar" / "report" / "index.md").read_text()
    listed = command("runs", "list")
    assert (listed.returncode, "2 runs: 2 finished" in listed.stdout) == (0, True)
    refused = command("run", "train.stepz=2")
    assert (refused.returncode, "Did you mean 'steps'?" in refused.stdout + refused.stderr) == (1, True)
    assert command("report", "nowhere").returncode == 1
    no_checkout = command("study", "initialisation")
    assert (no_checkout.returncode, "of a checkout of seqarch" in no_checkout.stderr) == (1, True)
    made = {path.name for path in place.iterdir()} - {"experiments", "my_module.py", "__pycache__"}
    assert made == {"runs"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_where_nvcc_is_the_cuda_library_is_built(tmp_path):
    """By the build itself, for one generation of GPUs; it loads without a GPU."""
    if find_nvcc() is None:
        return
    options = ["-DSEQARCH_CUDA_ARCHITECTURES=90", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "--target", "seqarch_cuda", "-j2"], check=True)
    shutil.copy(ROOT / "csrc" / "include" / "seqarch.h", tmp_path)  # as it is installed, beside the library
    library = cuda_library.open_library(tmp_path / "libseqarch_cuda.so")
    assert library.seqarch_cuda_error(cuda_library.FAILED + 1) == b"invalid argument"


def test_the_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{seqarch.__version__}"' in text


def test_the_page_names_every_backend_with_available_or_a_reason(capsys):
    page.main()
    lines = capsys.readouterr().out.splitlines()
    for name, op in ops.OPS.items():
        for backend in op.backends.values():
            (line,) = [line for line in lines if re.match(rf"  {name} +{backend.name}\b", line)]
            assert line.endswith(backend.unavailable() or "available")
            assert (" (reference)" in line) == (backend.name == op.reference)


def test_the_page_tells_what_is_absent(capsys, monkeypatch):
    monkeypatch.setattr(page.cpu_library, "_reason", "it was never built")
    page.main()
    shown = capsys.readouterr().out
    assert re.search(r"library +absent: it was never built", shown)
    assert re.search(r"causal_conv1d +parallel_cpp +it was never built", shown)
    assert page.version("no-such-package") == "not installed"


def test_importing_seqarch_imports_nothing_optional():
    optional = {"triton", "hydra", "wandb", "matplotlib", "polars", "rich", "mamba_ssm", "causal_conv1d", "flash_attn"}
    imports = "import sys, seqarch.ops, seqarch.layers, seqarch.models"
    program = f"{imports}; sys.exit(', '.join({optional} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
