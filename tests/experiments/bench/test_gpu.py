"""The bench of a GPU, on a device that is made up: what it checks first, whom it times, what it counts and writes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from docs import benchmarks
from experiments.bench.contest import Contestant
from experiments.bench.gpu import __main__ as command
from experiments.bench.gpu import checks, contests, peers
from experiments.bench.gpu.contests import DECODED, GPU_CONTESTS, Shape, decoding, token_cost
from experiments.bench.gpu.device import ceilings
from experiments.bench.gpu.measure import GpuRecord, Measurement, forward_backward, lines
from experiments.bench.measure import Ceilings
from experiments.util.errors import RunnerError
from seqarch.ops import OPS
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.native import cpu_library

CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e12, "bfloat16": 4e12}, 1e11)


class PretendDevice:
    """Does the work on the CPU, and says that it took a millisecond and a megabyte."""

    device = CPU

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, work: Callable[[], object]) -> float:
        self.calls += 1
        work()
        return 1e-3

    def peak(self, work: Callable[[], object]) -> int:
        return 10**6

    def free(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"name": "Pretend", "capability": "9.0", "memory_bytes": 1, "multiprocessors": 1, "driver": "0"}


def shape(length: int = 130, batch: int = 2, width: int = 16, dtype: torch.dtype = torch.float32) -> Shape:
    torch.manual_seed(0)
    return Shape(batch, length, width, dtype, CPU)


def record(name: str) -> GpuRecord:
    return GpuRecord(name, GPU_CONTESTS[name].title, "float32", CEILINGS, {}, PretendDevice().describe())


def test_without_a_device_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this bench times a CUDA device, and torch sees none: run it where there is"):
        command.main([])


def test_it_needs_nothing_beyond_the_library_and_torch():
    """A machine with a GPU may have none of the runner's packages."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf", "rich", "matplotlib", "polars", "wandb", "optuna"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import experiments.bench.gpu.__main__
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=checks.ROOT)


def test_every_check_passes_here():
    found = list(checks.compare(CPU))
    assert [one for one in found if not one.passed] == []
    told = {one.name.split(",")[0] for one in found}
    # Without the compiled library the convolution has its reference alone.
    assert told == set(OPS) - ({"causal_conv1d"} if cpu_library.unavailable() else set())
    assert any("cut: last state" in one.name for one in found)
    assert any("packed: gradient of v" in one.name for one in found)


def test_what_is_wrong_ends_the_bench_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "compare", lambda _: iter([checks.Check("a", math.nan, 1.0), checks.Check("b", 0, 1)]))
    with pytest.raises(RunnerError, match="a: off by nan, at most 1 is right\n1 of 2 checks failed: nothing was timed"):
        command.check(CPU)
    monkeypatch.setattr(checks, "compare", lambda _: iter([checks.Check("b", 0.5, 1)]))
    monkeypatch.setattr(checks, "run_suites", lambda: "1 failed")
    with pytest.raises(RunnerError, match="1 failed\nthe tests of the kernels failed on the device: nothing was timed"):
        command.check(CPU)
    monkeypatch.setattr(checks, "run_suites", lambda: None)
    assert command.check(CPU) == {"passed": 1, "worst": 0.5}


def test_a_wrong_gradient_does_not_pass(monkeypatch: pytest.MonkeyPatch):
    backend = OPS["linear_attention"].backends["chunk_torch"].module
    right = backend.run
    wrong = lambda q, *others: right(q + 1e-3 * (q - q.detach()), *others)  # noqa: E731 - the same values
    monkeypatch.setattr(backend, "run", wrong)
    failed = [one.name for one in checks.compare(CPU) if not one.passed]
    assert failed
    assert all(name.startswith("linear_attention, chunk_torch, float32") and "gradient of q" in name for name in failed)


def test_the_suites_are_those_of_the_kernels():
    names = {Path(name).name for name in checks.suites()}
    assert {"test_triton_attention.py", "test_triton_recurrences.py", "test_oracles.py"} <= names


@pytest.mark.parametrize("name", GPU_CONTESTS)
def test_contests_count_and_compute(name: str):
    contest, size = GPU_CONTESTS[name], shape()
    inputs = contest.inputs(size)
    cost = contest.cost(size, inputs)
    assert min(cost.flops, cost.bytes) > 0
    found = {}
    for other, contestant in contest.contestants.items():
        if other in OPS[contest.op].backends and OPS[contest.op].backends[other].unavailable() is None:
            try:
                call, own = contestant.enter(inputs)
            except contests_absent():
                continue
            found[other] = call(**own)
    assert found
    first, *rest = found.values()
    for other in rest:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def contests_absent() -> type[Exception]:
    from experiments.bench.contest import Absent

    return Absent


def test_the_cost_of_blocks_counts_the_visible_pairs():
    size = shape(length=300, batch=1)
    inputs = GPU_CONTESTS["block_sparse_attention"].inputs(size)
    time_ = torch.arange(300)
    seen = torch.zeros(300, contests.HEADS, 5, dtype=torch.bool).scatter_(-1, inputs["block_index"][0], True)
    pairs = (seen.repeat_interleave(64, -1)[..., :300] & (time_ <= time_[:, None, None])).sum().item()
    expected = GPU_CONTESTS["block_sparse_attention"].cost(size, inputs).flops / (4 * 16)
    assert abs(expected / pairs - 1) < 0.05  # it counts the lists of one head for all


@pytest.mark.parametrize("name", DECODED)
def test_one_token_goes_on_from_many(name: str):
    inputs = decoding(GPU_CONTESTS[name], shape(length=40))
    assert inputs["q"].shape[1] == 1
    call, own = contests.backend(GPU_CONTESTS[name].op, "recurrent_torch").enter(inputs)
    assert call(**own).shape == (2, 1, contests.HEADS, 16)


@pytest.mark.parametrize("name", ["attention", "window_attention", "block_sparse_attention"])
def test_a_token_costs_what_its_query_sees(name: str):
    size = shape(length=1100)
    inputs = decoding(GPU_CONTESTS[name], size)
    seen = torch.ones(2, contests.HEADS, 18 * 64, dtype=torch.bool)
    if name == "block_sparse_attention":
        listed = torch.zeros(2, contests.HEADS, 18, dtype=torch.bool).scatter_(-1, inputs["block_index"][:, 0], True)
        seen = listed.repeat_interleave(64, -1)
    pairs = seen[..., 1100 - inputs.get("window", 1100) : 1100].sum().item()
    rows = 2 * pairs + 2 * 2 * contests.HEADS  # keys and values, q and o
    cost = token_cost(GPU_CONTESTS[name], size, inputs)
    assert (cost.flops, cost.bytes) == (4 * pairs * 16, 4 * rows * 16)


def test_a_token_reads_and_writes_its_state():
    contest, size = GPU_CONTESTS["linear_attention"], shape(length=1100)
    cost = token_cost(contest, size, decoding(contest, size))
    heads = 2 * contests.HEADS
    numbers = 4 * heads * 16 + heads + 2 * heads * 16 * 16  # q, k, v and o, decays, states
    assert (cost.flops, cost.bytes) == (linear_flops(1, contests.HEADS, 16, 16, 2), 4 * numbers)


def test_a_measurement_leaves_a_record(tmp_path: Path):
    kept, device = record("linear_attention"), PretendDevice()
    measurement = Measurement(GPU_CONTESTS["linear_attention"], kept, device, 0.005)
    for length in (64, 128):
        measurement.passes(256 // length, length, 16)
    measurement.token(1, 64, 16)
    kept.save(tmp_path)
    told = json.loads((tmp_path / "linear_attention.float32.json").read_text())
    ways = {(row["way"], row["batch"], row["length"]) for row in told["rows"]}
    assert ways == {(w, b, n) for w in ("forward", "forward + backward") for b, n in ((4, 64), (2, 128))} | {
        ("one token", 1, 64)
    }
    row = next(row for row in told["rows"] if row["contestant"] == "chunk_torch" and row["way"] == "forward")
    flops = 4 * 256 * contests.HEADS * 16 * 16
    assert row["tflops"] == float(f"{flops / 1e-3 / 1e12:.4g}")
    assert (row["median_ms"], row["peak_mb"], row["times_faster"]) == (1.0, 1.0, None)
    assert set(told["absent"]) >= {"fla, simple_gla", "mamba_ssm, SSD", "SDPA, flash", "chunk_triton"}
    assert told["absent"]["chunk_triton"].startswith("there is no CUDA device")
    assert told["device"]["driver"] == "0"
    assert {"packages", "commit"} <= told["software"].keys() | told["code"].keys()
    shown = "\n".join(lines(kept))
    assert "chunk_torch" in shown
    assert "fla, simple_gla is absent: fla.ops.simple_gla.chunk_simple_gla: No module named 'fla'" in shown


def test_who_fails_is_left_out_and_ours_stops_the_bench():
    def fails(error: type[Exception]) -> Contestant:
        def call(**inputs: Any) -> torch.Tensor:
            raise error("no room\nat all")

        return Contestant(lambda inputs: (call, inputs))

    def measured(name: str, error: type[Exception]) -> GpuRecord:
        base = GPU_CONTESTS["retention"]
        contest = contests.GpuContest(base.title, base.op, base.inputs, base.flops, {name: fails(error)})
        kept = record("retention")
        Measurement(contest, kept, PretendDevice(), 0.001).passes(1, 64, 16)
        return kept

    assert {one["why"] for one in measured("peer", torch.OutOfMemoryError).left_out} == {"out of memory"}
    assert {one["why"] for one in measured("peer", RuntimeError).left_out} == {"no room"}
    with pytest.raises(ZeroDivisionError):
        measured("peer", ZeroDivisionError)


def test_long_calls_are_left_out(monkeypatch: pytest.MonkeyPatch):
    device, kept = PretendDevice(), record("causal_conv1d")
    measurement = Measurement(GPU_CONTESTS["causal_conv1d"], kept, device, 0.001)
    monkeypatch.setattr(device, "seconds", lambda work: 3.0)
    measurement.passes(1, 64, 16)
    monkeypatch.setattr(device, "seconds", lambda work: pytest.fail("nothing is to be called"))
    measurement.passes(1, 128, 16)
    assert {one["why"] for one in kept.left_out} == {"expected are 6 s"}


def test_gradients_are_taken_of_what_has_one():
    x = torch.randn(3)
    gradients = forward_backward(lambda x, y, n: (2 * x * n).sum(0, keepdim=True), {"x": x, "y": x, "n": 3})()
    assert torch.equal(gradients[0] / gradients[0][0], torch.ones(3))  # type: ignore[index]
    assert gradients[1] is None  # type: ignore[index]


def test_ceilings_are_those_of_the_device():
    class Clock(PretendDevice):
        def seconds(self, work: Callable[[], object]) -> float:
            work()
            return 0.5

    found = ceilings(Clock(), size=16, copied=64, tries=1)
    assert found == Ceilings(dict.fromkeys(("bfloat16", "float16", "float32"), 2 * 16**3 / 0.5), 256.0)


def test_peers_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch):
    """Against functions that stand in for theirs: names, layouts and what is left out."""
    asked: dict[str, Any] = {}

    def stand_in(name: str) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            asked[name] = [x.shape if torch.is_tensor(x) else x for x in arguments] + sorted(named)
            return next(x for x in (*arguments, *named.values()) if torch.is_tensor(x)), None

        return function

    monkeypatch.setattr(peers, "_function", lambda module, name: stand_in(name))
    inputs = GPU_CONTESTS["delta_rule"].inputs(shape())
    call, own = peers.DELTA_RULE["fla, gated_delta_rule"].enter(inputs)
    call(**own)
    assert asked == {"chunk_gated_delta_rule": ["beta", "g", "k", "q", "v"]}
    token = decoding(GPU_CONTESTS["delta_rule"], shape())
    call, own = peers.DELTA_RULE["fla, gated_delta_rule"].enter(token)
    call(**own)
    assert asked["fused_recurrent_gated_delta_rule"] == ["beta", "g", "initial_state", "k", "q", "v"]


def test_mamba_2s_scan_is_the_same_recurrence(monkeypatch: pytest.MonkeyPatch):
    def scan(x, dt, A, B, C, chunk_size):  # its definition, step by step
        state, outputs = torch.zeros(*x.shape[:1], x.shape[2], B.shape[3], x.shape[3]), []
        for t in range(x.shape[1]):
            written = torch.einsum("bhn,bhp->bhnp", B[:, t], dt[:, t, :, None] * x[:, t])
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
            outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state))
        return torch.stack(outputs, 1)

    monkeypatch.setattr(peers, "_function", lambda module, name: scan)
    inputs = GPU_CONTESTS["linear_attention"].inputs(shape(length=20))
    call, own = peers.HEAD_DECAY["mamba_ssm, SSD"].enter(inputs)
    expected = contests.backend("linear_attention", "chunk_torch").enter(inputs)[0](**inputs)
    torch.testing.assert_close(call(**own), expected, rtol=1e-3, atol=1e-4)


def test_the_page_says_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmarks, "GPU_RESULTS", tmp_path)
    lines_ = benchmarks.gpu_tables().splitlines()
    assert len(lines_) == 2 + len(GPU_CONTESTS)
    assert all(line.endswith("| not measured |") for line in lines_[2:])
    kept, device = record("retention"), PretendDevice()
    Measurement(GPU_CONTESTS["retention"], kept, device, 0.001).passes(1, 64, 16)
    kept.save(tmp_path)
    page = benchmarks.gpu_tables()
    assert "| retention | one decay a head | measured |" in page
    assert "Pretend, driver 0" in page
    assert "| forward | 16 | chunk_torch | 1 " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "0"], r"--widths is \[0\], expected numbers of at least 1"),
        (["--lengths", "64", "-1"], r"--lengths is \[64, -1\], expected numbers of at least 1"),
        (["--lengths", "4096", "--tokens", "64"], "--tokens is 64, expected at least one sequence of 4096"),
        (["--budget", "0"], "--budget is 0.0, expected seconds, more than 0"),
    ],
    ids=["widths", "lengths", "tokens", "budget"],
)
def test_options_out_of_range_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert re.search(message, capsys.readouterr().err)
