"""What installing gives: the package, its compiled library or the reason for its absence, and the page of versions."""

from __future__ import annotations

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


def install(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Build the wheel, unpack it into ``folder/site``; the wheel's name and the files in it."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    options = ["--quiet", "--wheel-dir", str(folder), f"--config-settings=build-dir={folder / 'build'}"]
    done = subprocess.run([*command, *options], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return wheel.name, archive.namelist()


def run_page(folder: Path, **environment: str) -> str:
    """The page as the package in ``folder/site`` prints it; -S keeps this checkout's own install out of the way."""
    program = "import sys; sys.path += sys.argv[1:]; from seqarch.__main__ import main; main()"
    paths = [str(folder / "site"), str(Path(torch.__file__).parents[1])]
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
    assert wheel == f"seqarch-{seqarch.__version__}-py3-none-any.whl"
    assert "seqarch/ops/dispatch/op.py" in files
    assert not [name for name in files if name.endswith(".so")]
    shown = run_page(tmp_path)
    assert re.search(r"causal_conv1d +parallel_cpp +the compiled library is not installed: .*C\+\+ compiler", shown)
    assert re.search(r"causal_conv1d +parallel_torch \(reference\) +available", shown)


@pytest.mark.slow
def test_with_a_compiler_one_wheel_serves_every_python(tmp_path):
    """An nvcc that fails costs the CUDA kernels alone."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then echo compute_90; else exit 1; fi\n')
    nvcc.chmod(0o755)
    wheel, files = install(tmp_path, CUDA_HOME=str(nvcc.parents[1]))
    compiled = [name for name in files if name.startswith("seqarch/lib/")]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or subprocess.run([compiler, "--version"], capture_output=True).returncode:
        assert not compiled
        return
    assert any("_baseline." in name for name in compiled), "a compiler is here, but csrc did not compile"
    assert "seqarch/lib/seqarch.h" in compiled, "the structures of arguments are read from it"
    assert not any("_cuda." in name for name in compiled)
    assert re.fullmatch(rf"seqarch-{seqarch.__version__}-py3-none-(?!any)\w+\.whl", wheel)
    shown = run_page(tmp_path, SEQARCH_ISA="baseline")
    assert re.search(r"library +baseline of ", shown)
    assert re.search(r"selective_scan +chunk_cuda +the CUDA library is not installed: .*nvcc", shown)


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
