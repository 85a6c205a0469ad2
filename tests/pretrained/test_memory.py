"""How much memory and time it takes to read a folder of a gigabyte, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seqarch.checkpoints.building import build
from tests.support.paths import ROOT

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from seqarch import LanguageModel
import seqarch.pretrained

folder = Path(sys.argv[1])

def memory(line):
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(each for each in status if each.startswith(line)).split()[1])

def read():
    return [file.read_bytes() for file in folder.glob("*.safetensors")]

def spent(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result

before = memory("VmRSS")
first, model = spent(lambda: LanguageModel.from_pretrained(folder))
peak = memory("VmHWM") - before
size = sum(parameter.nbytes for parameter in model.parameters())
model = None
rounds = [(spent(read)[0], spent(lambda: LanguageModel.from_pretrained(folder))[0]) for _ in range(int(sys.argv[2]))]
ratio = min(loading / reading for reading, loading in rounds)
print(json.dumps({"peak": peak / size, "bytes": size, "first": first, "rounds": rounds, "ratio": ratio}))
"""


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def save(folder: Path, options: dict[str, Any], dtype: torch.dtype, family: str | None) -> None:
    """A model of zeros."""
    model = build(options, (), folder).to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    model.save_pretrained(folder, family=family)


HYBRID = {"pattern": "mamba2 attention/swiglu", "depth": 16, "vocab_size": 32000, "d_model": 1024}
MAMBA2 = {"pattern": "mamba2", "channel": "none", "depth": 72, "vocab_size": 32000, "d_model": 1024}
MIXTRAL = {
    **{"pattern": "attention/moe", "depth": 8, "vocab_size": 16000, "d_model": 1024},
    "channels": {"moe": {"num_experts": 8, "hidden": 2304}},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("options", "dtype", "family"),
    [(HYBRID, torch.float32, None), (MAMBA2, torch.bfloat16, "mamba2"), (MIXTRAL, torch.bfloat16, "mixtral")],
    ids=["own", "mamba2", "mixtral"],
)
def test_a_gigabyte_takes_little_more_than_its_bytes(options, dtype, family, tmp_path):
    """In memory 1.15 times the model. In time 1.3 times reading, but where the experts of a file are transposed.

    Reading and loading alternate, and the round counts in which the machine was busy least: new memory alone can take
    any of them several times as long.
    """
    save(tmp_path / "model", options, dtype, family)
    found = measure(tmp_path / "model", rounds=5)
    print(found)
    assert found["bytes"] > 9e8
    assert found["peak"] <= 1.15
    assert found["ratio"] <= (1.3 if family != "mixtral" else 6)
