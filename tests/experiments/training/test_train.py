from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from experiments.runs.folder import RunFolder
from experiments.runs.recorded import read_run
from experiments.train import main
from experiments.training.checkpoints import verified
from experiments.training.loop import Run
from experiments.training.lr_scheduler import learning_rate
from experiments.training.progress import Heartbeat, ProgressFile
from experiments.training.step_monitor import StepMonitor
from experiments.util.errors import RunnerError
from experiments.util.files import read_json
from experiments.util.interrupts import Interrupts, Preempted
from experiments.util.process_identity import is_alive, process_identity
from tests.support.paths import ROOT
from tests.support.runs import command_line, last, same, tensors, tiny_config, train_here, until


def test_a_finished_run_leaves_the_whole_record(tmp_path):
    code, folder = train_here(tiny_config(tmp_path, model__mixers={"attention": {"conv_width": 4}}))
    record = folder.record()
    assert (code, record["status"], record["attempt"]) == (0, "finished", 1)
    assert [line["step"] for line in folder.metrics()] == [5, 10]
    assert {"loss", "lr", "grad_norm", "validation_accuracy", "tokens_per_second"} <= folder.metrics()[0].keys()
    model = Run(folder.config(), folder).model
    cost = record["cost"]
    assert (cost["steps"], cost["tokens"]) == (10, 10 * 8 * 16)
    assert cost["flops"] == 3 * 10 * model.flops(16, 8)
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["train_seconds"])
    assert cost["peak_memory_bytes"] > 10**7
    assert record["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["model"]["state_bytes"] == model.state_bytes(16)
    assert record["metric"]["chance"] == 0.5
    assert len(record["data"]["hash"]) == 64
    assert record["backends"].keys() == {"attention", "causal_conv1d"}
    assert record["seeds"]["initialisation"] == 0
    assert record["environment"]["packages"]["torch"] == torch.__version__
    assert {"commit", "dirty", "library"} <= record["code"].keys()
    assert record["results"]["checkpoint_step"] in (5, 10)
    assert record["results"]["validation"] == max(line["validation_accuracy"] for line in folder.metrics())
    assert sorted(path.name for path in folder.path.iterdir() if path.name != "code.diff") == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "run.json",
    ]


def test_other_lengths_are_tested_once_and_chosen_by_nothing(tmp_path):
    _, folder = train_here(tiny_config(tmp_path, task={"name": "parity", "length": 16, "test_lengths": [32, 24]}))
    results, run = folder.record()["results"], Run(folder.config(), folder)
    assert {split: each["length"] for split, each in results["tests"].items()} == run.task.tests
    for split, each in results["tests"].items():
        assert each["chance"] == run.task.chance(split)[0]
        assert {"accuracy", "sequence_accuracy", "loss"} < each.keys()
        assert each["by"]["position"]["edges"][-1] == each["length"] + 1
    assert results["by"] == results["tests"]["test"]["by"]
    assert results["by"]["position"]["x"] == list(range(1, 17))
    counts, values = (results["by"]["position"][name] for name in ("count", "value"))
    mean = sum(map(math.prod, zip(counts, values, strict=True))) / sum(counts)
    assert mean == pytest.approx(results["test"], abs=1e-4)
    assert results["test"] == results["tests"]["test"]["accuracy"]
    assert results["curve"]["x"] == [16, 24, 32]
    lengths = ("test", "test_24", "test_32")
    assert results["curve"]["y"] == [results["tests"][split]["accuracy"] for split in lengths]
    assert results["curve"]["trained_to"] == 16
    assert not any("32" in name for line in folder.metrics() for name in line)
    assert folder.record()["model"]["state_length"] == 32
    assert "items" not in results
    entry = read_run(folder.path)
    for split, each in results["tests"].items():
        items = entry.items(split)
        assert len(items) == run.task.config.test_examples
        assert items.mean() == pytest.approx(each["accuracy"], rel=1e-12)
        assert (items == 1).mean() == each["sequence_accuracy"]


def test_the_score_of_every_test_sequence_is_kept(tmp_path, monkeypatch):
    text = {"name": "stdlib_text", "length": 16, "eval_length": 64, "validation_files": 2, "test_files": 5}
    for name, task, count in (("mqar", {}, 32), ("text", {"task": text}, 5)):
        _, folder = train_here(tiny_config(tmp_path / name, train__steps=5, **task))
        run, results = read_run(folder.path), folder.record()["results"]
        assert len(run.items()) == count
        assert run.items().mean() == pytest.approx(results["test"], rel=1e-6)
        assert run.items("test_99") is None
        assert not any("items" in name for line in folder.metrics() for name in line)
    folder.update(results={**results, "items": "u1/4:eJx"})
    with pytest.raises(RunnerError, match=f"{folder.path}: results of the split test: .* holds no item scores"):
        read_run(folder.path).items()
    monkeypatch.setattr("experiments.training.evaluate.MOST_ITEMS", 31)
    _, folder = train_here(tiny_config(tmp_path / "many", train__steps=5))
    assert read_run(folder.path).items() is None


def test_the_same_configuration_gives_the_same_bits(tmp_path):
    folders = [train_here(tiny_config(tmp_path / name))[1] for name in ("one", "two")]
    one, two = (tensors(last(folder)) for folder in folders)
    assert same(one, two)
    other = tensors(last(train_here(tiny_config(tmp_path, seed=1))[1]))
    assert not torch.equal(one["model.embedding.weight"], other["model.embedding.weight"])


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(tmp_path, monkeypatch):
    whole = train_here(tiny_config(tmp_path / "whole", train__steps=20))[1]
    config, step = tiny_config(tmp_path / "torn", train__steps=20), Run.step

    def interrupted_at_13(run):
        if run.state.step == 13:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "step", interrupted_at_13)
    code, torn = train_here(config)
    assert (code, torn.status()) == (130, "interrupted")
    torn.append_metrics(step=11, loss=0.0)
    monkeypatch.setattr(Run, "step", step)
    code, torn = train_here(config)
    assert (code, torn.status(), torn.record()["attempt"]) == (0, "finished", 2)
    assert same(tensors(last(whole)), tensors(last(torn)))
    for ours, theirs in zip(whole.metrics(), torn.metrics(), strict=True):
        assert ours | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}


def test_steps_are_logged_at_no_reading_of_the_device_more(tmp_path, monkeypatch):
    """Each once, those of evaluations among them, to the bit where the run was stopped; and the run is the same one."""
    read, readings = StepMonitor.read, []
    monkeypatch.setattr(StepMonitor, "read", lambda monitor: readings.append(1) or read(monitor))
    options = {"train__steps": 40, "train__eval_every": 20}
    silent = train_here(tiny_config(tmp_path / "silent", train__log_every=0, **options))[1]
    assert [line["step"] for line in silent.metrics()] == [20, 40]
    without, config = len(readings), tiny_config(tmp_path / "logged", train__log_every=3, **options)
    logged = train_here(config)[1]
    assert len(readings) == 2 * without
    assert [line["step"] for line in logged.metrics()] == sorted({*range(3, 40, 3), 20, 40})
    assert [line["step"] for line in logged.evaluations()] == [20, 40]
    first = logged.metrics()[0]
    assert list(first) == ["step", "loss", "grad_norm", "lr", "tokens_per_second"]
    assert first["lr"] == learning_rate(config.train, 2)
    assert min(line["tokens_per_second"] for line in logged.metrics()) > 0
    assert same(tensors(last(silent)), tensors(last(logged)))
    assert logged.path.name == silent.path.name == tiny_config(tmp_path / "logged", **options).folder().name

    step = Run.step

    def preempted_at_31(run):
        run.interrupts.requested = run.state.step == 30
        return step(run)

    monkeypatch.setattr(Run, "step", preempted_at_31)
    torn = train_here(tiny_config(tmp_path / "torn", train__log_every=3, **options))[1]
    assert (torn.status(), torn.metrics()[-1]["step"]) == ("preempted", 30)
    monkeypatch.setattr(Run, "step", step)
    assert train_here(torn.config())[0] == 0
    for ours, theirs in zip(logged.metrics(), torn.metrics(), strict=True):
        assert ours | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}
    assert "metrics_lost" not in torn.record()


@pytest.mark.parametrize("file", ["manifest.json", "step-000010"])
def test_an_evaluation_torn_between_its_files_leaves_no_trace(tmp_path, monkeypatch, file):
    """The evaluation at step 10 has written its line of metrics, and its checkpoint but for the last moves."""

    def scored(scores):
        monkeypatch.setattr(
            "experiments.training.loop.evaluate_split", lambda *_: {"accuracy": next(scores), "loss": 1.0}
        )

    scored(iter([0.1, 0.2, 0.3, 0.3]))
    whole = train_here(tiny_config(tmp_path / "whole", train__steps=15))[1]
    config, replace, writes = tiny_config(tmp_path / "torn", train__steps=15), os.replace, []

    def torn_at_step_10(source, target):
        writes.append(target.name)
        if target.name == file and (file == "step-000010" or writes.count(file) == 2):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", torn_at_step_10)
    scored(iter([0.1, 0.2]))
    code, torn = train_here(config)
    assert (code, last(torn).name, len(torn.metrics())) == (130, "step-000005", 2)
    monkeypatch.setattr("os.replace", replace)
    scored(iter([0.2, 0.3, 0.3]))
    assert train_here(config)[0] == 0
    assert [line["step"] for line in torn.metrics()] == [5, 10, 15]
    assert torn.record()["results"] == whole.record()["results"]
    assert [path.name for path in sorted(torn.checkpoints.iterdir())] == ["step-000010", "step-000015"]
    assert same(tensors(last(whole)), tensors(last(torn)))


def test_a_run_that_another_sweep_has_finished_meanwhile_is_left_alone(tmp_path, monkeypatch):
    _, folder = train_here(tiny_config(tmp_path))
    record = folder.run_file.read_bytes()
    monkeypatch.setattr("sys.argv", ["train", str(folder.path)])
    assert main() == 0
    assert folder.run_file.read_bytes() == record
    assert not folder.lock.path.exists()


def test_a_diverging_run_fails_and_names_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    step = Run.step

    def diverging(run):
        if run.state.step == 7:
            with torch.no_grad():
                run.model.embedding.weight.fill_(math.nan)
        return step(run)

    monkeypatch.setattr(Run, "step", diverging)
    code, folder = train_here(tiny_config(tmp_path))
    record = folder.record()
    assert (code, record["status"]) == (1, "failed")
    assert "diverged at step 8" in record["reason"]
    assert f"the last good checkpoint is {folder.checkpoints / 'step-000005'}" in record["reason"]
    assert record["reason"] in capsys.readouterr().err
    assert last(folder).name == "step-000005"
    assert all(torch.isfinite(value).all() for value in tensors(last(folder)).values())


def test_a_run_that_diverges_at_once_has_no_checkpoint_to_name(tmp_path):
    code, folder = train_here(tiny_config(tmp_path, train__lr=1e30, train__grad_clip=0.0))
    assert code == 1
    assert "no checkpoint had been written yet" in folder.record()["reason"]
    assert not list(folder.checkpoints.iterdir())


def test_a_checkpoint_is_never_written_from_a_broken_model(tmp_path, monkeypatch):
    """The loss of step 5 is finite, and its update breaks the model that the evaluation after it would keep."""
    step = Run.step

    def breaking(run):
        loss = step(run)
        if run.state.step == 4:
            with torch.no_grad():
                run.model.head.weight.fill_(math.nan)
        return loss

    monkeypatch.setattr(Run, "step", breaking)
    code, folder = train_here(tiny_config(tmp_path))
    assert code == 1
    assert "validation loss is nan" in folder.record()["reason"]
    assert not list(folder.checkpoints.iterdir())


def test_an_unexpected_error_is_recorded_too(tmp_path, monkeypatch, capsys):
    def broken(run):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Run, "step", broken)
    code, folder = train_here(tiny_config(tmp_path))
    assert (code, folder.record()["reason"]) == (1, "ZeroDivisionError: oh")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "steps"), [(0.0, 5), (1.1, 20), (None, 20)])
def test_training_stops_at_the_target(tmp_path, target, steps):
    _, folder = train_here(tiny_config(tmp_path, train__steps=20, train__target=target))
    assert folder.record()["cost"]["steps"] == steps


def test_training_stops_when_patience_is_at_its_end(tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.9])
    monkeypatch.setattr("experiments.training.loop.evaluate_split", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    _, folder = train_here(tiny_config(tmp_path, train__steps=50, train__patience=2))
    record = folder.record()
    assert record["cost"]["steps"] == 20
    assert (record["results"]["checkpoint_step"], record["results"]["validation"]) == (10, 0.6)


def test_the_last_checkpoint_is_tested_where_asked(tmp_path, monkeypatch):
    scores = iter([0.9, 0.6, 0.7])
    for module in ("loop", "evaluate"):
        monkeypatch.setattr(
            f"experiments.training.{module}.evaluate_split", lambda *_: {"accuracy": next(scores), "loss": 1.0}
        )
    _, folder = train_here(tiny_config(tmp_path, train__eval_checkpoint="last"))
    results = folder.record()["results"]
    assert (results["checkpoint_step"], results["validation"], results["test"]) == (10, 0.6, 0.7)


def test_experts_losses_and_metrics_reach_the_run(tmp_path):
    _, folder = train_here(tiny_config(tmp_path, model__channel="moe"))
    assert folder.status() == "finished"
    (loads,) = [value for name, value in folder.metrics()[0].items() if name.endswith("/load")]
    assert sum(loads) == pytest.approx(1)


def test_a_full_disk_stops_the_run_and_spoils_nothing(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, train__steps=20)
    link = os.replace

    def full(source, target):
        if str(target).endswith("step-000010"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(source, target)

    monkeypatch.setattr("os.replace", full)
    code, folder = train_here(config)
    assert code == 1
    assert "step-000010: No space left on device" in folder.record()["reason"]
    assert verified(last(folder))["state"]["step"] == 5
    assert "No space left" in capsys.readouterr().err


def test_a_disk_too_full_for_the_record_is_reported_on_the_terminal(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path)

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RunFolder(config.folder()).create(config)
    monkeypatch.setattr("experiments.util.environment.code_version", lambda: ({"commit": None}, "", 0o666))
    monkeypatch.setattr("experiments.util.files.os.replace", full)
    assert train_here(config)[0] == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {config.folder() / 'run.json'}: No space left")


def test_a_task_that_cannot_be_made_is_one_line(tmp_path, capsys):
    config = tiny_config(tmp_path, task={"name": "stdlib_text", "length": 16, "eval_length": 10**8})
    code, folder = train_here(config)
    reason = "task stdlib_text: no test file has eval_length = 100000000 bytes; choose fewer"
    assert (code, folder.record()["reason"]) == (1, reason)
    assert capsys.readouterr().err == f"failed: {reason}\n"


def test_data_that_changed_since_an_earlier_attempt_is_refused(tmp_path, capsys):
    """Until it is as before; the record of what it was is not lost by the attempts between."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"{i} words " * 20)
    task = {"name": "corpus_text", "folder": str(texts), "length": 16, "eval_length": 64, "most_copied": 1.0}
    config = tiny_config(tmp_path / "runs", task=task, train__steps=2)
    code, folder = train_here(config)
    data, attempt = folder.record()["data"], 1
    assert code == 0
    folder.update(status="preempted")
    for added in ("new.txt", "another.txt"):
        (texts / added).write_text("something else " * 20)
        assert train_here(config)[0] == 1
        attempt += 1
        reason = folder.record()["reason"]
        assert reason.startswith(f"the data of {folder.path.name} changed since an earlier attempt at it: sha256 was ")
        assert reason.endswith(f"bring the former data back, or move {folder.path} away to train anew")
        assert (folder.record()["data"], folder.record()["attempt"]) == (data, attempt)
    assert "Traceback" not in capsys.readouterr().out
    for added in ("new.txt", "another.txt"):
        (texts / added).unlink()
    assert train_here(config)[0] == 0


def test_a_damaged_line_of_metrics_is_named(tmp_path, capsys):
    config = tiny_config(tmp_path)
    folder = train_here(config)[1]
    whole = folder.metrics_file.read_text()
    folder.metrics_file.write_text('{"step": 1 oops}\n' + whole)
    folder.run_file.unlink()
    assert train_here(config)[0] == 1
    assert folder.record()["reason"] == f"line 1 of {folder.metrics_file} is damaged; delete that line"
    assert "Traceback" not in capsys.readouterr().out


def test_progress_shows_what_is_left(tmp_path):
    clock = iter([0.0, 10.0, 10.1, 20.0])
    folder = RunFolder(tmp_path)
    progress = ProgressFile(folder, steps=100, first_step=20, clock=lambda: next(clock))
    progress.update(40, 1.0, 5.0)
    assert read_json(folder.progress_file)["seconds_left"] == pytest.approx(30.0)
    progress.update(41, 1.0, 5.0)
    assert read_json(folder.progress_file)["step"] == 40
    progress.update(60, 1.0, 5.0)
    assert read_json(folder.progress_file) == {
        **{"step": 60, "steps": 100, "loss": 1.0, "tokens_per_second": 5.0},
        "seconds_left": pytest.approx(20.0),
    }


def test_a_training_process_stops_when_the_one_that_started_it_is_gone(tmp_path):
    config = tiny_config(tmp_path, train__steps=10**6)
    folder = RunFolder(config.folder())
    folder.create(config)
    command = command_line("experiments.train", str(folder.path), "--parent")
    code = f"import os, subprocess; subprocess.run([*{command!r}, str(os.getpid())])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_for_training(folder, parent)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not folder.lock.is_held())
    assert folder.status() == "preempted"


def test_a_process_that_has_ended_and_was_not_asked_how_is_not_alive():
    """Such as a launcher's worker that was killed, while its own parent is busy."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = process_identity(child.pid)
    assert is_alive(identity)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(identity)
    child.wait()


@pytest.fixture
def interrupts() -> Interrupts:
    interrupts = Interrupts()
    interrupts.obey()
    return interrupts


def test_a_signal_is_noted_where_something_could_be_torn(interrupts):
    for _ in range(2):  # A scheduler may send it to torchrun and to each process.
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.requested
    with pytest.raises(Preempted), interrupts.at_once():
        pytest.fail("what was noted before is raised first")


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_sigterm_waits_while_it_is_delayed_and_sigint_does_not(interrupts, number, raised):
    went_on = []

    def work():
        with interrupts.at_once():
            with interrupts.delayed():
                os.kill(os.getpid(), number)
                went_on.append("to the end of the delay")
            went_on.append("beyond it")

    with pytest.raises(raised):
        work()
    assert went_on == (["to the end of the delay"] if raised is Preempted else [])


def test_a_second_signal_tears_nothing_that_the_first_one_set_off(interrupts):
    @contextmanager
    def again():
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted), interrupts.at_once(), again():
        os.kill(os.getpid(), signal.SIGTERM)


def wait_for_training(folder: RunFolder, process: subprocess.Popen) -> None:
    """Until the run has written its first checkpoint."""
    until(lambda: process.poll() is not None or list(folder.checkpoints.glob("step-*")))
    assert process.poll() is None


def test_sigterm_preempts_with_a_checkpoint_and_a_second_process_is_kept_out(tmp_path):
    config = tiny_config(tmp_path, train__steps=10**6)
    folder = RunFolder(config.folder())
    folder.create(config)
    command = command_line("experiments.train", str(folder.path))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_training(folder, process)
        with pytest.raises(RunnerError, match=f"trained by process {process.pid}"):
            folder.lock.acquire()
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 75
    finally:
        process.kill()
    assert folder.status() == "preempted"
    assert folder.record()["reason"].endswith(f"a checkpoint of step {folder.record()['cost']['steps']}")
    assert verified(last(folder))["state"]["step"] == folder.record()["cost"]["steps"]
    assert not folder.progress_file.exists()
    folder.lock.acquire()


def test_routing_is_recorded_of_the_training_batch(tmp_path, monkeypatch):
    """Not of the last validation batch, on which the model is evaluated in between."""
    config = tiny_config(tmp_path, model__channel="moe", train__steps=1)
    folder, evaluate, seen = RunFolder(config.folder()), Run.evaluate, {}

    def watched(run):
        seen.update(run.model.router_metrics())
        evaluate(run)
        assert run.model.router_metrics() != seen

    monkeypatch.setattr(Run, "evaluate", watched)
    assert train_here(config)[0] == 0
    (line,) = folder.metrics()
    assert seen
    assert {name: line[name] for name in seen} == seen


def test_a_routers_bias_moves_once_a_step_and_is_kept(tmp_path, monkeypatch):
    moe = {"moe": {"expert_bias": True, "bias_rate": 1.0}}
    config, whole = (
        tiny_config(tmp_path / name, model__channel="moe", model__channels=moe, train__steps=10)
        for name in ("torn", "whole")
    )
    step = Run.step

    def interrupted_at_7(run):
        if run.state.step == 7:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "step", interrupted_at_7)
    code, folder = train_here(config)
    (bias,) = (value for name, value in tensors(last(folder)).items() if name.endswith("expert_bias"))
    assert code == 130
    assert bias.any()
    assert (bias.abs() <= 5).all()  # steps of 1, and the checkpoint is of step 5
    assert torch.equal(bias, bias.round())
    monkeypatch.setattr(Run, "step", step)
    assert train_here(config)[0] == 0
    assert same(tensors(last(train_here(whole)[1])), tensors(last(folder)))


def test_a_process_whose_lock_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.training.progress.HEARTBEAT_SECONDS", 0.0)
    folder = RunFolder(tmp_path)
    folder.lock.acquire()
    stopped = threading.Event()
    monkeypatch.setattr("experiments.training.progress.os.kill", lambda pid, number: stopped.set())
    with Heartbeat(folder, parent=None):
        folder.lock.path.write_text(other := '{"pid": 1, "host": "elsewhere", "started": "1"}')
        assert stopped.wait(10)
    assert folder.lock.path.read_text() == other


def test_a_run_that_was_taken_over_leaves_the_record_to_the_other(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path)
    folder, train = RunFolder(config.folder()), Run.train

    def overtaken(run):
        results = train(run)
        folder.lock.path.write_text('{"pid": 1, "host": "elsewhere", "started": "1"}')
        folder.update(status="running", attempt=2)
        return results

    monkeypatch.setattr(Run, "train", overtaken)
    assert train_here(config)[0] == 1
    assert (folder.status(), folder.record()["attempt"]) == ("running", 2)
    assert "was taken over by process 1 on elsewhere" in capsys.readouterr().err
