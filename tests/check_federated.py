"""Federated training by Flower, in the environment that ``make federated-check`` makes: what it averages and sends."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "federated"
PYTHON = ROOT / "build" / "federated" / "bin" / "python"
ROUND = """
import torch
from federation import *
torch.set_num_threads(1)
first, total, count = new_model().state_dict(), {}, 0
for name in CLIENTS:
    model, steps = new_model(), steps_of(name, 100)
    train(model, [Reader(name)] * steps)
    for key, tensor in model.state_dict().items():
        total[key] = total.get(key, 0) + steps * tensor.double()
    count += steps
grid = OneProcess(client, len(CLIENTS))
config = ConfigRecord({"rounds-per-pass": 100, "own-norms": False})
strategy = FedAvg(min_available_nodes=len(CLIENTS), fraction_evaluate=0.0)
found = strategy.start(grid, ArrayRecord(first), num_rounds=1, train_config=config).arrays.to_torch_state_dict()
assert found.keys() == first.keys()
for key, tensor in found.items():
    torch.testing.assert_close(tensor.double(), total[key] / count, rtol=1e-5, atol=1e-6)
    assert not torch.equal(tensor, first[key])
assert not grid.replies
"""


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([PYTHON, *arguments], cwd=EXAMPLE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_server_has_the_mean_of_the_clients_by_what_they_have_read():
    run("-c", ROUND)


def test_all_ways_of_training_are_compared():
    shown = run("compare.py", "--rounds", "2", "--rounds-per-pass", "20")
    rows = {line[:24].strip(): line[24:].split() for line in shown.splitlines()[2:7]}
    assert list(rows) == ["untrained", "central", "each alone", "federated", "federated, own norms"]
    bits = {title: [float(cell) for cell in row] for title, row in rows.items()}
    for title in ("central", "each alone", "federated"):
        assert bits[title][0] < bits["untrained"][0] - 2  # the manual, which is most of the text
    model = int(re.findall(r"the model: ([\d,]+) bytes", shown)[0].replace(",", ""))
    sent = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) bytes sent in 2 rounds", shown)]
    assert 0 < sent[0] - 2 * 2 * 4 * model < 0.01 * sent[0]  # both ways, to and from four clients, with headers
    assert sent[1] < sent[0]


@pytest.mark.parametrize("given", ["--rounds=0", "--rounds-per-pass=0"])
def test_no_rounds_are_one_error(given: str):
    done = subprocess.run([PYTHON, "compare.py", given], cwd=EXAMPLE, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2
    assert "expected at least one round" in done.stderr


def test_the_environment_is_the_examples_own():
    assert Path(run("-c", "import flwr; print(flwr.__file__)").strip()).is_relative_to(ROOT / "build" / "federated")
