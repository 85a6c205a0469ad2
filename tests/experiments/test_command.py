"""The command ``seqarch``: its list, its help and what shells complete."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields

import pytest

from experiments import completion, study
from experiments.__main__ import COMMANDS, main
from experiments.bench import __main__ as bench
from experiments.config import reference
from experiments.config.options import REGISTRIES
from experiments.config.overrides import compose
from experiments.config.schema import run_config, to_dict
from experiments.run_help import run_help
from experiments.runs.recorded import find_runs
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from experiments.util import environment
from seqarch.models import LMConfig
from tests.support.paths import ROOT

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


@pytest.fixture(autouse=True)
def _arguments_as_before(monkeypatch):
    """The command puts its own name and arguments into their place."""
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setattr("sys.path", [*sys.path])


def help_of(name: str, capsys) -> str:
    """The help of a command and of its parts."""
    text = ""
    for part in [[], *([word] for word in COMMANDS[name].words.split() if not word.startswith("-"))]:
        if name == "run":
            assert main([name, *part, "--help"]) == 0
        else:
            with pytest.raises(SystemExit, match=r"^0$"):
                main([name, *part, "--help"])
        text += capsys.readouterr().out
    return text


def test_alone_it_lists_the_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", shown, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("seqarch ")


def test_a_misspelt_command_is_named_with_the_nearest(capsys):
    assert main(["rnu"]) == 2
    assert "unknown command 'rnu'" in (shown := capsys.readouterr().err)
    assert shown.endswith("Did you mean 'run'?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself_and_its_options_are_completed(name, capsys):
    shown = help_of(name, capsys)
    assert f"seqarch {name}" in shown
    assert "experiments." not in shown.partition("\n")[0]
    assert set(OPTION.findall(shown)) | {"--help"} == {
        *(word for word in COMMANDS[name].words.split() if word.startswith("--")),
        "--help",
    }


def test_without_the_runners_packages_one_line_says_how_to_get_them():
    program = "import sys; sys.modules['hydra'] = None; from experiments.__main__ import main; sys.exit(main(['run']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    needed = "error: seqarch run needs hydra, which is not installed: pip install 'seqarch[experiments]'\n"
    assert (done.returncode, done.stderr) == (1, needed)


def test_help_and_completion_wait_for_no_heavy_package():
    """A help takes a good half second of processor time; torch alone would take two more."""
    program = """
import sys, time
from experiments.__main__ import main
for arguments in (["run", "--help"], ["completion", "bash"]):
    assert main(arguments) == 0
heavy = {"torch", "matplotlib", "optuna", "wandb", "scipy"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else int(time.process_time() > 1.5))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def paths(values: dict, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("mixers", "channels"):
            yield from paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_help_describes_every_key_of_a_run():
    """With the value that a run has."""
    shown = run_help([])
    config = to_dict(run_config({key: value for key, value in compose([]).items() if key != "retry"}))
    for path in [*paths(config), "retry", "task.order", "task.train_on", "task.test_on", "train.start_from"]:
        if path != "tracker.options":  # Of the tracker none: nothing can be set.
            assert re.search(rf"^  {re.escape(path)}[= ].*\n      \w", shown, re.MULTILINE), path
    assert "\n  train.steps=1500  (int)\n" in shown
    assert "\n  train.schedule=cosine  (cosine|wsd|until_converged)\n" in shown
    assert "\n  train.dry_run=false  (true|false)\n" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_the_help_lists_models_tasks_and_experiments_with_a_line_each():
    shown = run_help([])
    for group in reference.DESCRIBED:
        texts = reference.choice_texts(group)
        assert list(texts) == reference.groups()[group]
        for name, text in texts.items():
            assert re.fullmatch(r"[^`\n]{15,250}", text), (name, text)
            assert re.search(rf"^  {name} +{re.escape(text[:12])}", shown, re.MULTILINE)
    assert reference.choice_texts("model")["hybrid"].startswith("Attention and a recurrence in turn;")


def test_the_help_follows_the_choices():
    shown = run_help(["task=needle", "experiment=text", "model=mamba2", "train.steps=7", "--help"])
    assert "\n  task.digits=" in shown
    assert "\n  task.pairs" not in shown
    assert "\n  model.mixers.mamba2.d_state=" in shown
    assert "\n  model.d_model=128  (int)" in shown


def test_every_option_of_every_part_is_described():
    """And the language model's, read from its source, are those that it has."""
    found = [key for keys in reference.sections().values() for key in keys]
    found += [key for name in TASKS for key in reference.task_keys(name)]
    found += [key for name in TRACKERS for key in reference.tracker_keys(name)]
    found += [key for kind, names in REGISTRIES.items() for name in names for key in reference.layer_keys(kind, name)]
    assert [key.name for key in found if not key.text] == []
    model = {key.name.removeprefix("model."): key for key in reference.sections()["the model"]}
    assert model.keys() - {"name"} == {field.name for field in fields(LMConfig)} - {"vocab_size"}
    assert (model["norm_eps"].default, model["logit_cap"].kind) == ("1e-05", "float or null")


def completed(*lines: str) -> list[list[str]]:
    """What bash offers at the end of each line."""
    program = [completion.script("bash")]
    for line in lines:
        program += [
            f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({line}) COMPREPLY=()",
            f"COMP_CWORD={len(line.split()) - (not line.endswith(' '))}",
            '_seqarch; echo "${COMPREPLY[*]}"',
        ]
    done = subprocess.run(["bash", "-c", "\n".join(program)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_commands_options_choices_and_keys():
    commands, groups, models, several, keys, values, parts = completed(
        "seqarch r",
        "seqarch run la",
        "seqarch run -m model=mam",
        "seqarch search model=attention,mam",
        "seqarch run train.opt",
        "seqarch run train.optimizer=",
        "seqarch runs --de",
    )
    assert commands == ["run", "report", "runs", "replay"]
    assert groups == ["launcher="]
    assert models == ["mamba", "mamba2", "mamba3"]
    assert several == ["attention,mamba", "attention,mamba2", "attention,mamba3"]
    assert keys == ["train.optimizer="]
    assert values == ["adamw", "muon"]
    assert parts == ["--delete"]


def test_both_shells_have_the_same_words():
    texts = {shell: completion.script(shell).partition("\n_seqarch() {")[0] for shell in completion.SHELLS}
    assert texts["bash"] == texts["zsh"]
    assert "[model]='attention based" in texts["zsh"]


def test_an_installed_runner_records_its_version_and_no_strangers_commit(monkeypatch):
    """What pip notes of a package that it took from a repository is the commit."""
    monkeypatch.setattr(environment, "INSTALLED", True)
    code, diff, _ = environment.code_version()
    assert (code["commit"], code["dirty"], diff) == (None, None, "")
    assert len(code["sources_sha256"]) == 64
    note = '{"url": "https://host/repository", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'

    class Package:
        version = "1.2"

        @staticmethod
        def read_text(name: str) -> str | None:
            return note if name == "direct_url.json" else None

    monkeypatch.setattr(environment, "distribution", lambda name: Package)
    assert {"commit": "abc", "version": "1.2"}.items() <= environment.code_version()[0].items()


def test_a_run_without_a_commit_is_named_by_its_version(root):
    run = find_runs(root)[0]
    run.record.update(code={"commit": None, "dirty": None, "version": "1.2"}, plugins={})
    assert run.commit == "version 1.2"


def test_what_needs_a_checkout_says_so(monkeypatch, capsys):
    monkeypatch.setattr(study, "INSTALLED", True)
    assert main(["study", "initialisation", "--draw"]) == 1
    assert "give --version small, or --results FOLDER" in capsys.readouterr().err
    monkeypatch.setattr(bench, "INSTALLED", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match="only a checkout of seqarch has them"):
        main(["bench", "--device", "cuda"])


def test_parquet_names_the_extra_that_it_needs(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "polars", None)
    assert main(["runs", "export", str(tmp_path / "all.parquet"), str(root)]) == 1
    assert "pip install 'seqarch[export]', or name a .csv" in capsys.readouterr().err
    assert main(["runs", "export", str(tmp_path / "all.csv"), str(root)]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_also_a_module(name):
    assert callable(importlib.import_module(f"experiments.{COMMANDS[name].module}").main)
