"""Documents streamed: each row's state goes on from step to step, and begins anew where a document does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.config.carrying import grows
from experiments.replay import replay
from experiments.runs.folder import RunFolder
from experiments.tasks import Batch
from experiments.training.checkpoints import Checkpoints
from experiments.training.engine import Engine
from experiments.training.loop import Run
from experiments.util.errors import ConfigError, RunnerError
from seqarch.layers import MIXERS, build_mixer
from seqarch.layers.rows import join_rows
from tests.support.runs import last, tiny_config, train_here
from tests.support.streamed import streamed, write_texts
from tests.support.variants import VARIANTS

GROWING = {
    "attention",
    "mla",
    "big_bird",
    "moba",
    "dsa",
    "sparse_mla",
    "nsa",
    "hyena",
    "stick_breaking_attention",
    "path_attention",
}


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, object]:
    return streamed(write_texts(tmp_path_factory.mktemp("streamed") / "texts"))


def prepared(runs, changes, **others) -> Run:
    config = tiny_config(runs, **{**changes, **others})
    return Run(config, RunFolder(config.folder()))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def losses_of_texts(run: Run, batches: list[Batch]) -> np.ndarray:
    """The loss of each batch, by the model on each text of each row alone, from where the row or the text begins."""
    names = ("tokens", "targets", "begins")
    tokens, targets, begins = (np.concatenate([getattr(batch, name) for batch in batches], 1) for name in names)
    losses = []
    for row, places in enumerate(begins):
        parts = [part for part in np.split(np.arange(len(places)), np.flatnonzero(places)) if len(part)]
        logits = torch.cat([run.model(torch.tensor(tokens[row, part])[None])[0][0] for part in parts])
        losses.append(F.cross_entropy(logits, torch.tensor(targets[row]), reduction="none").numpy())
    return np.stack(losses).reshape(len(tokens), len(batches), -1).mean(axis=(0, 2))


class TestStates:
    @pytest.mark.parametrize("name", [name for name in MIXERS if name not in GROWING])
    def test_losses_are_those_of_each_text_read_at_once(self, changes, tmp_path, double, name):
        """In micro-batches and segments, over batches in which texts begin within windows and where none does."""
        model = {"model__pattern": name, "model__mixers": {name: VARIANTS.get(name, [{}])[-1]}}
        run = prepared(tmp_path, changes, **model, train__micro_batch=3, train__bptt=10)
        batches = [run.data.source(0, 0).batch(0, number) for number in range(8)]
        assert {batch.begins[:, 1:].any() for batch in batches} == {True, False}
        found = [run.engine.gradients(run.model, batch, None, run.carried).item() for batch in batches]
        np.testing.assert_allclose(found, losses_of_texts(run, batches), rtol=1e-9)

    def test_gradients_are_those_of_rows_at_a_time_and_of_layers_that_are_run_again(self, changes, tmp_path, double):
        runs = [
            prepared(tmp_path, changes, **others)
            for others in ({}, {"train__micro_batch": 1}, {"train__activation_checkpointing": True})
        ]
        for number in range(4):
            batch, found = runs[0].data.source(0, 0).batch(0, number), []
            for run in runs:
                run.model.zero_grad()
                run.engine.gradients(run.model, batch, None, run.carried)
                found.append([parameter.grad for parameter in run.model.parameters()])
            for others in found[1:]:
                torch.testing.assert_close(others, found[0], rtol=1e-9, atol=1e-12)

    def test_states_in_bfloat16_go_on_as_well_as_whole_texts(self, changes, tmp_path):
        run = prepared(tmp_path, changes, train__precision="bfloat16")
        batches = [run.data.source(0, 0).batch(0, number) for number in range(8)]
        found = [run.engine.gradients(run.model, batch, None, run.carried).item() for batch in batches]
        np.testing.assert_allclose(found, losses_of_texts(run, batches), rtol=0.01)

    @pytest.mark.parametrize("pattern", ["mamba2 sliding_window", "attention moba", "nsa dsa"])
    def test_without_carrying_each_window_begins_anew(self, changes, tmp_path, double, pattern):
        mixers = {name: VARIANTS.get(name, [{}])[-1] for name in pattern.split()}
        model = {"model__pattern": pattern, "model__mixers": mixers}
        run = prepared(tmp_path, changes, train__carry_state=False, **model)
        assert run.carried is None
        batches = (run.data.source(0, 0).batch(0, number) for number in range(8))
        batch = next(batch for batch in batches if batch.begins is not None and batch.begins[:, 1:].any())
        assert run.engine.gradients(run.model, batch).item() == pytest.approx(losses_of_texts(run, [batch])[0])

    def test_states_that_cannot_be_put_together_are_refused(self):
        with pytest.raises(ValueError, match="parts AttentionState, RecurrentState cannot be put together"):
            join_rows([build_mixer(name, d_model=32).init_state(1) for name in ("attention", "gla")])
        one, other = (build_mixer("gla", d_model=width).init_state(1) for width in (32, 64))
        with pytest.raises(ValueError, match="shapes that differ in their rows alone"):
            join_rows([one, other])


def test_a_run_that_was_stopped_goes_on_with_its_states_to_the_bit(changes, tmp_path, monkeypatch):
    """In micro-batches; killed between checkpoints, and preempted."""
    options = {**changes, "train__micro_batch": 3, "train__save_every": 3}
    whole = train_here(tiny_config(tmp_path / "whole", **options))[1]
    config, step = tiny_config(tmp_path / "torn", **options), Run.step

    def stopped(run):
        if run.state.step == 4 and run.folder.record()["attempt"] == 1:
            raise KeyboardInterrupt
        run.interrupts.requested = run.state.step == 6 and run.folder.record()["attempt"] == 2
        return step(run)

    monkeypatch.setattr(Run, "step", stopped)
    assert [train_here(config)[0] for _ in range(2)] == [130, 75]
    code, torn = train_here(config)
    assert code == 0
    for mine, other in zip(whole.metrics(), torn.metrics(), strict=True):
        assert mine | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}
    assert whole.record()["results"] == torn.record()["results"]
    names = {path.name for path in last(torn).iterdir()}
    assert {path.name for path in last(whole).iterdir()} == names >= {"carried-0.pt"}
    assert (last(whole) / "carried-0.pt").read_bytes() == (last(torn) / "carried-0.pt").read_bytes()


def test_states_that_count_tokens_of_each_row_are_restored(changes, tmp_path):
    name = "log_linear_mamba2"
    run = prepared(tmp_path, changes, model__pattern=name, model__mixers={name: VARIANTS[name][-1]})
    batches = [run.data.source(0, 0).batch(0, number) for number in range(2)]
    run.engine.gradients(run.model, batches[0], None, run.carried)
    kept = run.carried.plain()  # type: ignore[union-attr]
    expected = run.engine.gradients(run.model, batches[1], None, run.carried)
    run.carried.restore([kept])  # type: ignore[union-attr]
    assert torch.equal(run.engine.gradients(run.model, batches[1], None, run.carried), expected)


def test_states_of_other_rows_are_refused(changes, tmp_path):
    run = prepared(tmp_path, changes)
    assert run.carried is not None
    run.engine.gradients(run.model, run.data.source(0, 0).batch(0, 0), None, run.carried)
    kept = run.carried.plain()
    run.carried.restore([kept])
    for wrong in ({"first": 1}, {"count": 3}, {"leaves": kept["leaves"][:-1]}):
        with pytest.raises(RunnerError, match="has no states for rows 0 to 3"):
            run.carried.restore([kept | wrong])
    folder = RunFolder(run.config.folder())
    with pytest.raises(RunnerError, match="it has no states that go on"):
        Checkpoints(folder.checkpoints, 1).carried(7, run.engine.device)


def test_a_bad_step_that_is_skipped_begins_all_rows_anew_and_is_repeated_to_the_bit(changes, tmp_path, monkeypatch):
    begun: list[int] = []
    gradients = Engine.gradients

    def watched(engine, model, batch, size, carried):
        begun.append(carried.rows(slice(0, 1)) is None)
        return gradients(engine, model, batch, size, carried)

    skip = {"train__spike": 1.01, "train__bad_step": "skip", "train__lr": 1e-9}  # Of norms that stay, half are above.
    options = {"train__steps": 30, "train__eval_every": 30, "train__save_every": 4, "train__keep_last": 9, **skip}
    with monkeypatch.context() as context:
        context.setattr(Engine, "gradients", watched)
        config = tiny_config(tmp_path, **changes, **options)
        code, folder = train_here(config)
    bad = [int(path.stem.removeprefix("step-")) for path in sorted(folder.bad.iterdir())]
    assert code == 0
    assert [step for step in range(30) if begun[step]] == [0, *(step for step in bad if step < 30)]
    for path in (min(folder.bad.iterdir()), max(folder.bad.iterdir())):
        again = replay(path)
        assert (again.loss, again.grad_norm) == (again.recorded.loss, again.recorded.grad_norm)
        assert again.began > 0


REFUSED = {
    "grows": (
        {"model__pattern": "mamba2 attention hyena", "model__depth": 3},
        "the state of attention, hyena grows with every token.*sliding_window, or train.carry_state=false",
    ),
    "segments": (
        {"model__pattern": "mamba2 attention", "train__bptt": 8, "train__carry_state": False},
        "train.bptt: texts begin within the segments .* the state of attention grows.*or train.bptt=0",
    ),
    "packed": ({"task__documents": "packed", "train__carry_state": True}, "task.documents=streamed"),
    "several": ({"task__train_on": [{}, {"length": 8}]}, "over one stream of text, and task.train_on has 2"),
    "compiled": ({"train__compile": True}, "train.compile: texts begin at other places in each batch"),
    "another": (
        {"task": {"name": "mqar", "vocab_size": 16, "length": 16, "pairs": 2}, "train__carry_state": True},
        "train.carry_state: the training batches of the task mqar do not continue one another",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_carry_states_is_refused_with_what_to_do(changes, tmp_path, case):
    others, message = REFUSED[case]
    given = {**changes, "task": dict(changes["task"]), **others}
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **given)
    if case == "grows":
        tiny_config(tmp_path, **given, train__carry_state=False)


def test_which_states_grow():
    built = {name: build_mixer(name, d_model=32, **VARIANTS.get(name, [{}])[-1]) for name in MIXERS}
    assert {name for name, mixer in built.items() if grows(mixer)} == GROWING
