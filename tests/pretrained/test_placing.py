"""Tensors of files are read to the place where a rule wants them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqarch.checkpoints.errors import CheckpointError
from seqarch.interop.weights import Rule, concatenate, reorder, reshape, rule, split, squeeze, transpose
from seqarch.pretrained import placing, tensor_files
from seqarch.pretrained.filling import Filling, Form
from seqarch.pretrained.sources import Joined, Source, Stacked
from seqarch.pretrained.tensor_files import stored_tensors

DEVICE = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shapes = {f"w{i}": (6, 10) for i in range(8)} | {"fused": (4, 12, 10), "conv": (12, 1, 4), "flat": (24,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def sources_of(folder: Path) -> dict[str, Source]:
    """Those of the file, and experts in pieces: each of them two matrices one after the other."""
    stored = stored_tensors(folder)
    pieces = [Joined([stored[f"w{2 * i}"], stored[f"w{2 * i + 1}"]]) for i in range(4)]
    return {**stored, "experts": Stacked(pieces)}


def whole(source: Source) -> Tensor:
    tensor = torch.empty(source.shape, dtype=source.dtype)
    source.read_into(tensor)
    return tensor


RULES = {
    "concatenated": (rule(["w0", "w1", "w2"], "a", concatenate(6, 6, 6)), True),
    "experts": (rule("experts", ("a", "b"), transpose(1, 2), split(6, 6, dim=2)), True),
    "fused": (rule("fused", ("a", "b"), transpose(1, 2), split(6, 6, dim=2)), True),
    "transposed": (rule("w0", "a", transpose()), True),
    "split": (rule("fused", ("a", "b"), split(1, 3)), True),
    "squeezed": (rule("conv", "a", squeeze(1)), True),
    "reshaped": (rule("flat", "a", reshape((24,), (4, 6))), True),
    "along columns": (rule(["w0", "w1"], "a", concatenate(10, 10, dim=1)), False),
    "in pieces": (rule("flat", ("a", "b"), split(7, 17)), False),
    "reordered": (rule("w0", "a", reorder([3, 1, 0, 2, 5, 4])), False),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_rule_of_files_is_the_rule_of_tensors(
    files: Path, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(placing, "TILE", 5 * 10 * 4)  # so that a matrix takes several, the last one smaller
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sources = sources_of(files)
    for name, (each, moved) in RULES.items():
        theirs: Sequence[Source] = [sources[own] for own in each.theirs]
        expected = each.to_ours({own: whole(sources[own]) for own in each.theirs})
        form = Filling({own: Form(t.shape, dtype) for own, t in expected.items()}, set(), DEVICE, files)
        made = form.apply_all([each], sources)
        assert made.keys() == expected.keys()
        for own, tensor in made.items():
            assert torch.equal(tensor, expected[own].to(dtype)), name
        assert (placing.moves(each, theirs, made) is not None) == moved, name


def test_shapes_that_do_not_fit_are_named(files: Path):
    sources = sources_of(files)
    wrong: list[tuple[Rule, tuple[int, ...]]] = [
        (rule(["w0", "w1"], "a", concatenate(6, 5)), (12, 10)),
        (rule("fused", ("a", "b"), split(2, 3)), (2, 12, 10)),
        (rule("w0", "a", transpose()), (6, 10)),
    ]
    for each, shape in wrong:
        form = Filling({own: Form(torch.Size(shape), torch.float32) for own in each.ours}, set(), DEVICE, files)
        with pytest.raises(CheckpointError, match=each.theirs[0]):
            form.apply_all([each], sources)


def test_tensors_side_by_side_are_read_by_one_call(files: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the system reads less than it is asked for, and up to a bound of bytes and tensors."""
    stored, expected = stored_tensors(files), load_file(files / "model.safetensors")
    made = {name: torch.empty(each.shape) for name, each in stored.items()}
    spans = [each.span(made[name]) for name, each in stored.items()]
    given = [span for span in spans if span is not None]
    assert [len(run) for run in tensor_files.runs(given[::-1])] == [len(stored)] == [11]
    assert [len(run) for run in tensor_files.runs(given[:2] + given[3:5])] == [2, 2]
    preadv, asked = os.preadv, []

    def less(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
        asked.append(len(buffers))
        return preadv(descriptor, [*buffers[:2], buffers[2][:5]] if len(buffers) > 2 else [buffers[0][:100]], start)

    monkeypatch.setattr(os, "preadv", less)
    for run in tensor_files.runs(given):
        tensor_files.read_run(run)
    assert asked[0] == 11
    assert all(torch.equal(made[name], each) for name, each in expected.items())
    monkeypatch.setattr(tensor_files, "RUN", 500)
    small = [[len(span.out) for span in run] for run in tensor_files.runs(given)]
    assert len(small) > 1
    assert all(len(run) == 1 or sum(run) <= 500 for run in small)
    assert stored["w0"].span(torch.empty(6, 10, dtype=torch.float64)) is None
    cut = (files / "model.safetensors").read_bytes()[:-250]
    (files / "model.safetensors").write_bytes(cut)
    with pytest.raises(CheckpointError, match=f"it ends in the middle of {given[-2].tensor.name}"):
        tensor_files.read_run(given)
