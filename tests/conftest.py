"""Set-up of every test: one thread, fixed seeds, and uninitialised memory full of NaN."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

from seqarch.ops.triton import availability

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic, and torch refuses

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with (
        availability.interpreted()
    ):  # Triton decides as it is loaded, and torch may load it before a test of its kernels does
        import triton.language as _  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """The tests of operations run without pytest-timeout, whose setting and marker pytest would not know then."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take; pytest-timeout is not here to stop it")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): as the setting, for one test")


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    """Seed torch, and fill what ``torch.empty`` returns with NaN, so that a value never written shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads of many small calls on shared cores wait for one another longer than they work
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


REGISTRIES = (
    ("seqarch.layers", "MIXERS"),
    ("seqarch.layers", "CHANNEL_MIXERS"),
    ("experiments.tasks", "TASKS"),
    ("experiments.trackers", "TRACKERS"),
    ("experiments.config.plugins", "_packages"),
)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it: other tests go through whatever is there."""
    there = [vars(sys.modules[module])[name] for module, name in REGISTRIES if module in sys.modules]
    before = [dict(registry) for registry in there]
    yield
    for registry, content in zip(there, before, strict=True):
        if registry != content:
            registry.clear()
            registry.update(content)
