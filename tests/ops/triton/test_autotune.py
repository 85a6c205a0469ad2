"""Choosing the configurations of kernels, with a timer that is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqarch.ops.triton import autotune, availability
from seqarch.ops.triton.autotune import Choices, Configuration

SLOW, FAST, TOO_LARGE = Configuration(4, 2), Configuration(8, 3, {"BT": 64}), Configuration(8, 2, {"BT": 128})
TIMES: dict[Configuration, float | None] = {SLOW: 2.0, FAST: 1.0, TOO_LARGE: None}
ALL = (SLOW, TOO_LARGE, FAST)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEQARCH_TUNING", str(tmp_path / "tuning"))
    monkeypatch.delenv("SEQARCH_AUTOTUNE", raising=False)
    return tmp_path / "tuning"


class Timer:
    """Tells made-up times and counts how often it was asked."""

    def __init__(self, times: dict[Configuration, float | None]):
        self.times, self.asked = times, 0

    def __call__(self, configuration: Configuration) -> float | None:
        self.asked += 1
        return self.times[configuration]


def test_the_fastest_that_fits_is_chosen_once_and_kept(folder: Path):
    timer = Timer(TIMES)
    choices = Choices("NVIDIA H200 9.0")
    assert [choices.configuration("form", ALL, timer) for _ in range(3)] == [FAST] * 3
    assert timer.asked == len(ALL)
    assert Choices("NVIDIA H200 9.0").configuration("form", ALL, timer) == FAST
    assert timer.asked == len(ALL)
    assert [path.name for path in folder.iterdir()] == ["NVIDIA_H200_9.0.json"]
    assert Choices("NVIDIA A100 8.0").configuration("form", ALL, timer) == FAST
    assert timer.asked == 2 * len(ALL)


def test_times_that_are_close_leave_it_at_the_first():
    for faster, chosen in ((0.99, SLOW), (0.9, FAST)):
        assert autotune.choose("form", (SLOW, FAST), Timer({SLOW: 1.0, FAST: faster})).configuration == chosen


def test_nothing_that_fits_is_an_error():
    with pytest.raises(RuntimeError, match="gradients runs in none of its configurations: 4 warps, 2 stages"):
        autotune.choose("gradients", (SLOW,), lambda _: None)


def test_choices_of_two_processes_are_both_kept():
    one, other = Choices("gpu"), Choices("gpu")
    one.configuration("first", ALL, Timer(TIMES))
    other.configuration("second", ALL, Timer(TIMES))
    assert Choices("gpu").known.keys() == {"first", "second"}
    late = Timer(TIMES)
    one.configuration("second", ALL, late)
    assert late.asked == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"form": 3}', '{"form": {"configuration": {"threads": 3}}}'])
def test_a_file_that_is_not_whole_is_as_none(folder: Path, text: str):
    folder.mkdir()
    (folder / "gpu.json").write_text(text)
    assert Choices("gpu").configuration("form", ALL, Timer(TIMES)) == FAST
    assert json.loads((folder / "gpu.json").read_text()).keys() == {"form"}


def test_a_configuration_that_is_no_more_is_chosen_anew():
    Choices("gpu").configuration("form", ALL, Timer(TIMES))
    assert Choices("gpu").configuration("form", (SLOW,), Timer(TIMES)) == SLOW


def test_a_folder_that_cannot_be_written_keeps_choices_in_memory(folder: Path):
    folder.write_text("a file")
    choices, timer = Choices("gpu"), Timer(TIMES)
    assert [choices.configuration("form", ALL, timer) for _ in range(2)] == [FAST] * 2
    assert timer.asked == len(ALL)


def test_the_command_prints_what_is_kept(folder: Path):
    Choices("NVIDIA H200 9.0").configuration("outputs(bfloat16, K=64)", ALL, Timer(TIMES))
    command = [sys.executable, "-m", "seqarch", "tuning"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown == [
        f"choices are kept in {folder}",
        "NVIDIA H200 9.0",
        "  outputs(bfloat16, K=64)",
        "    4 warps, 2 stages: 2 ms",
        "    BT=128, 8 warps, 2 stages: does not fit",
        "  * BT=64, 8 warps, 3 stages: 1 ms",
    ]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """A device of 100 multiprocessors on which kernels take made-up times."""
    with availability.interpreted():  # as Triton was loaded in this process, if it was
        from seqarch.ops.triton import launch

    timer = Timer(TIMES)
    properties = SimpleNamespace(name="NVIDIA Made Up", major=9, minor=0, multi_processor_count=100)
    monkeypatch.setattr(availability, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch._choices.cache_clear()

    def time(kernel: Any, programs: int, arguments: Any, constants: dict[str, int]) -> float | None:
        tiles = {name: size for name, size in constants.items() if name == "BT"}
        return timer(Configuration(constants["num_warps"], constants["num_stages"], tiles))

    monkeypatch.setattr(launch, "milliseconds", time)
    return timer


def kernel(source: str = "0123456789") -> Any:
    from seqarch.ops.triton.launch import Tuned

    return Tuned(SimpleNamespace(__name__="outputs", cache_key=source), ALL)


def test_a_kernel_is_timed_once_for_all_sizes(device: Timer, folder: Path):
    for length in (1000, 2000):
        arguments = torch.zeros(length, 4), torch.zeros(length, 4).bfloat16(), length, 0.5
        assert kernel().configuration(length, arguments, {"K": 64}) == FAST
    assert device.asked == len(ALL)
    (form,) = autotune.read(folder / "NVIDIA_Made_Up_9.0.json")
    assert form.startswith("outputs(float32, bfloat16, K=64), source 01234567, Triton ")


@pytest.mark.parametrize(
    "again",
    [
        lambda x: kernel().configuration(1000, (x.bfloat16(),), {"K": 64}),
        lambda x: kernel().configuration(1000, (x,), {"K": 128}),
        lambda x: kernel("another source").configuration(1000, (x,), {"K": 64}),
    ],
)
def test_another_form_is_timed_for_itself(device: Timer, again: Callable[[torch.Tensor], Configuration]):
    kernel().configuration(1000, (torch.zeros(1),), {"K": 64})
    again(torch.zeros(1))
    assert device.asked == 2 * len(ALL)


def test_what_is_never_timed(device: Timer, monkeypatch: pytest.MonkeyPatch):
    """Launches that do not fill the device, those that are captured as a graph, and all if it is switched off."""
    arguments = (torch.zeros(1),), {"K": 64}
    assert kernel().configuration(99, *arguments) == SLOW
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kernel().configuration(1000, *arguments) == SLOW
    monkeypatch.setenv("SEQARCH_AUTOTUNE", "0")
    assert kernel().configuration(1000, *arguments) == SLOW
    assert device.asked == 0
    assert "none is used or made" in next(autotune.report())
