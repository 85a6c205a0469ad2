"""Which programs of decoded tokens ran, and on which instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from seqarch.decoding.program import Program
from seqarch.ops.native import cpu_library
from tests.support.one_token import Runs


@pytest.fixture
def library() -> None:
    """The test is of the compiled library itself, and skipped where there is none."""
    if (reason := cpu_library.unavailable()) is not None:
        pytest.skip(reason)


@pytest.fixture
def runs(library: None, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs, run = Runs(), Program.run

    def counted(*arguments: object) -> object:
        runs.count += 1
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Program, "run", counted)
    return runs


@pytest.fixture(params=cpu_library.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with cpu_library.use_isa(request.param):
        yield
