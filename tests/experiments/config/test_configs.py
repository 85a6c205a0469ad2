"""Every file of ``configs/`` composes into a configuration that the library builds and that computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.build import build_model, build_task, resolve
from experiments.config.overrides import as_override
from experiments.config.schema import RunConfig, run_config
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from seqarch.layers import MIXERS
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in CONFIGS.iterdir() if folder.is_dir()
}
CHOICES = [(group, name) for group, names in GROUPS.items() for name in names]


def composed(*overrides: str, hydra: bool = False):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


OF_RUNS = {"convert", "objective", "lora"}
"""Options with which an experiment wants the folder of another run, which the command line names."""


@cache
def configured(*overrides: str) -> RunConfig:
    plain = dict(OmegaConf.to_container(composed(*overrides), resolve=True, throw_on_missing=True))  # type: ignore
    assert plain.pop("retry") == 0
    for name in OF_RUNS & plain["train"].keys():
        del plain["train"][name]
    return resolve(run_config(plain))


def test_no_file_is_left_out():
    below = {path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*") if path.is_file()}
    assert below == {Path("config"), *(Path(group) / name for group, names in GROUPS.items() for name in names)}


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_builds_and_computes(group, name):
    config = configured(f"{group}={name}")
    model = build_model(config)
    assert model.state_bytes(4) > 0
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**7
    logits, _ = model(torch.randint(build_task(config).vocab_size, (1, 5)))
    assert logits.shape == (1, 5, build_task(config).vocab_size)
    assert torch.isfinite(logits).all()


OWN_MODELS = [name for name in GROUPS["experiment"] if not name.startswith("conversion_") and name != "mqar"]
"""The experiments with settings of models that no other has: stages of a conversion have those of ``conversion``, and
``mqar`` those of ``lengths``, which ``test_experiments_that_are_left_out_have_the_models_of_another`` holds."""

PAIRS = [
    pytest.param(experiment, model, marks=[pytest.mark.slow] if (row + column) % 8 else [])
    for row, model in enumerate(GROUPS["model"])
    for column, experiment in enumerate(OWN_MODELS)
]
"""Every model with the settings of every experiment; in every run of the tests an eighth of the pairs, in which each of
them is."""


def test_experiments_that_are_left_out_have_the_models_of_another():
    def settings(experiment: str) -> object:
        return OmegaConf.to_container(composed(f"experiment={experiment}"), resolve=True)["model"]  # type: ignore

    for experiment in sorted({*GROUPS["experiment"]} - {*OWN_MODELS}):
        assert settings(experiment) == settings("lengths" if experiment == "mqar" else "conversion"), experiment


@pytest.mark.parametrize(("experiment", "model"), PAIRS)
def test_every_model_fits_every_experiment(experiment, model):
    config = configured(f"experiment={experiment}", f"model={model}")
    assert config.model.name == model


@pytest.mark.parametrize("name", GROUPS["launcher"])
def test_launchers_exist_and_litter_nothing(name, monkeypatch):
    monkeypatch.setenv("SEQARCH_SWEEP", "runs/.sweeps/now")
    config = composed(f"launcher={name}", hydra=True)
    assert all(word in config.hydra.launcher._target_.lower() for word in name.split("_"))
    assert config.hydra.output_subdir is None
    assert config.hydra.job.chdir is False
    assert {config.hydra.run.dir, config.hydra.sweep.dir} == {"runs/.sweeps/now"}


def test_every_mixer_task_and_tracker_has_its_file():
    assert set(MIXERS) <= set(GROUPS["model"])
    assert set(TASKS) == set(GROUPS["task"])
    assert set(TRACKERS) == set(GROUPS["tracker"])
    for mixer in MIXERS:
        assert configured(f"model={mixer}").model.options.pattern == mixer


def test_hybrids_inherit_the_options_of_their_parts():
    """An option set for a mixer reaches every model that has it."""
    for model in ("attention", "hybrid", "hybrid_delta"):
        config = configured("experiment=mqar", f"model={model}")
        assert config.model.options.mixers["attention"]["conv_width"] == 4


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.lr=1e-3", "++train.lr=1e-3"),
        ("seed=0,1,2", "++seed=0,1,2"),
        ("model=attention", "model=attention"),
        ("hydra.launcher.n_jobs=4", "hydra.launcher.n_jobs=4"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("+train.x=1", "+train.x=1"),
        ("~tracker", "~tracker"),
        ("--multirun", "--multirun"),
        ("-m", "-m"),
    ],
)
def test_values_are_passed_on_and_groups_stay_groups(argument, expected):
    assert as_override(argument) == expected
