"""The command ``experiments.runs``, in this process."""

from __future__ import annotations

import pytest

from experiments.runs import __main__ as command


def runs_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Its exit code, standard output and standard error."""
    monkeypatch.setattr("sys.argv", ["runs", *map(str, arguments)])
    code = command.main()
    return code, *capsys.readouterr()
