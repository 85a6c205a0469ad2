from __future__ import annotations

import pytest
import torch

from experiments.training.checkpoints import TrainState
from experiments.training.cost_meter import CostMeter, EnergyMeter, measured_peak, utilisation
from tests.support.runs import tiny_config, train_here

CPU = torch.device("cpu")


def counter(powercap, name, microjoules, most=10**6):
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


def test_energy_is_summed_over_processors_and_not_over_their_parts(tmp_path):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        counter(tmp_path, name, 100)
    meter = EnergyMeter(CPU, tmp_path)
    counter(tmp_path, "intel-rapl:0", 2_100, 10**6)
    counter(tmp_path, "intel-rapl:1", 1_100, 10**6)
    counter(tmp_path, "intel-rapl:0:0", 900_000)
    assert meter.joules() == pytest.approx(3e-3)
    assert meter.joules() == 0


def test_a_counter_that_begins_again_is_made_up_for(tmp_path):
    counter(tmp_path, "intel-rapl:0", 900_000)
    meter = EnergyMeter(CPU, tmp_path)
    counter(tmp_path, "intel-rapl:0", 300_000)
    assert meter.joules() == pytest.approx(0.4)


def test_a_machine_that_reports_no_energy_has_none(tmp_path):
    assert EnergyMeter(CPU, tmp_path / "nothing").joules() is None


def test_processors_are_counted_once_a_machine_and_the_peak_is_the_highest(tmp_path, monkeypatch):
    counter(tmp_path, "intel-rapl:0", 0)
    monkeypatch.setattr("experiments.training.cost_meter.POWERCAP", tmp_path)
    first, state = CostMeter(CPU), TrainState()
    with monkeypatch.context() as other:
        other.setenv("LOCAL_RANK", "1")
        second = EnergyMeter(CPU)
    counter(tmp_path, "intel-rapl:0", 900_000)
    assert second.joules() is None
    others = [(None, 2**50, 7), (2.0, 5, 0)]
    monkeypatch.setattr("experiments.training.processes.gather", lambda own: [own, *others])
    first.add_training(state)
    assert state.joules == pytest.approx(2.9)
    assert (state.peak_memory_bytes, state.peak_gpu_memory_bytes) == (2**50, 7)


def test_energy_and_time_reach_the_record_and_continue_after_a_stop(tmp_path, monkeypatch):
    counter(tmp_path, "intel-rapl:0", 0, 10**12)
    monkeypatch.setattr("experiments.training.cost_meter.POWERCAP", tmp_path)
    spent = iter(range(0, 10**9, 10**6))
    lap = CostMeter.lap

    def consuming(meter):
        counter(tmp_path, "intel-rapl:0", next(spent), 10**12)
        return lap(meter)

    monkeypatch.setattr(CostMeter, "lap", consuming)
    config = tiny_config(tmp_path, machine__price_per_hour=36.0, machine__peak_flops=1e9)
    code, folder = train_here(config)
    cost = folder.record()["cost"]
    assert code == 0
    # A joule per lap: one each for the training and the evaluation of two stretches, and for what lies between.
    assert 4 <= cost["joules"] <= 8
    assert cost["price"] == pytest.approx((cost["train_seconds"] + cost["eval_seconds"]) / 100)
    assert cost["utilisation"] == pytest.approx(cost["flops"] / cost["train_seconds"] / 1e9)
    assert (cost["peak_flops"], cost["peak_flops_source"]) == (1e9, "given")


def test_utilisation_is_of_the_models_own_flops(tmp_path):
    _, folder = train_here(tiny_config(tmp_path, model__pattern="mamba2", train__activation_checkpointing=True))
    plain = train_here(tiny_config(tmp_path, model__pattern="mamba2"))[1].record()["cost"]
    cost = folder.record()["cost"]
    assert cost["flops"] == plain["flops"]  # What recomputing repeats is not the model's.
    assert cost["peak_flops_source"] == "a matrix product, measured"
    assert 0 < cost["utilisation"] < 1
    assert "price" not in cost


def test_a_measured_peak_is_that_of_a_matrix_product():
    peak = measured_peak(CPU, "float32")
    assert 1e8 < peak < 1e15
    assert measured_peak(CPU, "float32") == peak  # Measured once.
    assert utilisation(2e9, 2.0, 1e10) == pytest.approx(0.1)
