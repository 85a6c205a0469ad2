"""Decoding is measured from states of the right size and content, resumed by rounds, and decided by its margins."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.bench import decoding_rounds, load
from experiments.bench.decoding import FILLED, Condition, Decoder, longest_contexts, needed_bytes, used_bytes
from experiments.bench.decoding_rounds import ROUND, missing
from experiments.studies import decoding, page, plan
from experiments.studies.decoding import MODELS, RECORDED, Decoding, claims, configurations, planned
from experiments.studies.measured import Measured, TimeClaim, decide, read
from experiments.studies.plan import content
from experiments.studies.records import FILE
from experiments.util.errors import RunnerError
from experiments.util.plot_style import figure
from seqarch.layers import measured_state_bytes
from seqarch.models import LanguageModel, LMConfig

TINY = Condition("tiny", 64, 8, 64, (32, 64, 200), prefilled=64, rounds=2, threads=1, passes=1, check_from=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A token a burst, of memory that is small."""
    monkeypatch.setattr("experiments.bench.decoding.BURST", 0.0)
    monkeypatch.setattr(load, "READ_BYTES", 2**20)
    monkeypatch.setattr(decoding_rounds, "MemoryRates", lambda: load.MemoryRates(2**20))


@pytest.fixture(scope="module")
def configs():
    return configurations(TINY)


@pytest.mark.parametrize("condition", [RECORDED[0], RECORDED[-1]], ids=lambda condition: condition.name)
def test_models_have_about_equal_parameters(condition):
    with torch.device("meta"):
        counts = {name: LanguageModel(config).num_parameters() for name, config in configurations(condition).items()}
    assert max(counts.values()) < 1.01 * min(counts.values()), counts


@pytest.mark.parametrize("name", MODELS)
def test_states_are_as_large_and_as_long_as_their_context(configs, name):
    """As those that were read: by the formula, and by the model's next token."""
    decoder = Decoder(name, configs[name], TINY, longest=200)
    assert set(decoder.states) == {32, 64, 200, FILLED}
    for key, state in decoder.states.items():
        context = TINY.prefilled if key == FILLED else int(key)
        assert used_bytes(state) == decoder.model.state_bytes(context)
    _, whole = decoder.model(torch.zeros(1, 64, dtype=torch.int64))
    assert used_bytes(whole) == measured_state_bytes(whole) == used_bytes(decoder.states[64])
    for leaf in tensors(decoder.states[200]) + tensors(decoder.states[FILLED]):
        assert bool(leaf.isfinite().all())
        assert leaf.numel() == 0 or bool(leaf.any(dim=-1).float().mean() > 0.5)  # written, not pages of zeros


def tensors(part):
    if isinstance(part, torch.Tensor):
        return [part]
    return [leaf for each in part for leaf in tensors(each)] if isinstance(part, tuple) else []


@pytest.mark.parametrize("name", ["attention", "mla", "sliding_window", "gated_delta_net", "attention in 1 of 4"])
def test_decoding_is_that_of_generate_and_begins_each_time_at_the_context(configs, name):
    decoder = Decoder(name, configs[name], TINY, longest=64)
    expected = decoder.model.generate(decoder._prompt, max_new_tokens=5)[0]
    logits, state = decoder.model(decoder._prompt)
    token, found = logits[:, -1].argmax(-1), []
    start = decoder.states[64]
    for _ in range(4):
        found.append(int(token))
        with torch.no_grad():
            token, _, start = decoder.decode(token, start)
    assert [*found, int(token)] == expected[64:].tolist()
    for _ in range(3):
        assert decoder.seconds_per_token(32) > 0
    lengths = [part.cache.length for layer in decoder.states[32] for part in layer if hasattr(part, "cache")]
    assert set(lengths) <= {32}
    assert used_bytes(state) == used_bytes(decoder.states[64])


def test_models_that_do_not_fit_give_up_their_longest_contexts(configs):
    needed = {name: needed_bytes(config, TINY) for name, config in configs.items()}
    everything = sum(weights + states[200] + states[64] for weights, states in needed.values())
    assert set(longest_contexts(configs, TINY, everything).values()) == {200}
    largest = max(needed, key=lambda name: needed[name][1][200])
    assert longest_contexts(configs, TINY, everything - 1) == dict.fromkeys(configs, 200) | {largest: 64}
    with pytest.raises(RunnerError, match=r"tiny: .* GiB do not hold all models at once"):
        longest_contexts(configs, TINY, everything / 2)


def test_logits_that_are_not_finite_are_no_measurement():
    config = LMConfig(vocab_size=64, d_model=32, pattern="attention", depth=1)
    decoder = Decoder("attention", config, TINY, longest=64)
    with torch.no_grad():
        decoder.model.head.weight[3] = math.nan
    with pytest.raises(RunnerError, match="attention decodes logits that are not finite at the context 64"):
        decoder.seconds_per_token(64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contexts": (64, 32)}, "contexts must ascend"),
        ({"prefilled": 48}, "prefilled must be one of the contexts"),
        ({"check_from": 64}, r"check_from must be below prefilled \(64\), got 64"),
    ],
)
def test_a_condition_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_the_share_of_others(monkeypatch, tmp_path):
    """Of 100 ticks on all processors 80 were busy, 30 of them this process's and 10 the hypervisor's."""
    stat, own = tmp_path / "stat", [0.0]
    monkeypatch.setattr(load, "STATISTICS", stat)
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(load.os, "times", lambda: type("Times", (), {"user": own[0], "system": 0.0}))
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\n")
    others = load.Others()
    stat.write_text("cpu 60 5 5 15 5 0 0 10 40 0\n")
    own[0] = 0.3
    assert others.share() == pytest.approx(0.5)
    stat.unlink()
    assert others.share() is None


def tiny_study(alone=1.0, **changes):
    study = Decoding()
    study.versions = {"small": planned((replace(TINY, **changes),), alone)}  # type: ignore[misc]
    return study


def complete(study, folder):
    return study.complete(study.versions["small"], folder, folder / "runs", jobs=1)


FEW = ("attention", "gla")
"""For what does not depend on which models there are."""


@pytest.fixture
def few_models(configs, monkeypatch):
    monkeypatch.setattr(decoding, "configurations", lambda condition: {name: configs[name] for name in FEW})


@pytest.fixture(scope="module")
def recorded(configs, tmp_path_factory):
    """The lines of a study that was measured with few models."""
    folder = tmp_path_factory.mktemp("decoding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "configurations", lambda condition: {name: configs[name] for name in FEW})
        patch.setattr("experiments.bench.decoding.BURST", 0.0)
        patch.setattr(decoding_rounds, "MemoryRates", lambda: load.MemoryRates(2**20))
        study = tiny_study()
        assert complete(study, folder) == 0
    return (folder / FILE).read_text(encoding="utf-8")


@pytest.mark.usefixtures("few_models")
def test_what_is_on_record_is_not_measured_again(recorded, tmp_path):
    """And a round that was lost is measured alone."""
    study, lines = tiny_study(), recorded.splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines] == ["models", "prefill", "round", "round"]
    (tmp_path / FILE).write_text(recorded, encoding="utf-8")
    assert complete(study, tmp_path) == 0
    assert (tmp_path / FILE).read_text(encoding="utf-8") == recorded
    (tmp_path / FILE).write_text("".join(lines[:2] + lines[3:]), encoding="utf-8")
    assert complete(study, tmp_path) == 0
    again = (tmp_path / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:3] == lines[:2] + lines[3:]
    assert json.loads(again[3])["number"] == 0
    assert {each for line in again[2:] for each in json.loads(line)["seconds"]} == set(FEW)


@pytest.mark.slow
def test_every_model_is_in_every_round(tmp_path):
    assert complete(tiny_study(), tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()]
    assert [set(line.get("seconds", line.get("models"))) for line in lines] == [set(MODELS)] * 4


@pytest.mark.usefixtures("few_models")
def test_a_busy_machine_is_on_record_and_does_not_count(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load.Others, "share", lambda self: 0.4)
    study = tiny_study(alone=0.3)
    assert complete(study, tmp_path) == 1
    assert "others took more than 30% of the machine again and again" in capsys.readouterr().out
    found = study.read(study.versions["small"], tmp_path)[0]
    assert (found.rounds, found.missing, found.discarded) == ([], 3, 2 * decoding_rounds.ATTEMPTS)
    lines = [json.loads(line) for line in recorded.splitlines()]
    assert missing(TINY, lines, alone=1.0)[ROUND] == []
    assert missing(TINY, [line | {"others": None} for line in lines], alone=0.0)[ROUND] == []


@pytest.mark.usefixtures("few_models")
def test_records_of_another_plan_or_machine_or_kind_are_refused(recorded, tmp_path):
    study, file = tiny_study(), tmp_path / FILE
    lines = [json.loads(line) for line in recorded.splitlines()]
    other = [line | {"plan": "another"} for line in lines]
    elsewhere = [lines[0] | {"hardware": lines[0]["hardware"] | {"cpu": "another"}}, lines[1]]
    for content_, message in ((other, "was recorded under the plan another"), (elsewhere, "the record's hardware are"),
                              ([lines[0] | {"format": 7}], "is of format 7, and this version reads 1"),
                              ([{"kind": "round", "format": 1}], "line 1 of .* is no record of a measurement"),
                              ([3], "is no record of a measurement")):  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in content_), encoding="utf-8")
        with pytest.raises(RunnerError, match=message):
            complete(study, tmp_path)
    file.write_text("".join(json.dumps(line) + "\n" for line in other), encoding="utf-8")
    plan.settle(study.versions["small"], tmp_path, recorded=False)
    with pytest.raises(RunnerError, match="has records of the plan another"):
        page.recorded(study, study.versions["small"], tmp_path)
    file.unlink()
    with pytest.raises(RunnerError, match="does not exist: run the study"):
        read(tmp_path)


def made(seconds, rounds=8, noise=0.01):
    """A condition of which all rounds are on record, with these seconds by model and context."""
    rng = np.random.default_rng(0)
    condition = replace(TINY, rounds=rounds, passes=0, check_from=0)
    sizes = {"read_weight_bytes": 900, "state_bytes": {"32": 100, "64": 200, "200": 400},
             "measured_state_bytes": {"32": 100, "64": 200}}  # fmt: skip
    common = {"plan": "made", "condition": "tiny", "others": 0.0, "bandwidth": {"copy": 5e4, "sum": 1e5}}
    lines = [{"kind": "models", "plan": "made", "condition": "tiny", "models": dict.fromkeys(seconds, sizes)}]
    for number in range(rounds):
        drift = math.exp(rng.normal())
        found = {model: {str(key): drift * value * math.exp(noise * rng.normal()) for key, value in each.items()}
                 for model, each in seconds.items()}  # fmt: skip
        lines.append({"kind": "round", "number": number, "seconds": found, **common})
    return Measured(condition, lines, alone=0.05)


def claim(kind, factor, left=("a", 32), right=("b", 32)):
    return TimeClaim("x", "x", ((left, right),), kind, factor)


@pytest.mark.parametrize(
    ("kind", "factor", "answer"),
    [
        ("more", 2, "yes"), ("more", 4, "no"), ("more", 3, "unresolved"),
        ("less", 4, "yes"), ("less", 2, "no"), ("less", 3, "unresolved"),
        ("equal", 4, "yes"), ("equal", 2, "no"), ("equal", 3, "unresolved"),
    ],
)  # fmt: skip
def test_ratios_of_a_round_decide_whatever_the_machine_drifts(kind, factor, answer):
    """The machine's speed varies by a factor of e from round to round, the ratio of the models by 1 %."""
    measured = made({"a": {32: 0.3, 64: 0.3}, "b": {32: 0.1, 64: 0.1}})
    decision = decide(measured, claim(kind, factor))
    assert decision.verdict.answer == answer
    assert decision.interval is not None
    assert math.exp(decision.interval.estimate) == pytest.approx(3, rel=0.02)


def test_what_is_not_measured_is_unresolved():
    measured = made({"a": {32: 0.3}, "b": {32: 0.1}})
    for point, reason in ((("a", 200), "a at 200 tokens was not measured: its state of 400 B found no room"),
                          (("a", 64), "tiny has 0 of 8 rounds"), (("a", 128), "tiny measures no such state"),
                          (("a", FILLED), "tiny measures no such state")):  # fmt: skip
        decision = decide(measured, claim("more", 2, left=point))
        assert (decision.verdict.answer, decision.verdict.reason) == ("unresolved", reason)


def test_the_bound_is_weights_and_state_at_the_best_rate():
    measured = made({"a": {32: 0.1}}, noise=0.0)
    expected = (900 + 100) / 1e5 / measured.seconds(("a", 32))
    np.testing.assert_allclose(measured.bound(("a", 32)), expected)


def test_the_plan_holds_every_margin_and_condition():
    version = Decoding.versions["recorded"]
    held = content(version)  # type: ignore[arg-type]
    assert held["protocol"]["models"].keys() == MODELS.keys()
    assert [each["name"] for each in held["protocol"]["conditions"]] == [each.name for each in RECORDED]
    assert held["protocol"]["alone"] == 0.05
    assert {name: each["factor"] for name, each in held["claims"].items()} == {
        each.name: each.factor for each in claims(RECORDED[0])
    }
    assert replace(version, claims=version.claims[1:]).plan != version.plan


def of_all_models(line):
    """A line as if every model had been measured: those that were not have another's numbers."""
    return {
        key: {name: value[FEW["attention" not in name]] for name in MODELS}
        if isinstance(value, dict) and set(value) == set(FEW)
        else value
        for key, value in line.items()
    }


def test_the_page_of_records_alone(recorded, tmp_path):
    """Every figure is drawn, every table has its header's columns, and the answer names the condition."""
    study = tiny_study()
    recorded = "".join(json.dumps(of_all_models(json.loads(line))) + "\n" for line in recorded.splitlines())
    (tmp_path / FILE).write_text(recorded, encoding="utf-8")
    found = study.read(study.versions["small"], tmp_path)
    assert study.unfinished(found) == []
    assert "Decided for tiny; factors are means over 2 rounds" in study.answer(found)
    for each in study.figures([*found, *found]):
        with figure([tmp_path / f"{each.name}.png"], each.columns, each.rows, each.size) as (_, axes):
            each.draw(axes)
        assert (tmp_path / f"{each.name}.png").stat().st_size > 10_000
    shown = [study.verdicts(found), *study.tables([*found, *found])]
    for each in shown:
        assert {len(row) for row in each.rows} == {len(each.rows[0])}, each.title
    assert len(shown) == 8
    assert "2 rounds, 0 discarded" in study.provenance(found)[1]
    (tmp_path / FILE).write_text("".join(recorded.splitlines(keepends=True)[:-1]), encoding="utf-8")
    found = study.read(study.versions["small"], tmp_path)
    assert study.unfinished(found) == ["**In progress**: rounds and passes are missing: 1 of tiny."]
    assert "an unknown number" not in study.answer(found)
    assert decoding.tables.verdicts(study.decisions(found)).rows[1][-1] == "unresolved: tiny has 1 of 2 rounds"
