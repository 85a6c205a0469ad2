"""The bench of a GPU, on a device that is made up: what it checks first, what it times, what it counts and writes."""

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
from experiments.bench import __main__ as command
from experiments.bench import baselines, checks
from experiments.bench.benchmark import MODES, TOKEN, Absent, Benchmark, Clock, Implementation, Work
from experiments.bench.benchmarks import BENCHMARKS, OPERATIONS, Point, names_on
from experiments.bench.devices import Ceilings, Cuda, WallClock
from experiments.bench.measure import Measurement, plan
from experiments.bench.record import Record, lines
from experiments.bench.sizes import CUDA, Sizes
from experiments.util.errors import RunnerError
from seqarch.ops import OPS
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.native import cpu_library

CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e12, "bfloat16": 4e12}, 1e11)


class PretendDevice(Cuda):
    """Does the work on the CPU, and reports that it took a millisecond and a megabyte."""

    device = CPU
    name = "Pretend"

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, work: Work) -> float:
        self.calls += 1
        work(WallClock())
        return 1e-3

    def peak(self, point: Point) -> int:
        return 10**6

    def free(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"device": "cuda", "name": "Pretend", "capability": "9.0", "memory_bytes": 1, "multiprocessors": 1,
                "driver": "0"}  # fmt: skip


GPU_BENCHMARKS = names_on("cuda")
DECODED = [name for name in GPU_BENCHMARKS if BENCHMARKS[name].token]


def drawn(length: int = 130, batch: int = 2, width: int = 16) -> Sizes:
    torch.manual_seed(0)
    return Sizes(CUDA, length, width, batch)


def bound(name: str, implementation: str, mode: str, sizes: Sizes) -> torch.Tensor:
    """The output of an implementation."""
    benchmark = BENCHMARKS[name]
    call, own = benchmark.implementations(CUDA)[implementation].bind(benchmark.inputs(mode, sizes))
    return call(**own)


def blank(name: str) -> Record:
    title = CUDA.describe(BENCHMARKS[name].title)
    return Record(name, title, "cuda", "float32", budget_s=0.001, ceilings=CEILINGS)


def passes(
    measurement: Measurement, *shapes: tuple[int, int], modes: tuple[str, ...] = ("forward", "forward + backward")
):
    """Measure so many sequences of so many tokens, with heads of width 16."""
    return measurement.run([(drawn(length, batch), modes) for batch, length in shapes])


def test_without_a_device_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this bench times a CUDA device, and torch sees none: run it where there is"):
        command.main(["--device", "cuda"])


def test_it_needs_nothing_beyond_the_library_and_torch():
    """A machine with a GPU may have none of the runner's packages."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf", "rich", "matplotlib", "polars", "wandb", "optuna",
                                      "transformers", "mambapy", "fla", "mamba_ssm", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import experiments.bench.__main__
experiments.bench.__main__.parse(["--device", "cuda"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=checks.ROOT)


@pytest.mark.slow
def test_every_check_passes_here():
    found = list(checks.compare(CPU))
    assert [one for one in found if not one.passed] == []
    checked = {one.name.split(",")[0] for one in found}
    # Without the compiled library the convolution has its reference alone.
    assert checked == set(OPS) - ({"causal_conv1d"} if cpu_library.unavailable() else set())
    assert any("cut: last state" in one.name for one in found)
    assert any("packed: gradient of v" in one.name for one in found)


def test_what_is_wrong_ends_the_bench_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "compare", lambda _: iter([checks.Check("a", math.nan, 1.0), checks.Check("b", 0, 1)]))
    with pytest.raises(RunnerError, match="a: off by nan, at most 1 is right\n1 of 2 checks failed: nothing was timed"):
        checks.check(CPU)
    monkeypatch.setattr(checks, "compare", lambda _: iter([checks.Check("b", 0.5, 1)]))
    monkeypatch.setattr(checks, "run_suites", lambda: "1 failed")
    with pytest.raises(RunnerError, match="1 failed\nthe tests of the kernels failed on the device: nothing was timed"):
        checks.check(CPU)
    monkeypatch.setattr(checks, "run_suites", lambda: None)
    assert checks.check(CPU) == {"passed": 1, "worst": 0.5}


def test_a_wrong_gradient_does_not_pass(monkeypatch: pytest.MonkeyPatch):
    backend = OPS["linear_attention"].backends["chunk_torch"].module
    right = backend.run
    wrong = lambda x: right(x.replace(q=x.q + 1e-3 * (x.q - x.q.detach())))  # noqa: E731 - the same values
    monkeypatch.setattr(backend, "run", wrong)
    monkeypatch.setattr(checks, "OPS", {"linear_attention": OPS["linear_attention"]})
    failed = [one.name for one in checks.compare(CPU) if not one.passed]
    assert failed
    assert all(name.startswith("linear_attention, chunk_torch, float32") and "gradient of q" in name for name in failed)


def test_the_suites_are_those_of_the_kernels():
    names = {Path(name).name for name in checks.suites()}
    assert {"test_triton_attention.py", "test_triton_recurrences.py", "test_oracles.py"} <= names


@pytest.mark.parametrize("name", GPU_BENCHMARKS)
def test_benchmarks_count_and_compute(name: str):
    benchmark, sizes = OPERATIONS[name], drawn()
    inputs = benchmark.inputs("forward", sizes)
    cost = benchmark.cost("forward", sizes, inputs)
    assert min(cost.flops, cost.bytes) > 0
    found = []
    for implementation in (one for one in benchmark.shown(CUDA, "forward") if one in benchmark.ours):
        try:
            call, own = benchmark.implementations(CUDA)[implementation].bind(inputs)
        except Absent:
            continue
        found.append(call(**own))
    assert found
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_backends_of_cpus_and_those_that_go_token_by_token_are_not_timed():
    shown = [name for benchmark in GPU_BENCHMARKS for name in BENCHMARKS[benchmark].shown(CUDA, "forward")]
    assert "chunk_torch" in shown
    assert "recurrent_triton" in shown
    assert not any(name in ("auto", "recurrent_torch") or name.endswith("_cpp") for name in shown)


def test_the_cost_of_blocks_counts_the_visible_pairs():
    sizes, benchmark = drawn(length=300, batch=2), BENCHMARKS["block_sparse_attention"]
    inputs = benchmark.inputs("forward", sizes)
    time_ = torch.arange(300)
    seen = torch.zeros(2, 300, sizes.heads, 5, dtype=torch.bool).scatter_(-1, inputs["block_index"], True)
    pairs = (seen.repeat_interleave(64, -1)[..., :300] & (time_ <= time_[:, None, None])).sum().item()
    assert benchmark.cost("forward", sizes, inputs).flops == 4 * 16 * pairs


@pytest.mark.parametrize("name", DECODED)
def test_one_token_follows_many(name: str):
    benchmark = BENCHMARKS[name]
    inputs = benchmark.inputs(TOKEN, drawn(length=40))
    assert inputs["q"].shape[1] == 1
    call, own = benchmark.ours["recurrent_torch"].bind(inputs)
    assert call(**own).shape == (2, 1, CUDA.heads, 16)


@pytest.mark.parametrize("name", ["attention", "window_attention", "block_sparse_attention"])
def test_a_token_costs_what_its_query_sees(name: str):
    sizes = drawn(length=1100)
    inputs = BENCHMARKS[name].inputs(TOKEN, sizes)
    seen = torch.ones(2, CUDA.heads, 18 * 64, dtype=torch.bool)
    if name == "block_sparse_attention":
        listed = torch.zeros(2, CUDA.heads, 18, dtype=torch.bool).scatter_(-1, inputs["block_index"][:, 0], True)
        seen = listed.repeat_interleave(64, -1)
    pairs = seen[..., 1100 - inputs.get("window", 1100) : 1100].sum().item()
    rows = 2 * pairs + 2 * 2 * CUDA.heads  # keys and values, q and o
    cost = BENCHMARKS[name].cost(TOKEN, sizes, inputs)
    assert (cost.flops, cost.bytes) == (4 * pairs * 16, 4 * rows * 16)


def test_a_token_reads_and_writes_its_state():
    benchmark, sizes = BENCHMARKS["linear_attention"], drawn(length=1100)
    cost = benchmark.cost(TOKEN, sizes, benchmark.inputs(TOKEN, sizes))
    heads = 2 * CUDA.heads
    numbers = 4 * heads * 16 + heads + 2 * heads * 16 * 16  # q, k, v and o, decays, states
    assert (cost.flops, cost.bytes) == (linear_flops(1, CUDA.heads, 16, 16, 2), 4 * numbers)


def test_the_tokens_of_a_call_are_those_of_all_its_sequences():
    benchmark, device = BENCHMARKS["attention"], PretendDevice()
    planned = list(plan(benchmark, device, "bfloat16", (64, 128), (16, 32), tokens=256))
    assert {(sizes.dtype, sizes.device) for sizes, _ in planned} == {(torch.bfloat16, CPU)}
    assert [(sizes.width, sizes.batch, sizes.length, modes) for sizes, modes in planned] == [
        (width, *shape)
        for width in (16, 32)
        for shape in ((4, 64, benchmark.modes), (2, 128, benchmark.modes), (1, 128, (TOKEN,)), (64, 128, (TOKEN,)))
    ]


def test_a_measurement_leaves_a_record(tmp_path: Path):
    device = PretendDevice()
    measurement = Measurement(BENCHMARKS["linear_attention"], blank("linear_attention"), device)
    passes(measurement, (4, 64), (2, 128))
    kept = passes(measurement, (1, 64), modes=(TOKEN,))
    kept.save(tmp_path, device)
    saved = json.loads((tmp_path / "linear_attention.float32.json").read_text())
    shapes = {(row["mode"], row["batch"], row["length"]) for row in saved["rows"]}
    assert shapes == {(m, b, n) for m in ("forward", "forward + backward") for b, n in ((4, 64), (2, 128))} | {
        (TOKEN, 1, 64)
    }
    row = next(row for row in saved["rows"] if row["implementation"] == "chunk_torch" and row["mode"] == "forward")
    flops = 4 * 256 * CUDA.heads * 16 * 16
    assert row["tflops"] == float(f"{flops / 1e-3 / 1e12:.4g}")
    assert (row["median_ms"], row["peak_mb"], row["times_faster"]) == (1.0, 1.0, None)
    assert set(saved["absent"]) >= {"fla, simple_gla", "mamba_ssm, SSD", "SDPA, flash", "chunk_triton"}
    assert saved["absent"]["chunk_triton"].startswith("there is no CUDA device")
    assert saved["hardware"]["driver"] == "0"
    assert {"packages", "commit"} <= saved["software"].keys() | saved["code"].keys()
    shown = "\n".join(lines(kept))
    assert "chunk_torch" in shown
    assert "fla, simple_gla is absent: fla.ops.simple_gla.chunk_simple_gla: No module named 'fla'" in shown


def test_the_checks_come_first_and_each_benchmark_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "check", lambda device: {"passed": 7, "worst": 0.5})
    monkeypatch.setitem(command.DEVICES, "cuda", PretendDevice)
    monkeypatch.setattr(PretendDevice, "ceilings", lambda self: CEILINGS)
    options = ["--device", "cuda", "--benchmarks", "retention", "causal_conv1d", "--widths", "16", "--lengths", "64"]
    command.main([*options, "--tokens", "128", "--dtype", "float32", "--folder", str(tmp_path)])
    names = {
        "retention.float32.json",
        "retention.float32.csv",
        "causal_conv1d.float32.json",
        "causal_conv1d.float32.csv",
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    saved = json.loads((tmp_path / "retention.float32.json").read_text())
    assert saved["checked"] == {"passed": 7, "worst": 0.5}
    assert {(row["width"], row["batch"], row["length"]) for row in saved["rows"]} == {(16, 2, 64)}
    assert "Pretend, torch" in capsys.readouterr().out


def failing(error: type[Exception]) -> Implementation:
    def call(**inputs: Any) -> torch.Tensor:
        raise error("no memory\nat all")

    return Implementation(lambda inputs: (call, inputs))


def test_baselines_that_fail_are_recorded_and_other_errors_end_the_bench():
    def reasons(error: type[Exception], ours: bool) -> set[str]:
        base = BENCHMARKS["retention"]
        one = {"failing": failing(error)}
        benchmark = Benchmark(base.title, base.workload, one if ours else {}, {"cuda": {} if ours else one})
        kept = passes(Measurement(benchmark, blank("retention"), PretendDevice()), (1, 64))
        return {one["reason"] for one in kept.failed}

    assert reasons(torch.OutOfMemoryError, ours=False) == {"out of memory"}
    assert reasons(torch.OutOfMemoryError, ours=True) == {"out of memory"}
    assert reasons(RuntimeError, ours=False) == {"RuntimeError: no memory at all"}
    with pytest.raises(RuntimeError, match="no memory"):
        reasons(RuntimeError, ours=True)
    with pytest.raises(ZeroDivisionError):
        reasons(ZeroDivisionError, ours=False)


def test_long_calls_are_left_out(monkeypatch: pytest.MonkeyPatch):
    device = PretendDevice()
    measurement = Measurement(BENCHMARKS["causal_conv1d"], blank("causal_conv1d"), device)
    monkeypatch.setattr(device, "seconds", lambda work: 3.0)
    passes(measurement, (1, 64))
    monkeypatch.setattr(device, "seconds", lambda work: pytest.fail("nothing is to be called"))
    assert {one["expected_s"] for one in passes(measurement, (1, 128)).left_out} == {6.0}


def test_a_first_call_that_is_too_long_is_left_out_at_these_sizes(monkeypatch: pytest.MonkeyPatch):
    device = PretendDevice()
    measurement = Measurement(BENCHMARKS["causal_conv1d"], blank("causal_conv1d"), device)
    monkeypatch.setattr(device, "first_call", lambda work: 7.0)
    kept = passes(measurement, (4, 64))
    assert {one["expected_s"] for one in kept.left_out} == {7.0}
    assert kept.rows == []
    monkeypatch.setattr(device, "first_call", lambda work: 1.0)
    assert {row.length for row in passes(measurement, (2, 128)).rows} == {128}


def test_gradients_are_taken_of_what_has_one():
    x, y = torch.randn(3), torch.randn(3)
    seen: list[torch.Tensor] = []

    def call(x: torch.Tensor, y: torch.Tensor, n: int) -> torch.Tensor:
        x.register_hook(seen.append)
        return 2 * x * n

    MODES["forward + backward"].prepare(call, {"x": x, "y": y, "n": 3})(WallClock())
    assert torch.equal(seen[0], torch.full((3,), 6.0))
    assert x.grad is None


def test_the_devices_events_time_the_blocks_alone(monkeypatch: pytest.MonkeyPatch):
    """With events of a clock that each call of this test moves on."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    def work(clock: Clock) -> None:
        for timed, untimed in ((3.0, 50.0), (4.0, 50.0)):
            with clock:
                now[0] += timed
            now[0] += untimed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = PretendDevice()
    device._cache_filler = torch.ones(8)
    assert Cuda.seconds(device, work) == pytest.approx(7e-3)
    assert not device._cache_filler.any()


def test_the_peak_of_memory_is_that_of_a_call_with_its_own_inputs(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr(Point, "work", lambda self: order.append("inputs") or (lambda clock: order.append("call")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    device = PretendDevice()
    device._cache_filler = torch.ones(8)
    assert Cuda.peak(device, Point("retention", "chunk_torch", "forward", drawn())) == 1000 - 32
    assert order == ["inputs", "reset", "call"]


def test_ceilings_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PretendDevice, "seconds", lambda self, work: work(WallClock()) or 0.5)
    device = PretendDevice()
    device.square, device.copied, device.tries = 16, 64, 1
    assert device.ceilings() == Ceilings(dict.fromkeys(("bfloat16", "float16", "float32"), 2 * 16**3 / 0.5), 256.0)


def test_baselines_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch):
    """Against stubs of their functions: names, layouts and what is left out."""
    asked: dict[str, Any] = {}

    def stand_in(name: str) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            asked[name] = [x.shape if torch.is_tensor(x) else x for x in arguments] + sorted(named)
            return next(x for x in (*arguments, *named.values()) if torch.is_tensor(x)), None

        return function

    monkeypatch.setattr(baselines, "_function", lambda module, name: stand_in(name))
    bound("delta_rule", "fla, gated_delta_rule", "forward", drawn())
    assert asked == {"chunk_gated_delta_rule": ["beta", "g", "k", "q", "v"]}
    bound("delta_rule", "fla, gated_delta_rule", TOKEN, drawn())
    assert asked["fused_recurrent_gated_delta_rule"] == ["beta", "g", "initial_state", "k", "q", "v"]


def test_mamba_2s_scan_is_the_same_recurrence(monkeypatch: pytest.MonkeyPatch):
    def scan(x, dt, A, B, C, chunk_size):  # its definition, step by step
        state, outputs = torch.zeros(*x.shape[:1], x.shape[2], B.shape[3], x.shape[3]), []
        for t in range(x.shape[1]):
            written = torch.einsum("bhn,bhp->bhnp", B[:, t], dt[:, t, :, None] * x[:, t])
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
            outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state))
        return torch.stack(outputs, 1)

    monkeypatch.setattr(baselines, "_function", lambda module, name: scan)
    found, expected = (
        bound("linear_attention", name, "forward", drawn(length=20)) for name in ("mamba_ssm, SSD", "chunk_torch")
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_page_says_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmarks, "GPU_RESULTS", tmp_path)
    lines_ = benchmarks.gpu_tables().splitlines()
    assert len(lines_) == 2 + len(GPU_BENCHMARKS)
    assert all(line.endswith("| not measured |") for line in lines_[2:])
    device = PretendDevice()
    passes(Measurement(BENCHMARKS["retention"], blank("retention"), device), (1, 64)).save(tmp_path, device)
    page = benchmarks.gpu_tables()
    assert "| retention | H = 16, K = V = width, one decay per head | measured |" in page
    assert "Pretend, driver 0" in page
    assert "| forward | 16 | chunk_torch | 1 " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "0"], r"--widths is \[0\], expected numbers of at least 1"),
        (["--lengths", "64", "-1"], "--lengths has -1, expected multiples of 64"),
        (["--lengths", "4096", "--tokens", "64"], "--tokens is 64, expected at least one sequence of 4096"),
        (["--budget", "0"], "--budget is 0.0, expected seconds, more than 0"),
        (["--benchmarks", "training_mamba"], "unknown benchmark 'training_mamba': expected one of attention"),
        (["targets"], "targets are those of a CPU: leave --device out"),
    ],
    ids=["widths", "lengths", "tokens", "budget", "benchmarks", "targets"],
)
def test_options_out_of_range_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        command.parse(["--device", "cuda", *arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", [["--widths", "64"], ["--tokens", "4096"], ["--only-checks"]], ids=lambda o: o[0])
def test_options_of_a_gpu_are_not_passed_over_on_a_cpu(capsys, option):
    with pytest.raises(SystemExit):
        command.parse(option)
    assert f"{option[0]} is of --device cuda" in capsys.readouterr().err
