"""What is composed of a group's composition and of values is what Hydra composes, and a run's place follows from it."""

from __future__ import annotations

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.overrides import Composer, as_override, compose, load
from experiments.sweeps.execute import resolve_composed
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"

GROUPS = (
    [],
    ["experiment=text"],
    ["experiment=demo_needle", "model=mamba2", "tracker=wandb"],
    ["task=needle", "launcher=joblib", "hydra.launcher.n_jobs=3"],
)
VALUES = (
    [],
    ["train.lr=3e-3"],
    ["train.steps=20", "seed=3"],
    ["train.steps=20", "train.warmup=7"],
    ["train.warmup=${train.steps}", "train.steps=9"],
    ["train.steps=${seed}", "seed=12"],
    ["model.mixers.mamba2.d_state=8", "model.mixers={gla: {num_heads: 2}}"],
    ["model.mixers.attention.position=null", "train.compile=true"],
    ["task.test_lengths=[32,64]", "task.train_on=[{length: 8}, {}]"],
    ["model.pattern='2*mamba2 attention/moe'", 'runs="a b"'],
    ['model.pattern="attention(window=8, position=none)/moe(top_k=2) 2*(mamba2 gla)"'],
    ["train.lr=1", "train.lr=2", "train.lr.x=3"],
    ["imports=[a.b, c]", "tracker.options.tags=[x, 'y z']"],
    ["mine.new.key={a: [1, {b: 2}]}", "other=${mine.new.key}"],
    ["train.lr=${train.nowhere}"],
    ["runs=${oc.env:HOME}/runs", "train.weight_decay=1e-1"],
    ["seed=-1", "train.target=-0.0", "train.patience=0x10"],
    ["+train.mine=3", "train.lr=1e-4"],
    ["+model.mixers.attention={num_heads: 4}"],
    ["+train.lr=3"],
    ["~train.warmup"],
    ["~train.lr=1"],
    ["~model.mixers.attention", "train.lr=0.5"],
    ["train.lr=???"],
    ["+task@other=parity"],
    ["model@model=gla"],
)


def outcome(compose_by, overrides: list[str]) -> object:
    """What is composed, or the kind and text of the error."""
    try:
        return compose_by(overrides)
    except Exception as error:
        return type(error), str(error)


def test_what_is_composed_is_what_hydra_composes():
    """Errors among it; and each combination of groups is composed once, whatever is set besides."""
    loaded: list[list[str]] = []

    def counted(overrides):
        loaded.append(overrides)
        return load(overrides)

    def by_hydra(overrides):
        whole = hydra_compose("config", overrides)
        return OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)

    given = [(*GROUPS[number % len(GROUPS)], *values) for number, values in enumerate(VALUES)]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composer = Composer(counted)
        for arguments in given:
            overrides = [as_override(each) for each in arguments]
            assert outcome(composer.plain, overrides) == outcome(by_hydra, overrides), overrides
    assert all(loaded.count([*groups]) == 1 for groups in GROUPS)
    whole = ("+", "~", "model@")
    unusual = [each for each in given if any(argument.startswith(whole) for argument in each)]
    assert len(loaded) == len(GROUPS) + len(unusual)


def test_a_value_that_was_taken_twice_is_not_shared():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composer, given = Composer(load), ["++task.test_lengths=[8,9]"]
        first = composer.plain(given)
        first["task"]["test_lengths"].append(0)
        first["model"]["mixers"].clear()
        assert composer.plain(given)["task"]["test_lengths"] == [8, 9]
        assert composer.plain(given)["model"]["mixers"]


@pytest.mark.parametrize(
    ("arguments", "experiment", "name"),
    [
        (["experiment=mqar"], "mqar", "attention"),
        (["experiment=mqar", "train.lr=0.003", "seed=1"], "mqar", "attention"),  # As in the experiment.
        (["train.lr=1e-3", "model=delta_net", "seed=1"], "mqar", "delta_net-lr1e-3"),
        (["train.steps=900", "train.lr=0.0005", "train.threads=1"], "mqar", "attention-lr5e-4-steps900"),
        (["task=needle"], "needle", "attention"),
        (["task=needle", "task.length=256"], "needle", "attention-length256"),
        (["task=mqar"], "mqar", "attention"),
        (["experiment=demo_needle"], "demo/needle", "attention"),
        (["experiment=demo_needle", "task=needle"], "demo/needle", "attention"),
        (["name=needle2", "task=needle"], "needle2", "attention-needle"),
        (["experiment=text", "name=mine/text"], "mine/text", "attention"),
        (["model.mixers.mamba2.d_state=8"], "mqar", "attention"),  # Of no mixer that the model has.
        (["model=hybrid", "model.mixers.mamba2.d_state=8"], "mqar", "hybrid-d_state8"),
        (["train.schedule=wsd", "train.compile=true"], "mqar", "attention-schedule_wsd-compile_true"),
        (["model.pattern='gla attention/moe'"], "mqar", "attention-pattern_gla_attention_mo"),
        (["task.test_lengths=[128,256]", "train.target=null"], "mqar", "attention-test_lengths_128_256-target_null"),
        (
            ["model=hybrid", "model.mixers.attention.conv_width=2", "model.mixers.mamba2.conv_width=2"],
            *("mqar", "hybrid-attention.conv_width2-mamba2.conv_width2"),
        ),
    ],
)
def test_a_run_has_a_place_and_a_name(tmp_path, arguments, experiment, name):
    config = resolve_composed(compose([*arguments, f"runs={tmp_path}"]))
    assert config.experiment == experiment
    assert config.folder().parent == tmp_path / experiment
    assert config.folder().name == f"{name}-seed{config.seed}-{config.digest()[:6]}"
    assert config.may_name(config.folder().name)
    assert len(config.folder().name) <= 60
