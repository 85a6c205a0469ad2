"""Folders of seqarch's own form in ``transformers``, and those that it writes of our models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import seqarch.interop.hf as hf
from seqarch import LanguageModel
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.tokenizers import ByteTokenizer
from tests.support.plugins import plugin_folder  # noqa: F401

TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def model_of(pattern: str = "mamba2 attention/moe", **options) -> LanguageModel:
    torch.manual_seed(0)
    expert_bias = {"moe": {"expert_bias": True}}
    return LanguageModel(
        **{"vocab_size": 31, "d_model": 32, "pattern": pattern, "depth": 2, "channels": expert_bias, **options}
    ).eval()


def same(a: LanguageModel, b: LanguageModel) -> bool:
    own, other = a.state_dict(), b.state_dict()
    equal = all(own[n].dtype == other[n].dtype and torch.equal(own[n], other[n]) for n in own.keys() | other.keys())
    buffers = zip(a.buffers(), b.buffers(), strict=True)
    return equal and all(torch.equal(x, y) for x, y in buffers) and a.config == b.config


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_either_writes_what_both_read(size: str, tied: bool, tmp_path: Path):
    model = model_of(tie_embeddings=tied)
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    hf.wrap(model).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    for name in ("ours", "theirs"):
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 2) == (size == "20KB")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(read, hf.SeqarchForCausalLM)
        assert not read.training
        assert not any(tensor.is_meta for tensor in (*read.parameters(), *read.buffers()))
        assert same(read.model, model)
        assert same(LanguageModel.from_pretrained(tmp_path / name, verify=True), model)
        assert (read.model.head.weight is read.model.embedding.weight) == tied == read.config.tie_word_embeddings
        read.save_pretrained(tmp_path / "again", max_shard_size=size)
        assert same(LanguageModel.from_pretrained(tmp_path / "again", verify=True), model)
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs", "again")]
    assert described[1] == described[2]
    assert described[0]["model"] == described[1]["model"]
    assert AutoConfig.from_pretrained(tmp_path / "ours").model == described[0]["model"]


def test_layers_that_share_are_read_as_one(tmp_path: Path):
    """Their mixers, experts and adapters, and the counts of a router that no file has."""
    layer = "gla(share=a, adapter_rank=2)/moe(share=e)"
    model = model_of(f"{layer} gla(share=a)/moe(share=e)", channels={"moe": {"expert_bias": True}})
    model.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(read.model, model)
    assert torch.equal(logits(read.model), logits(model))
    first, later = (layer.channel for layer in read.model.stack.layers)
    assert first.w_in is later.w_in
    assert first.router.load is later.router.load
    assert not first.router.load.any()


def test_dtypes_are_those_of_the_folder_or_asked_for(tmp_path: Path):
    model = model_of()
    model.save_pretrained(tmp_path)
    wide = {"A_log", "dt_bias", "D", "expert_bias"}
    for dtype in (torch.bfloat16, torch.float16):
        read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert read.dtype == dtype
        float32 = {name.split(".")[-1] for name, tensor in read.state_dict().items() if tensor.dtype == torch.float32}
        assert float32 == wide
        read.save_pretrained(tmp_path / "narrow")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
        assert same(again.model, read.model)
        assert same(LanguageModel.from_pretrained(tmp_path / "narrow"), read.model)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).model, model.double())


def test_a_folder_that_is_written_again_is_what_was_written_last(tmp_path: Path):
    """In several files, then in one, then by us; what else lies there stays."""
    first, second = model_of(), model_of("retention hyena")
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    hf.wrap(second).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
    }
    assert same(LanguageModel.from_pretrained(tmp_path, verify=True), second)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path).model, second)
    (tmp_path / "trainer_state.json").write_text("{}")
    hf.wrap(first).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "trainer_state.json").exists()
    assert same(LanguageModel.from_pretrained(tmp_path, verify=True), first)
    with pytest.raises(ValueError, match=r"it holds trainer_state\.json"):
        second.save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").unlink()
    second.save_pretrained(tmp_path)
    assert same(LanguageModel.from_pretrained(tmp_path, verify=True), second)
    (tmp_path / "manifest.json").write_text('{"mine": 1}')
    hf.wrap(first).save_pretrained(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"mine": 1}'
    assert same(LanguageModel.from_pretrained(tmp_path), first)


def test_what_goes_along_goes_along(tmp_path: Path):
    model = model_of(vocab_size=256)
    model.tokenizer = ByteTokenizer(256)
    model.save_pretrained(tmp_path / "a")
    GenerationConfig(eos_token_id=7, num_beams=3).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("x")
    wrapped = hf.wrap(LanguageModel.from_pretrained(tmp_path / "a"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for each in (wrapped, read):
        assert (each.generation_config.eos_token_id, each.generation_config.num_beams) == (7, 3)
        assert each.config.tokens == "bytes"
        assert each.dtype == torch.float32
    wrapped.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "x"
    assert LanguageModel.from_pretrained(tmp_path / "b").tokenizer.encode("a") == [97]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["state"]["origin"]["folder"] == str(
        tmp_path / "a"
    )


def test_a_model_with_layers_of_ones_own(plugin_folder, tmp_path: Path):  # noqa: F811
    """They may hold numbers that are in no file, and are built in full."""
    source = (
        "import torch",
        "from seqarch.layers import Retention, register_mixer",
        "class Own(Retention):",
        "    def __init__(self, config):",
        "        super().__init__(config)",
        "        self.register_buffer('steps', torch.arange(3.0), persistent=False)",
        "        self.scale = torch.full((1,), 2.0)",
        "    def mix(self, x, state, cu_seqlens):",
        "        y, after = super().mix(x, state, cu_seqlens)",
        "        return self.scale * self.steps[1] * y, after",
        "register_mixer('own_here', Own)",
    )
    (plugin_folder / "own_layers.py").write_text("\n".join(source))
    importlib.import_module("own_layers")
    model = model_of("own_here mamba2")
    hf.wrap(model).save_pretrained(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(read.model, model)
    assert torch.equal(logits(read.model), logits(model))
    assert read.config.plugins == ["own_layers"]
    fresh = AutoModelForCausalLM.from_config(read.config)
    assert fresh.model.config == model.config
    assert not same(fresh.model, model)


def _changed(change):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def _config(**changes):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["model"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


WRONG = [
    (
        _changed(lambda tensors: tensors.pop("norm.weight")),
        "is without tensors that its config.json describes: norm.weight$",
    ),
    (
        _changed(lambda tensors: tensors.update(more=torch.zeros(2))),
        "has tensors that its config.json does not describe: more$",
    ),
    (
        _changed(lambda tensors: tensors.update({"norm.weight": torch.zeros(3)})),
        r"norm\.weight is \[3\], expected \[32\]",
    ),
    (_config(pattern="mamba22"), "cannot build the model of .*: unknown mixer 'mamba22'.* Did you mean 'mamba2'"),
    (_config(depth=4), r"is without tensors that its config\.json describes: stack\.layers\.2\.channel"),
    (_config(vocab_size=30), r"expected \[30, 32\]"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_cannot_be_read_is_one_error_that_names_it(spoil, message: str, tmp_path: Path):
    model_of().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_tasks_have_no_class(tmp_path: Path):
    model_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*SeqarchConfig"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_state_dict_may_have_the_names_of_files(tmp_path: Path):
    """As ``Trainer`` reads a checkpoint when it resumes."""
    model = model_of()
    model.save_pretrained(tmp_path)
    other = hf.SeqarchForCausalLM(hf.SeqarchConfig.of(model))
    assert not same(other.model, model)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not found.missing_keys
    assert same(other.model, model)
    other.load_state_dict(other.state_dict())
    assert same(other.model, model)
