"""What ``import seqarch`` gives: every public name, when it is asked for, and its type."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import is_dataclass

import pytest

import seqarch
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from tests.support.paths import ROOT

EXPORTERS = ("seqarch.layers", "seqarch.models", "seqarch.checkpoints.loading")


def fresh(code: str) -> str:
    """What a new Python process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_and_listing_it_is_quick_and_loads_no_torch():
    """In processor time, which a busy machine changes little; without what finds an editable install."""
    code = """
import importlib.util, sys, time
importlib.util.find_spec("seqarch")
start = time.process_time(); import seqarch; spent = time.process_time() - start
names = dir(seqarch)
print(spent, "torch" in sys.modules, "Mamba2" in names, hasattr(seqarch, "Mamba22"), "torch" in sys.modules)
"""
    found = [fresh(code).split() for _ in range(3)]
    assert all(rest == ["False", "True", "False", "False"] for _, *rest in found)
    assert min(float(seconds) for seconds, *_ in found) < 0.1


def test_the_names_are_those_that_its_parts_export():
    parts = [importlib.import_module(name) for name in EXPORTERS]
    assert {f"seqarch.{name}": names.split() for name, names in seqarch._NAMES.items()} == {
        part.__name__: part.__all__ for part in parts
    }
    exported = {name: part for part in parts for name in part.__all__}
    modules = {path.stem for path in (ROOT / "seqarch").iterdir() if (path / "__init__.py").exists()}
    assert set(seqarch.__all__) == {*exported, *modules, "parallel"}
    assert set(dir(seqarch)) >= set(seqarch.__all__)
    for name, part in exported.items():
        assert getattr(seqarch, name) is getattr(part, name)
    for name in modules:
        assert getattr(seqarch, name) is importlib.import_module(f"seqarch.{name}")
    with pytest.raises(AttributeError, match="module 'seqarch' has no attribute 'Mamba22'"):
        seqarch.Mamba22  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Mamba22' from 'seqarch'"):
        exec("from seqarch import Mamba22")
    starred: dict[str, object] = {}
    exec("from seqarch import *", starred)
    assert starred.keys() >= set(seqarch.__all__)


@pytest.mark.parametrize("layer", [*MIXERS.values(), *CHANNEL_MIXERS.values()])
def test_every_layer_and_its_config_are_exported(layer):
    assert getattr(seqarch, layer.__name__) is layer, "add it to __all__ of seqarch.layers and to the table of seqarch"
    assert getattr(seqarch, layer.Config.__name__) is layer.Config
    assert is_dataclass(layer.Config)


def test_type_checkers_see_each_layer_and_its_options(tmp_path):
    """Names, what is made of a config or of options, a wrong option, a wrong type and a wrong name."""
    layers = [layer.__name__ for layer in (*MIXERS.values(), *CHANNEL_MIXERS.values())]
    right = [
        "import seqarch",
        "from seqarch import LMConfig, LanguageModel, Stack, load, ops, register_mixer",
        *(f"{name.lower()}: seqarch.{name} = seqarch.{name}(d_model=64)" for name in layers),
        *(f"{name.lower()} = seqarch.{name}(seqarch.{name}Config(d_model=64))" for name in layers),
        "model: LanguageModel = LanguageModel(LMConfig(vocab_size=8, d_model=64, pattern='mamba2', depth=1))",
        "model = LanguageModel(vocab_size=8, d_model=64, pattern='mamba2', depth=1)",
        "stack: Stack = Stack(d_model=64, pattern='mamba2', depth=1)",
        "model = load('runs/demo')",
        "backends: list[str] = list(ops.OPS['attention'].backends) + list(seqarch.ops.OPS)",
    ]
    wrong = [
        "seqarch.Mamba2(d_model=64, d_stat=16)",
        "seqarch.SlidingWindow(d_model=64, window='far')",
        "seqarch.Mamba22",
        "seqarch.Stack(d_model=64, pattern='mamba2')",
        "register_mixer('swiglu', seqarch.SwiGlu)",
    ]
    (tmp_path / "use.py").write_text("\n".join([*right, *wrong]) + "\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout)
    found = [(each["range"]["start"]["line"], each["message"]) for each in said["generalDiagnostics"]]
    assert said["summary"]["filesAnalyzed"] == 1
    assert [line for line, _ in found] == [len(right) + number for number in range(len(wrong))], found


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "seqarch" / "py.typed").read_text() == ""
