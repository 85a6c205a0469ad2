"""Models whose experts are not all in memory: the same to the bit, and each error names what is wrong."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from seqarch import LanguageModel, quantize
from seqarch.checkpoints.errors import CheckpointError
from seqarch.layers.channel.expert_cache import LRU
from seqarch.state import fingerprint

TOKENS = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(1))
EXPERTS = {"num_experts": 8, "top_k": 2, "hidden": 48}


def saved(path: Path, pattern: str = "attention/moe", family: str | None = None, **experts) -> Path:
    torch.manual_seed(0)
    options = {"vocab_size": 31, "d_model": 32, "depth": 2, "channels": {"moe": {**EXPERTS, **experts}}}
    LanguageModel(pattern=pattern, **options).eval().save_pretrained(path, family=family, max_shard_size="100KB")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return saved(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        (None, {"gated": False, "shared_experts": 1}),
        pytest.param(None, {"activation": "quick_gelu", "limit": 7.0, "bias": True}, marks=pytest.mark.slow),
        pytest.param(None, {"capacity_factor": 0.5}, marks=pytest.mark.slow),
        pytest.param("mixtral", {}, marks=pytest.mark.slow),
    ],
)
def test_it_computes_the_same_to_the_bit_however_few_are_in_memory(family, experts, tmp_path):
    folder = saved(tmp_path / "model", family=family, **experts)
    whole = LanguageModel.from_pretrained(folder)
    with torch.no_grad():
        wanted, decoded = whole(TOKENS)[0], whole.generate([[1, 2, 3]], 12)[0]
    for places, policy in ((1, "lru"), (2, "layer_before"), (3, "lfu"), (20, LRU)):
        model = LanguageModel.from_pretrained(folder, experts_in_memory=places, expert_policy=policy)
        assert torch.equal(model(TOKENS)[0], wanted)
        if places == 2:
            assert torch.equal(model.generate([[1, 2, 3]], 12)[0], decoded)
        store = model.expert_store
        assert store.memory_bytes == min(places, 8) * store.total_bytes // 8
        assert model.num_parameters() == whole.num_parameters()
        assert places != 2 or fingerprint(model) == fingerprint(whole)
        one = next(iter(store.layers.values())).expert_bytes
        use = store.use
        assert use.bytes == (use.read + use.ahead) * one
        assert use.hits + use.read == use.asked
        assert 0 < use.read <= (16 if places == 20 else use.asked)


def test_a_file_that_is_gone_or_another_is_named_and_decoding_goes_on_once_it_is_back(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder, experts_in_memory=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["stack.layers.1.channel.w_in"]
    with torch.no_grad():
        decoded, logits = model.generate([1, 2, 3], 12)[0], model(TOKENS)[0]
        file.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=rf"cannot read the experts in {file}: No such file"):
            model.generate([1, 2, 3], 12)
        (tmp_path / "elsewhere").rename(file)
        assert torch.equal(model.generate([1, 2, 3], 12)[0], decoded)
        assert torch.equal(model(TOKENS)[0], logits)
        os.utime(file, (1, 1))
        with pytest.raises(CheckpointError, match=rf"{file} has changed since the model was read"):
            model(TOKENS)


def test_reading_ahead_of_a_file_that_is_gone_is_an_error_of_who_asks_for_it(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder, experts_in_memory=2, expert_policy="layer_before")
    _, second = model.expert_store.layers.values()
    with torch.no_grad():
        wanted = model(TOKENS)[0]
        moved = [(file, tmp_path / file.name) for file in folder.glob("model-*.safetensors")]
        for file, other in moved:
            file.rename(other)
        second.cache._before = list(range(8))
        second.read_ahead()
        with pytest.raises(CheckpointError, match="cannot read the experts"):
            list(second.matrices(list(range(8))))
        for file, other in moved:
            other.rename(file)
        assert torch.equal(model(TOKENS)[0], wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"experts_in_memory": 0}, "experts_in_memory is int 0, expected at least 1"),
        ({"experts_in_memory": True}, "experts_in_memory is bool True, expected at least 1"),
        ({"experts_in_memory": 2, "expert_policy": "lrru"}, "unknown expert_policy 'lrru'.*lru"),
        ({"experts_in_memory": 2, "expert_policy": 3}, "expert_policy is int 3, expected lru, lfu, layer_before"),
        ({"experts_in_memory": 2, "device": "cuda"}, "experts_in_memory=2 is for a CPU, got device='cuda'"),
    ],
)
def test_what_is_asked_for_is_checked_first(arguments, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        LanguageModel.from_pretrained(tmp_path / "nothing", **arguments)


def test_folders_whose_experts_cannot_be_read_one_by_one_are_refused(tmp_path):
    dense = saved(tmp_path / "dense", "attention")
    with pytest.raises(CheckpointError, match=f"{dense} has no mixture of experts: leave experts_in_memory out"):
        LanguageModel.from_pretrained(dense, experts_in_memory=2)
    model = LanguageModel.from_pretrained(saved(tmp_path / "plain", hidden=64))
    quantize(model, "int8", group_size=32).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="channel is quantised, expected plain experts"):
        LanguageModel.from_pretrained(tmp_path / "small", experts_in_memory=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"run is a run's folder.*save_pretrained"):
        LanguageModel.from_pretrained(tmp_path / "run", experts_in_memory=2)


def test_what_such_a_model_cannot_do_is_said(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder, experts_in_memory=2, expert_policy="layer_before")
    with pytest.raises(ValueError, match="read it whole, without experts_in_memory"):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    model.embedding.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradients"):
        model(TOKENS)


def test_another_dtype_and_forgotten_pages_change_no_result(folder):
    wanted = LanguageModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = LanguageModel.from_pretrained(folder, dtype=torch.bfloat16, experts_in_memory=2)
    later = LanguageModel.from_pretrained(folder, experts_in_memory=2, expert_policy="layer_before")
    model.expert_store.keep_pages = False
    assert not model.expert_store.keep_pages
    with torch.no_grad():
        later(TOKENS)
        logits = wanted(TOKENS)[0]
        assert torch.equal(model(TOKENS)[0], logits)
        assert torch.equal(later.to(torch.bfloat16)(TOKENS)[0], logits)
    model.expert_store.reset_use()
    assert model.expert_store.use.asked == 0
