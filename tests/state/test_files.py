"""States in files: to the bit, of every mixer, and of this model and version alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

import seqarch
from seqarch.layers import MIXERS
from seqarch.models import LanguageModel
from seqarch.state import StateError, files

PACKED = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def model(pattern: str = "mamba attention", depth: int = 2, seed: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(vocab_size=11, d_model=32, pattern=pattern, depth=depth, **options).eval()


def same(a: Any, b: Any) -> bool:
    """Whether two states are of the same parts and, to the bit, of the same numbers."""
    (ours, form), (theirs, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return form == other and all(
        type(x) is type(y) and (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y)
        for x, y in zip(ours, theirs, strict=True)
    )


@torch.no_grad()
def test_a_state_of_every_mixer_comes_back_to_the_bit(tmp_path):
    """After a packed call, whose parts may be of a form of their own, and in rows with room, in bfloat16."""
    lm = model(" ".join(MIXERS), len(MIXERS))
    for dtype in (torch.float32, torch.bfloat16):
        lm.to(dtype)
        for before in (None, lm.init_state(2, max_length=20)):
            state = lm(PACKED, before, [0, 5, 7])[1]
            if before is not None:
                state = lm(torch.tensor([[1, 2], [2, 3]]), state)[1]
            seqarch.state.save(state, tmp_path / "state.safetensors", lm)
            assert same(seqarch.state.load(tmp_path / "state.safetensors", lm), state)
    assert os.listdir(tmp_path) == ["state.safetensors"]


@torch.no_grad()
def test_a_state_of_another_model_or_version_is_refused(tmp_path, monkeypatch):
    lm, file = model(), tmp_path / "state.safetensors"
    state = lm(PACKED)[1]
    known = seqarch.state.fingerprint(lm)
    seqarch.state.save(state, file, lm, model_fingerprint=known)
    assert same(seqarch.state.load(file, model()), state)
    others = [model(seed=1), model(norm_eps=1e-6), model().double(), model("mamba gla")]
    others.append(model())
    others[-1].head.weight[3, 4] += 1e-3
    for other in others:
        with pytest.raises(StateError, match=rf"state.safetensors holds a state of another model, {known[:12]}; this"):
            seqarch.state.load(file, other)
    with pytest.raises(StateError, match=r"save: not a state of this model: Mamba: state\.conv is None"):
        seqarch.state.save(model("gla mamba")(PACKED)[1], file, lm)
    monkeypatch.setattr(files, "STATE_VERSION", 2)
    with pytest.raises(StateError, match="holds a state of version 1, expected 2: read the prompt again"):
        seqarch.state.load(file, lm)
    monkeypatch.undo()
    assert same(seqarch.state.load(file, lm), state)


@torch.no_grad()
def test_what_is_no_state_is_refused_and_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    lm, file = model(), tmp_path / "state.safetensors"
    seqarch.state.save(lm(PACKED)[1], file, lm)
    content = file.read_bytes()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    damaged: dict[str, bytes] = {"short": content[:-1], "text": b"no state", "empty": b""}
    tensors = load_file(file)
    smaller = {name: tensor[:, :1].clone() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    other = {"smaller": (smaller, metadata), "fewer": (dict([*tensors.items()][1:]), metadata)}
    other["unknown"] = tensors, metadata | {"form": json.dumps({"kind": "Path", "parts": ["/"]})}
    other["weights"] = tensors, {"format": "pt"}
    for name, (content_of, said) in other.items():
        save_file(content_of, tmp_path / name, metadata=said)
        damaged[name] = (tmp_path / name).read_bytes()
    for name, bad in damaged.items():
        Path(tmp_path / name).write_bytes(bad)
        with pytest.raises(StateError, match=f"{name}( cannot be read| is damaged| holds no state|: not a state)"):
            seqarch.state.load(tmp_path / name, lm)
    with pytest.raises(StateError, match="nowhere cannot be read as a state: No such file"):
        seqarch.state.load(tmp_path / "nowhere", lm)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        seqarch.state.save(lm(PACKED)[1], file, lm)
    assert file.read_bytes() == content
    assert not [*tmp_path.glob(".*")]


def test_rows_that_do_not_exist_are_refused():
    state = model().init_state(2)
    for index, message in (([2], "row 2 was asked for, expected 0 to 1"), ([0, 0], "expected each row once")):
        with pytest.raises(ValueError, match=message):
            seqarch.state.leave(state, index)
    assert seqarch.state.row_count(seqarch.state.leave(state, [1])) == 1
    with pytest.raises(ValueError, match="no state was given"):
        seqarch.state.join([])
    with pytest.raises(ValueError, match=r"states of \[2, 3\] parts cannot be put together"):
        seqarch.state.join([state, model("gla", 3).init_state(1)])
    with pytest.raises(ValueError, match="states with parts MoBAState, NSAState cannot be put together"):
        seqarch.state.join([model(name, 1).init_state(1) for name in ("moba", "nsa")])
