"""The bench: what it times, what it counts, what it leaves out, what it writes and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from docs import benchmarks
from docs.benchmarks import kept_targets
from experiments.bench import __main__ as command
from experiments.bench import (
    baselines,
    decode,
    devices,
    loading,
    measure,
    models,
    offload,
    peak_memory,
    peers,
    quantized,
    targets,
    tokens,
    training_steps,
)
from experiments.bench.benchmark import AUTO, MODES, PASSES, Absent, Benchmark, Cost, Implementation, Workload
from experiments.bench.benchmarks import BENCHMARKS, OPERATIONS, names_on
from experiments.bench.devices import Ceilings, Cpu
from experiments.bench.measure import Measurement, quartiles
from experiments.bench.record import Record, prepare_folder
from experiments.bench.sizes import CPU, Sizes
from experiments.util.errors import RunnerError
from seqarch.layers import MIXERS
from seqarch.models import LanguageModel
from seqarch.models.stack import Stack
from seqarch.ops import OPS
from seqarch.serving import RoutingTrace, replay

ON_CPU = [name for name in OPERATIONS if name in names_on("cpu")]
OTHER_WORK = {"SDPA", "FlexAttention", "dense MLP", "mambapy"}
"""Implementations that compute something else than the operation, or take long to compile."""

CEILINGS = Ceilings({"float32": 1e11, "bfloat16": 2e11}, 1e10)


def outcome(benchmark: Benchmark, name: str, inputs: dict) -> torch.Tensor:
    call, own = benchmark.implementations(CPU)[name].bind(inputs)
    return call(**own)


def inputs_of(name: str, length: int) -> dict:
    return BENCHMARKS[name].workload.inputs(Sizes(CPU, length))


def cost_of(name: str, length: int) -> Cost:
    return BENCHMARKS[name].workload.cost(Sizes(CPU, length), inputs_of(name, length))


@pytest.mark.parametrize("name", ON_CPU)
def test_implementations_of_an_operation_do_the_same_work(name):
    torch.manual_seed(0)
    benchmark, inputs = OPERATIONS[name], inputs_of(name, 128)
    expected = outcome(benchmark, AUTO, inputs)
    compared = [other for other in benchmark.shown(CPU, "forward") if other not in OTHER_WORK]
    assert any(other in OPS[backends].backends for other in compared for backends in OPS)
    for other in compared:
        try:
            found = outcome(benchmark, other, inputs)
        except Absent:
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=other: f"{n}: {m}")


def test_mambapy_scans_the_same_states():
    benchmark, inputs = BENCHMARKS["selective_scan"], inputs_of("selective_scan", 64)
    states = outcome(benchmark, "mambapy", inputs)
    read = torch.einsum("btdn,btn->btd", states, inputs["C"])
    torch.testing.assert_close(read, outcome(benchmark, AUTO, inputs), rtol=1e-4, atol=1e-4)


def test_every_operation_and_every_backend_has_a_benchmark():
    shown = {name for one in ON_CPU for name in OPERATIONS[one].implementations(CPU)}
    assert shown >= {backend for op in OPS.values() for backend in op.backends}
    for name in names_on("cpu"):
        cost = cost_of(name, 64)
        assert min(cost.flops, cost.bytes) > 0


def test_the_cost_of_blocks_counts_the_visible_pairs():
    torch.manual_seed(0)
    sizes, workload = Sizes(CPU, 2048), BENCHMARKS["block_sparse_attention"].workload
    inputs = workload.inputs(sizes)
    times = torch.arange(2048)
    listed = torch.zeros(2048, 8, 2048 // 64 + 1, dtype=torch.bool)
    listed.scatter_(-1, inputs["block_index"][0] % (2048 // 64 + 1), True)
    visible = listed[..., :-1].repeat_interleave(64, dim=-1) & (times <= times[:, None, None])
    assert int(listed[-1, :, :-1].sum()) == 8 * 16
    assert workload.cost(sizes, inputs).flops == 4 * 64 * int(visible.sum())


@pytest.mark.parametrize("window", [1, 127, 128, 129, 256, 1000])
def test_the_blocks_of_flex_attention_are_those_of_the_window(window):
    mask = baselines._flex_mask(1024, window)
    time = torch.arange(1024)
    pairs = ((time <= time[:, None]) & (time[:, None] - time < window)).view(8, 128, 8, 128)
    some, every = pairs.any(3).any(1), pairs.all(3).all(1)
    whole = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(whole, every)
    assert torch.equal(_listed(mask.kv_num_blocks, mask.kv_indices), some & ~every)


def _listed(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    blocks = torch.zeros(8, 8, dtype=torch.bool)
    for row in range(8):
        blocks[row, index[0, 0, row, : count[0, 0, row]].long()] = True
    return blocks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["attention", "window_attention"])
def test_flex_attention_does_the_same_work(name):
    inputs = inputs_of(name, 512)
    found = outcome(BENCHMARKS[name], "FlexAttention", inputs)
    torch.testing.assert_close(found, outcome(BENCHMARKS[name], AUTO, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", training_steps.VOCABULARIES)
def test_training_steps_with_all_logits_and_without_are_the_same(vocabulary):
    config = training_steps._config("delta_net", vocabulary, length=64, rows=4)
    losses = [
        [step().item() for _ in range(3)]
        for step in (training_steps.Step(config), training_steps.Step(config, training_steps.with_all_logits))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_models_of_both_sides_have_the_same_weights(name):
    model = models.MODELS[name]
    with torch.device("meta"):
        ours = LanguageModel(model.config)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model.theirs))
    assert theirs.num_parameters() == ours.num_parameters()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models.MODELS)
def test_both_sides_train_and_decode(name):
    model, device = models.MODELS[name], Cpu()
    for benchmark in (models.training(model), models.decoding(model, longest=64)):
        (mode,) = benchmark.modes
        inputs = benchmark.inputs(mode, Sizes(CPU, 64))
        for implementation in benchmark.shown(CPU, mode):
            if (name, mode, implementation) == ("gated_delta_net", "one token", "transformers"):
                with pytest.raises(Absent, match="wants a layer of attention"):
                    benchmark.work(implementation, mode, CPU, inputs)
                continue
            work = benchmark.work(implementation, mode, CPU, inputs)
            assert min(device.seconds(work), device.seconds(work)) > 0


def clocked(order: list[str], **seconds: float) -> dict[str, measure.Runner]:
    def runner(name: str) -> measure.Runner:
        return lambda: order.append(name) or seconds[name]

    return {name: runner(name) for name in seconds}


def test_implementations_take_turns_as_long_as_their_budget_lasts():
    order: list[str] = []
    times = measure.alternate(clocked(order, quick=0.001, slow=0.4, endless=50.0), budget=1.0, rounds=4)
    assert order == ["quick", "slow", "endless", "quick", "slow", *["quick", "slow"] * 2, *["quick"] * 2]
    assert {name: len(found) for name, found in times.items()} == {"quick": 4, "slow": 2, "endless": 1}
    assert times["endless"] == [50.0]


def test_the_ratio_is_taken_round_by_round():
    assert measure.ratio([3.0, 8.0, 20.0], [1.0, 2.0, 10.0]) == 3.0
    assert measure.ratio([3.0], [1.0, 9.0]) == 3.0
    assert quartiles([1.0, 2.0, 10.0]) == (1.5, 2.0, 6.0)
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("known", "expected"),
    [({}, 0), ({512: 1.0}, 2), ({512: 1.0, 1024: 2.0}, 4), ({256: 9.0, 512: 1.0}, 2), ({128: 1.0, 512: 1e9}, 8e9)],
)
def test_what_a_length_will_take(known, expected):
    assert measure.expected(known, 2 * max(known, default=1)) == pytest.approx(expected)


def test_the_nearer_ceiling():
    assert CEILINGS.seconds(Cost(flops=1e11, bytes=1e9), "float32") == (1.0, "arithmetic")
    assert CEILINGS.seconds(Cost(flops=1e11, bytes=1e10), "bfloat16") == (1.0, "bandwidth")
    other = Ceilings({"float32": 5e10, "bfloat16": 3e11}, 2e10)
    assert CEILINGS.best(other) == Ceilings({"float32": 1e11, "bfloat16": 3e11}, 2e10)
    assert MODES["forward + backward"].cost(Cost(10, 10)) == Cost(30, 20)
    small = Cpu()
    small.square, small.copied, small.tries = 64, 2**16, 1
    found = small.ceilings()
    assert min(*found.flops.values(), found.bandwidth) > 0


def test_peak_memory_counts_inputs_outputs_and_gradients():
    peak = {mode: Cpu().peak(targets.point("linear_attention", "SDPA", mode, 4096)) for mode in PASSES}
    once = cost_of("linear_attention", 4096).bytes
    assert peak["forward"] == pytest.approx(once, rel=0.1)
    assert peak["forward + backward"] == pytest.approx(2 * once, rel=0.1)


def test_peak_memory_is_not_made_up_where_it_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "RESET", str(tmp_path / "none"))
    assert Cpu().peak(targets.point("causal_conv1d", AUTO, "forward", 64)) is None


@pytest.fixture
def small(monkeypatch) -> Benchmark:
    """A benchmark of two that are here, one that is not and one without a backward pass."""

    def missing(inputs):
        raise ImportError("No module named 'elsewhere'")

    benchmark = Benchmark(
        "small",
        Workload(
            lambda sizes: {"x": torch.randn(sizes.length, 8, dtype=sizes.dtype)},
            lambda sizes, inputs: Cost(8 * len(inputs["x"]), 64 * len(inputs["x"])),
        ),
        ours={
            "ours": Implementation(lambda inputs: (lambda x: x * 2, inputs)),
            "forward only": Implementation(lambda inputs: (lambda x: x * 2, inputs), forward_only=True),
        },
        baselines={
            "cpu": {
                "baseline": Implementation(lambda inputs: (lambda x: x + x, inputs)),
                "elsewhere": Implementation(missing),
            }
        },
    )
    monkeypatch.setitem(BENCHMARKS, "small", benchmark)
    monkeypatch.setattr(devices, "peak_memory", lambda point: None)
    monkeypatch.setattr(Cpu, "ceilings", lambda self: CEILINGS)
    return benchmark


def blank() -> Record:
    return Record("small", "small", "cpu", "float32", budget_s=3.0, ceilings=CEILINGS)


def measured(measurement: Measurement, lengths: list[int]) -> Record:
    return measurement.run(measure.plan(measurement.benchmark, Cpu(), "float32", lengths, (64,), None))


def test_what_is_missing_is_listed_and_what_is_slow_is_left_out(small):
    measurement = Measurement(small, blank(), Cpu())
    measurement.times["ours", "forward", 64] = {512: 2.0}
    record = measured(measurement, [1024, 2048, 64])
    assert record.absent == {"elsewhere": "No module named 'elsewhere'"}
    assert [(one["implementation"], one["length"], one["expected_s"]) for one in record.left_out] == [
        ("ours", 1024, 16.0),  # from 64 to 512 it grew by more than the cube, the most that is expected
        ("ours", 2048, 128.0),
    ]
    rows = {(row.implementation, row.mode, row.length) for row in record.rows}
    assert {length for name, mode, length in rows if (name, mode) == ("ours", "forward")} == {64}
    assert {length for name, mode, length in rows if (name, mode) == ("ours", "forward + backward")} == {
        64,
        1024,
        2048,
    }
    assert {mode for name, mode, _ in rows if name == "forward only"} == {"forward"}


def test_what_fails_is_recorded_and_the_others_continue(small, monkeypatch, tmp_path, capsys):
    def breaks(x):
        if len(x) > 64:
            raise RuntimeError("no room\nfor it")
        return x

    def never(inputs):
        raise OSError("a compiler crashed")

    ours = {"breaks": Implementation(lambda inputs: (breaks, inputs)), "never": Implementation(never)}
    baselines = {"cpu": {"baseline": small.baselines["cpu"]["baseline"]}}
    benchmark = dataclasses.replace(small, ours=ours, baselines=baselines, modes=("forward",))
    monkeypatch.setitem(BENCHMARKS, "small", benchmark)
    command.main(
        ["--benchmarks", "small", "--lengths", "64", "128", "256", "--budget", "0.01", "--folder", str(tmp_path)]
    )
    record = json.loads((tmp_path / "small.json").read_text())
    assert [(row["implementation"], row["length"]) for row in record["rows"]] == [
        ("baseline", 64), ("breaks", 64), ("baseline", 128), ("baseline", 256)
    ]  # fmt: skip
    assert [(one["implementation"], one["length"], one["reason"]) for one in record["failed"]] == [
        ("never", 64, "OSError: a compiler crashed"),
        ("breaks", 128, "RuntimeError: no room for it"),
    ]
    assert "breaks, forward, T = 128 failed: RuntimeError" in capsys.readouterr().out
    baseline, broken = (targets.point("small", name, "forward", 128) for name in ("baseline", "breaks"))
    assert "no room" in targets.Faster("work", baseline, broken, 1.0).measure(0.01).note


def test_a_benchmark_whose_inputs_cannot_be_made_ends_none_of_the_others(small, monkeypatch):
    def inputs(sizes):
        raise MemoryError("too long")

    broken = dataclasses.replace(small, workload=Workload(inputs, small.workload.cost))
    record = measured(Measurement(broken, blank(), Cpu()), [64])
    assert [one["reason"] for one in record.failed] == ["MemoryError: too long"] * 2


def test_no_length_is_begun_after_the_deadline(small, tmp_path, capsys):
    record = measured(Measurement(small, blank(), Cpu(), deadline=0.0), [64, 128])
    assert (record.rows, record.out_of_time) == ([], [64, 128])
    command.main(["--benchmarks", "small", "--lengths", "64", "--minutes", "1e-9", "--folder", str(tmp_path)])
    assert "for T = 64 there was no time" in capsys.readouterr().out


def test_a_measurement_of_memory_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(peak_memory, "PATIENCE", 0.0)
    assert Cpu().peak(targets.point("causal_conv1d", AUTO, "forward", 2048)) is None


def test_memory_that_is_not_there_is_not_asked_for(small):
    measurement = Measurement(small, blank(), Cpu())
    measurement.peaks["baseline", "forward", 64] = {32: 1e15}
    record = measured(measurement, [64])
    assert [(one["implementation"], one["expected_peak_mb"]) for one in record.left_out] == [("baseline", 2e9)]
    assert {row.times_faster for row in record.rows if row.mode == "forward"} == {None}


def test_it_writes_what_it_shows(small, tmp_path, monkeypatch, capsys):
    command.main(["--benchmarks", "small", "--lengths", "64", "128", "--budget", "0.05", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "small.json").read_text())
    with (tmp_path / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [("baseline", "forward"), ("ours", "forward"), ("forward only", "forward")]
    assert [(row["implementation"], row["mode"]) for row in rows[:3]] == names
    assert [row["median_ms"] for row in rows] == [str(row["median_ms"]) for row in record["rows"]]
    assert all(row["quartile1_ms"] <= row["median_ms"] <= row["quartile3_ms"] for row in record["rows"])
    assert {row["times_faster"] for row in record["rows"] if row["implementation"] == "baseline"} == {1.0}
    assert {row["peak_mb"] for row in record["rows"]} == {None}
    first = record["rows"][0]
    least_ms = 1e3 * 64 * 64 / CEILINGS.bandwidth
    assert first["share"] == pytest.approx(least_ms / first["median_ms"], rel=0.01)
    assert record["hardware"]["cpu"] in shown
    assert f"{first['median_ms']:g}" in shown
    assert "elsewhere is absent: No module named" in shown
    assert (tmp_path / "small.png").stat().st_size > 1000
    assert record["code"]

    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    page = benchmarks.bench_tables()
    assert "### small, float32" in page
    assert f"| forward | baseline | {first['median_ms']:.3g} ({first['share']:.0%}) |" in page
    assert "Absent: elsewhere: No module named 'elsewhere'." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", "causal_conv"], "unknown benchmark 'causal_conv'.*Did you mean 'causal_conv1d'"),
        (["--lengths", "100"], "--lengths has 100, expected multiples of 64"),
        (["--budget", "0"], "--budget is 0.0, expected seconds"),
        (["--minutes", "0"], "--minutes is 0.0, expected a time"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("more", [[], ["targets"], ["tokens"], ["quantized"], ["loading"]])
def test_a_folder_that_cannot_be_written_is_one_line(small, more, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"cannot write .*file/bench"):
        command.main(["--folder", str(tmp_path / "file" / "bench"), *more])


@pytest.mark.parametrize("name", ["small.json", "small.csv", "small.png"])
def test_what_no_bench_wrote_is_not_written_over(small, tmp_path, name):
    (tmp_path / name).write_text('{"mine": true}')
    with pytest.raises(SystemExit, match=rf"{name} is no record of a bench"):
        command.main(["--benchmarks", "small", "--lengths", "64", "--folder", str(tmp_path)])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"mine": true}'}


def test_records_of_a_bench_are_written_again(small, tmp_path):
    for _ in range(2):
        command.main(["--benchmarks", "small", "--lengths", "64", "--budget", "0.01", "--folder", str(tmp_path)])
    (tmp_path / "targets.csv").write_text("mine")
    with pytest.raises(RunnerError, match=r"targets\.csv is no record of a bench"):
        prepare_folder(tmp_path, ["small", "targets"])


@pytest.mark.slow
def test_experts_on_disk_are_measured_beside_all_in_memory(tmp_path, monkeypatch, capsys):
    experts = {"num_experts": 2, "top_k": 1, "normalise_weights": False, "hidden": 32}
    model = LanguageModel(vocab_size=50, d_model=32, pattern="min_gru/moe", depth=2, channels={"moe": experts}).eval()
    model.save_pretrained(tmp_path / "model")
    text = np.random.default_rng(0).integers(50, size=(2, 16))
    for name, value in (("DECODED", 3), ("texts", lambda config: {"a text": text}), ("POLICIES", {"lfu": None})):
        monkeypatch.setattr(offload, name, value)
    arguments = ["--folder", str(tmp_path / "bench"), "offload", "--model", str(tmp_path / "model")]
    command.main(arguments)
    found = json.loads((tmp_path / "bench" / "offload.json").read_text())
    whole, one, both, cold, _ = found["decoded"]
    assert [row["places"] for row in found["decoded"]] == [None, 1, 2, 1, 2]
    assert [row["files"] for row in (whole, one, cold)] == ["", "system's memory", "disk"]
    assert whole["bytes_per_token"] == 0 <= both["bytes_per_token"] < one["bytes_per_token"] == cold["bytes_per_token"]
    least, replayed = ([r["hit_rate"] for r in found["replayed"] if r["policy"] == p] for p in (offload.BEST, "lfu"))
    assert len(least) == 2
    assert all(best >= rate for best, rate in zip(least, replayed, strict=True))
    assert (tmp_path / "bench" / "offload.png").exists()
    assert RoutingTrace.load(tmp_path / "bench" / "routing_0.json").index.shape == (32, 2, 1)
    assert "of all in memory" in capsys.readouterr().out
    LanguageModel(vocab_size=50, d_model=32, pattern="min_gru", depth=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit, match=r"bench offload: .* got none"):
        command.main([*arguments[:-1], str(tmp_path / "dense")])


def test_the_least_possible_reads_of_experts_are_those_of_who_knows_the_future():
    """On Belady's own kind of example, where the least recently used is always what comes next."""
    routing = RoutingTrace(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])[:, None, None], 3)
    assert replay(routing, 2, "lru").hits == 0
    assert offload.least_possible(routing, 2).hits == 3


def test_a_token_is_measured_beside_its_weights(tmp_path, monkeypatch, capsys):
    assert {*MIXERS} < set(tokens.stacks())
    monkeypatch.setattr(tokens, "stacks", lambda: ["mamba", "gla"])
    monkeypatch.setattr(tokens, "measure", partial(tokens.measure, width=32, depth=1, prompt=5))
    command.main(["--budget", "0.01", "--folder", str(tmp_path), "tokens", "--only", "gl"])
    assert not [*tmp_path.iterdir()]
    before = time.perf_counter()
    command.main(["--budget", "0.2", "--folder", str(tmp_path), "tokens"])
    elapsed = 1e3 * (time.perf_counter() - before)
    mamba, gla = json.loads((tmp_path / "tokens.json").read_text())["tokens"]
    assert (mamba["stack"], gla["stack"]) == ("mamba", "gla")
    stack = Stack(d_model=32, pattern="gla", depth=1, channel="swiglu")
    assert gla["megabytes"] == pytest.approx(4e-6 * sum(map(Tensor.numel, stack.parameters())))
    assert gla["state"] == pytest.approx(1e-6 * stack.state_bytes(5))
    for found in (mamba, gla):
        assert found["rounds"] > 0
        assert 0 < found["share"] < 1
        assert found["rounds"] / 2 * found["milliseconds"] < elapsed  # at least half of them took as long
    assert "of the bound" in capsys.readouterr().out


def test_weights_of_fewer_bits_are_measured_beside_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantized, "STACKS", ("mamba", "gla"))
    monkeypatch.setattr(quantized, "measure", partial(quantized.measure, width=64, depth=1, prompt=5))
    monkeypatch.setattr(quantized, "FORMS", quantized.FORMS | {"torchao int8": absent})
    command.main(["--budget", "0.01", "--folder", str(tmp_path), "quantized", "--only", "gl"])
    assert not [*tmp_path.iterdir()]
    command.main(["--budget", "0.05", "--folder", str(tmp_path), "quantized"])
    rows = json.loads((tmp_path / "quantized.json").read_text())["quantized"]
    assert [(row["stack"], row["weights"]) for row in rows] == [
        (stack, form) for stack in ("mamba", "gla") for form in ("float32", "bfloat16", "int8", "int4")
    ]
    for wide, half, byte, few in (rows[:4], rows[4:]):
        assert wide["times"] == 1
        assert half["megabytes"] == pytest.approx(wide["megabytes"] / 2)
        assert few["megabytes"] < byte["megabytes"] < half["megabytes"]
    assert "torchao int8 is absent: not here" in capsys.readouterr().out


def absent(_: Stack) -> Stack:
    raise Absent("not here")


@pytest.mark.slow
def test_torchao_multiplies_by_its_own_weights_of_eight_bits():
    found = {row.weights: row for row in quantized.measure("gla", 0.01, width=64, depth=1, prompt=5)}
    assert found["torchao int8"].megabytes < found["bfloat16"].megabytes


def test_targets_are_of_benchmarks_that_there_are():
    found = targets.all_targets()
    assert len({target.work for target in found}) == len(found)
    for target in found:
        if isinstance(target, targets.Faster):
            for point in (target.slow, target.fast):
                benchmark = BENCHMARKS[point.benchmark]
                assert point.implementation in benchmark.implementations(point.sizes.setup)
                assert point.mode in benchmark.modes
        else:
            assert target.benchmark in BENCHMARKS


def test_the_kept_targets_are_those_that_there_are():
    assert [result.work for result in kept_targets()[0]] == [target.work for target in targets.all_targets()]


def test_a_part_of_the_targets_is_not_kept(small, tmp_path, monkeypatch):
    baseline, ours = (targets.point("small", name, "forward", 64) for name in ("baseline", "ours"))
    found = [targets.Faster(work, baseline, ours, 1e-9) for work in ("one", "another")]
    monkeypatch.setattr(targets, "all_targets", lambda: found)
    command.main(["--budget", "0.01", "--folder", str(tmp_path), "targets", "--only", "one"])
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_measured_in_turn_with_a_copy(small, monkeypatch):
    """Two calls of the same length: a copy of twice as many bytes as the weights have takes as long as the token."""
    monkeypatch.setattr(targets, "timed", lambda call, inputs: "copy")
    monkeypatch.setattr(Benchmark, "work", lambda *_: "token")
    monkeypatch.setattr(Cpu, "seconds", lambda self, work: {"copy": 0.25, "token": 0.125}[work])
    result = targets.OfBandwidth("token", "decoding_mamba", 64, 0.85).measure(0.01)
    assert result.reached == pytest.approx(2 * cost_of("decoding_mamba", 64).bytes / (2 * Cpu.copied))
    assert "8 tokens/s" in result.note


def test_a_target_is_met_missed_or_not_measured(small):
    baseline, ours, elsewhere = (
        targets.point("small", name, "forward", 64) for name in ("baseline", "ours", "elsewhere")
    )
    easy, hard = (targets.Faster("work", baseline, ours, bound).measure(0.01) for bound in (1e-9, 1e9))
    assert (easy.met, hard.met) == (True, False)
    assert targets.Faster("work", baseline, ours, 1e-9, at_least=False).measure(0.01).met is False
    absent = targets.Faster("work", elsewhere, ours, 1.0).measure(0.01)
    assert (absent.reached, absent.met, absent.note) == (None, None, "No module named 'elsewhere'")


def test_the_memory_of_a_target(monkeypatch):
    peaks = {targets.LONG: 8e8, targets.SHORT: 1e8}
    monkeypatch.setattr(Cpu, "peak", lambda self, point: peaks[point.sizes.length])
    grown = targets.Peak("work", "causal_conv1d", "forward", growth=True, bound=4.3).measure(0.01)
    assert (grown.reached, grown.met) == (8.0, False)
    over = targets.Peak("work", "causal_conv1d", "forward", growth=False, bound=4.0).measure(0.01)
    assert over.reached == pytest.approx(8e8 / (2 * targets.LONG * 1024 * 4), rel=0.01)
    monkeypatch.setattr(Cpu, "peak", lambda self, point: None)
    assert targets.Peak("work", "causal_conv1d", "forward", growth=False, bound=4.0).measure(0.01).met is None


def test_targets_are_printed_and_written(small, monkeypatch, tmp_path, capsys):
    baseline, ours = (targets.point("small", name, "forward", 64) for name in ("baseline", "ours"))
    monkeypatch.setattr(targets, "all_targets", lambda: [targets.Faster("our work", baseline, ours, 1e9)])
    command.main(["--folder", str(tmp_path), "targets"])
    assert re.search(r"our work .*at least 1e\+09 +no", capsys.readouterr().out)
    record = json.loads((tmp_path / "targets.json").read_text())
    assert [targets.Result(**row).met for row in record["targets"]] == [False]


def test_importing_the_package_is_light():
    code = "import sys, experiments.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_is_loaded_beside_reading_it(tmp_path, monkeypatch, capsys):
    """In this process; in its own, and folders of a gigabyte, in tests/pretrained/test_memory.py."""
    monkeypatch.setattr(loading, "_in_own_process", lambda *given: json.loads(json.dumps(loading._here(*given))))
    small = {"depth": 2, "d_model": 32, "vocab_size": 50}
    folders = {
        name: dataclasses.replace(each, options={**each.options, **small}) for name, each in loading.FOLDERS.items()
    }
    monkeypatch.setattr(loading, "FOLDERS", folders)
    monkeypatch.setattr(loading, "NARROW", {"vocab_size": 40})
    command.main(["--budget", "0.01", "--folder", str(tmp_path), "loading", "--only", "mix"])
    assert not [*tmp_path.iterdir()]
    command.main(["--budget", "0.01", "--folder", str(tmp_path), "loading"])
    found = json.loads((tmp_path / "loading.json").read_text())["loading"]
    assert [each["name"] for each in found] == [*loading.FOLDERS]
    for each in found:
        assert len(each["rounds"]) >= 3
        assert all(0 < clock < 10 and 0 < processor < 20 for one in each["rounds"] for clock, processor in one)
    shown = loading.Loading("a", 1.0, 1.1, [[[2, 1], [3, 4], [1, 1]], [[1, 2], [2, 3], [1, 0.5]]])
    assert (shown.times, shown.processor_times(), shown.processor_times(narrow=True)) == (1.75, 3, 2.5)
    assert "cpu times less narrow" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_models_are_measured_beside_what_one_would_pick_instead(tmp_path, monkeypatch, capsys):
    """Of the same weights: a Llama, whose cache is lengthened, beside transformers; llama.cpp where it is not there."""
    small = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    monkeypatch.setattr(peers, "MODELS", {"llama": peers.MODELS["llama 130M"] | small})
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for name in ("PROMPTS", "CONTEXTS"):
        monkeypatch.setattr(peers, name, (8, 16))
    monkeypatch.setattr(decode, "MODELS", peers.MODELS)
    monkeypatch.setattr(decode, "PROMPTS", (8,))
    monkeypatch.setattr(decode, "MemoryRates", partial(decode.MemoryRates, 2**24))
    options = {"only": "", "peers": ("transformers", "llama.cpp"), "rows": (1, 4), "contexts": (8, 16), "rounds": 1}
    decode.run(Namespace(folder=tmp_path, **options))
    absent, *rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert absent["absent"] == "llama-cpp-python is not installed"
    places = [(row["implementation"], row["rows"], row["context"]) for row in rows]
    assert places == [(name, n, c) for n in (1, 4) for c in (8, 16) for name in ("seqarch", "transformers")]
    assert all(row["apart"] < 1e-5 and row["rounds"] == 1 for row in rows)
    assert (tmp_path / "decode.png").exists()
    assert "of the ceiling" in capsys.readouterr().out


def test_a_lengthened_cache_is_that_of_the_context(tmp_path):
    settings = peers.MODELS["llama 130M"] | {"vocab_size": 64, "num_hidden_layers": 1}
    models.load_theirs(settings).save_pretrained(tmp_path)
    theirs, ours = peers.Theirs(tmp_path, settings), peers.Ours(tmp_path)
    prompt = torch.arange(8)[None]
    with torch.no_grad():
        for peer in (theirs, ours):
            peer.read(prompt)
            peer.lengthen(20)
        assert torch.allclose(theirs.step(prompt[:, 0]), ours.step(prompt[:, 0]), atol=1e-4)
    (cache,) = theirs.cache.values()
    assert cache.get_seq_length() == 21
