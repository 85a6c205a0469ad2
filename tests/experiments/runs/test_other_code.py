"""Runs that were trained with other sources of a plug-in than those that are here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments.config.schema import to_dict
from experiments.report.checks import comparable_runs
from experiments.runs import other_code
from experiments.runs.folder import RunFolder
from experiments.runs.former import FORMER
from experiments.runs.recorded import find_runs, read_run
from experiments.sweeps.cleaning import IN_RUN
from experiments.sweeps.execute import execute
from experiments.sweeps.status import SweepStatus
from experiments.train import attempt
from experiments.util import environment
from experiments.util.errors import RunnerError
from experiments.util.sources import PARSED_BYTES, package_sources
from tests.support.plugins import plugin_folder
from tests.support.runs import tiny_config, train_here

__all__ = ["plugin_folder"]

MIXER = '''"""A mixer."""

from seqarch.layers.attention.attention import Attention


class Mine(Attention):
    """Attention."""

    SCALE = 1
'''


@pytest.fixture
def package(plugin_folder):
    """A package with a mixer, in a repository of its own."""
    folder = plugin_folder / "my_mixers"
    folder.mkdir()
    (folder / "mixers.py").write_text(MIXER)
    (folder / "__init__.py").write_text(
        "import seqarch\nfrom my_mixers.mixers import Mine\n\nseqarch.register_mixer('mine', Mine)\n"
    )
    for arguments in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(plugin_folder), *arguments], check=True)
    return folder


def config_of(tmp_path, **changes):
    own = {"model__pattern": "mine", "model__name": "mine", "plugins": ["my_mixers"], "train__steps": 2}
    return tiny_config(tmp_path / "runs", **{**own, **changes})


def edit(package) -> None:
    (package / "mixers.py").write_text(MIXER.replace("SCALE = 1", "SCALE = 22"))


def outcome(tmp_path, config, **options) -> dict:
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    execute({**to_dict(config), **options}, sweep, 0)
    (entry,) = sweep.entries()
    sweep.remove()
    return entry


def files(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}


def test_a_run_records_its_plugins_as_it_does_the_runner(tmp_path, package):
    head = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (package / "notes.txt").write_text("mine")
    (package.parent / "elsewhere.txt").write_text("not the package's")
    (package / "mixers.py").write_text(MIXER.replace("SCALE = 1", "KEY = 'sk-abcdefghijklmnopqrstuvwx'"))
    code, folder = train_here(config_of(tmp_path))
    assert code == 0
    entry = folder.record()["plugins"]["my_mixers"]
    assert (entry["path"], entry["commit"], entry["dirty"]) == (str(package), head.strip(), True)
    assert {name for name in entry["untracked"] if "__pycache__" not in name} == {"my_mixers/notes.txt"}
    assert entry["sources"] == package_sources("my_mixers")
    assert entry["sources"].keys() == {"my_mixers/__init__.py", "my_mixers/mixers.py"}
    diff = (folder.path / entry["diff"]).read_text()
    assert (entry["masked"], "+    KEY = '***'" in diff) == ("keys in the diff", True)
    assert folder.record()["code"]["sources"].keys() == {"seqarch", "experiments"}
    assert all(IN_RUN.fullmatch(path.name) for path in folder.path.iterdir() if path.is_file())
    assert f"my_mixers {head[:10]} with local changes (sources " in read_run(folder.path).commit
    (folder.path / "code-of-review.diff").write_text("somebody's")
    (package / "mixers.py").write_text(MIXER)
    train_here(config_of(tmp_path))
    entry = folder.record()["plugins"]["my_mixers"]
    assert (entry["diff"], [path.name for path in folder.path.glob("code-*")]) == (None, ["code-of-review.diff"])


def test_a_finished_run_of_an_edited_mixer_is_named_and_left_as_it_is(tmp_path, package):
    config = config_of(tmp_path)
    baseline = config_of(tmp_path, model__pattern="attention", model__name="attention")
    _, folder = train_here(config)
    train_here(baseline)
    before = files(folder)
    assert outcome(tmp_path, config)["status"] == "kept"
    edit(package)
    entry = outcome(tmp_path, config)
    assert entry["status"] == "other_code"
    assert "my_mixers/mixers.py changed (it was of commit " in entry["message"]
    assert "other_code=rerun" in entry["message"]
    assert outcome(tmp_path, baseline)["status"] == "kept"
    assert outcome(tmp_path, config, other_code="keep")["status"] == "kept"
    assert files(folder) == before
    (package / "mixers.py").write_text(MIXER)
    assert outcome(tmp_path, config)["status"] == "kept"


def test_a_rerun_keeps_the_former_run_aside(tmp_path, package, monkeypatch):
    config = config_of(tmp_path)
    _, folder = train_here(config)
    before = files(folder)
    assert outcome(tmp_path, config, other_code="rerun")["status"] == "kept"  # Nothing differs.
    monkeypatch.setattr("experiments.sweeps.execute._train", lambda folder, *_: ("finished", str(folder.path.exists())))
    for number in (1, 2):
        edit(package)
        (package / "more.py").write_text(f"x = {number}")
        assert outcome(tmp_path, config, other_code="rerun")["message"] == "True"
        former = RunFolder(folder.path.parent / FORMER / f"{folder.path.name}.{number}")
        assert (former.status(), former.lock.path.exists(), folder.status()) == ("finished", False, None)
        assert number == 2 or files(former) == before
        train_here(config)
    assert [run.path for run in find_runs(tmp_path / "runs")] == [folder.path]


def test_steps_of_other_code_are_not_continued_unless_that_is_asked_for(tmp_path, package, capsys):
    config = config_of(tmp_path, train__steps=4, train__eval_every=2, train__save_every=2)
    _, folder = train_here(config)
    folder.update(status="interrupted", reason="stopped from outside")
    before = files(folder)
    edit(package)
    entry = outcome(tmp_path, config)
    assert entry["status"] == "begun_with_other_code"
    assert entry["message"].startswith("my_mixers/mixers.py changed")
    with pytest.raises(RunnerError, match=r"was trained with other code: my_mixers/mixers\.py changed"):
        attempt(folder, None)
    assert files(folder) == before
    assert train_here(config)[0] == 0
    (mixed,) = folder.record()["resumed_with_other_code"]
    assert mixed.startswith("my_mixers/mixers.py changed")


def test_what_failed_before_its_first_checkpoint_is_trained_with_the_code_that_is_here(tmp_path, package):
    config = config_of(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.update(status="failed", reason="a bug", attempt=1, plugins={"my_mixers": {"sources": {"a.py": "1"}}})
    edit(package)
    assert other_code.difference(config, folder.record()) is not None
    assert other_code.refusal(folder, config) is None


def test_code_of_ones_own_is_told_and_decides_nothing(tmp_path, package, monkeypatch):
    config = config_of(tmp_path)
    _, folder = train_here(config)
    digest = environment.files_digest
    monkeypatch.setattr(environment, "files_digest", lambda root, parts: digest(root, parts) + str(len(parts) > 1))
    entry = outcome(tmp_path, config)
    assert entry["status"] == "kept"
    assert "since then seqarch and experiments changed (it was of commit " in entry["message"]
    assert outcome(tmp_path, config, other_code="rerun")["status"] == "kept"
    monkeypatch.setattr("experiments.sweeps.execute._train", lambda *_: ("finished", "anew"))
    assert outcome(tmp_path, config, other_code="rerun_any")["message"] == "anew"
    assert not folder.run_file.exists()


def test_records_without_sources_count_as_they_did(tmp_path, package):
    config = config_of(tmp_path)
    _, folder = train_here(config)
    record = folder.record()
    del record["plugins"], record["code"]["sources"]
    folder.run_file.write_text(json.dumps(record))
    edit(package)
    entry = outcome(tmp_path, config, other_code="rerun_any")
    assert (entry["status"], "since" in entry["message"]) == ("kept", False)


def test_a_plugin_that_registers_nothing_counts_for_every_run(tmp_path, plugin_folder):
    (plugin_folder / "patches.py").write_text("import seqarch\n")
    config = config_of(tmp_path, model__pattern="attention", plugins=["patches"])
    assert other_code.used_packages(config) == ["patches"]
    assert other_code.used_packages(config_of(tmp_path, model__pattern="attention", plugins=[])) == ["patches"]


def test_a_report_shows_runs_without_their_plugins_and_says_so(tmp_path, package, capsys):
    train_here(config_of(tmp_path))
    comparable_runs(tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("my_mixers.mixers", "my_mixers"):
        del sys.modules[name]
    package.rename(package.with_name("moved"))
    (run,), problems = comparable_runs(tmp_path)
    assert (run.finished, problems) == (True, [])
    assert "note: plugins: cannot import 'my_mixers'" in capsys.readouterr().err


def test_an_option_that_is_none_is_refused(tmp_path):
    entry = outcome(tmp_path, tiny_config(tmp_path), other_code="rerum")
    assert (entry["status"], "Did you mean 'rerun'?" in entry["message"]) == ("refused", True)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (MIXER.replace("class", "# A comment.\nclass").replace("Attention.", "Softmax attention."), True),
        (MIXER.replace("    SCALE = 1", "    SCALE = (\n        1\n    )"), True),
        (MIXER.replace("SCALE = 1", "SCALE = 1.0"), False),
        (MIXER.replace("SCALE = 1", "SCALE = None"), False),
        (MIXER.replace("(Attention)", "()"), False),
        (MIXER + "    OTHER = 1\n", False),
        ("not python", False),
        (MIXER + "#" * PARSED_BYTES, False),
    ],
)
def test_comments_docstrings_and_layout_are_no_other_code(plugin_folder, text, same):
    (plugin_folder / "one.py").write_text(MIXER)
    (plugin_folder / "two").mkdir()
    assert __import__("one")
    first = package_sources("one")
    (plugin_folder / "one.py").write_text(text)
    assert (package_sources("one") == first) == same


def test_the_sources_of_a_package_are_its_code_alone(plugin_folder):
    for name in (
        "a.py",
        "deep/b.py",
        "k.cu",
        "test_a.py",
        "tests/c.py",
        ".hidden/d.py",
        "data.json",
        "__pycache__/e.py",
    ):
        (plugin_folder / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (plugin_folder / "pack" / name).write_text("")
    assert __import__("pack")
    assert package_sources("pack").keys() == {"pack/a.py", "pack/deep/b.py", "pack/k.cu"}
    del sys.modules["pack"]
    assert package_sources("pack") == {}
