"""A model as a folder of seqarch's own: what is saved comes back, and what cannot be read or written is one error."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import seqarch
from experiments.runs.folder import RunFolder
from seqarch import LanguageModel
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import manifest_digest, read_manifest
from seqarch.checkpoints.tokenizers import ByteTokenizer
from seqarch.interop import FAMILIES
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.pretrained import place
from seqarch.pretrained.shards import size_in_bytes
from tests.support.plugins import plugin_folder  # noqa: F401
from tests.support.runs import tiny_config, train_here
from tests.support.variants import VARIANTS

TOKENS = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(1))
SMALL = {"vocab_size": 31, "d_model": 32, "depth": 2}


def model_of(pattern: str = "mamba2 attention/moe", **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(pattern=pattern, **{**SMALL, **options}).eval()


def same(a: LanguageModel, b: LanguageModel) -> bool:
    """Whether two models hold the same numbers in the same dtypes, and compute the same."""
    own, other = a.state_dict(), b.state_dict()
    equal = all(own[n].dtype == other[n].dtype and torch.equal(own[n], other[n]) for n in own.keys() | other.keys())
    with torch.no_grad():
        return equal and torch.equal(a(TOKENS)[0], b(TOKENS)[0])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in several files."""
    model_of().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.mark.parametrize("name", [*MIXERS, *(name for name in CHANNEL_MIXERS if name not in ("swiglu",))])
def test_every_layer_comes_back_from_a_folder(name, tmp_path):
    """Under its options too; in evaluation and, of the parameters' gradients, in training."""
    given = [{}, *VARIANTS.get(name, [])] if name in MIXERS else [{}]
    for number, options in enumerate(given):
        kind = "mixers" if name in MIXERS else "channels"
        pattern = name if name in MIXERS else f"attention/{name}"
        model = model_of(pattern, **{kind: {name: options}}, depth=1, d_model=64)
        model.save_pretrained(tmp_path / str(number))
        read = LanguageModel.from_pretrained(tmp_path / str(number))
        assert same(model, read)
        assert read.config == model.config
        assert not any(tensor.is_meta for tensor in [*read.parameters(), *read.buffers()])
        assert all(parameter.requires_grad for parameter in read.parameters())
        read.train().loss(TOKENS, TOKENS).backward()


def test_reading_leaves_random_numbers_and_dtypes_alone(folder):
    before = torch.random.get_rng_state()
    model = LanguageModel.from_pretrained(str(folder))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert not model.training
    assert model.tokenizer is None
    assert (model.origin.family, model.origin.folder, model.origin.revision) == ("seqarch", str(folder), None)
    assert all(len(entry["sha256"]) == 64 for entry in model.origin.files.values())
    assert copy.deepcopy(model).origin == pickle.loads(pickle.dumps(model)).origin == model.origin


def test_dtypes_are_the_files_or_the_one_that_is_asked_for(tmp_path):
    model = model_of(channels={"moe": {"expert_bias": True}})
    wide = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    mixer = model.stack.layers[0].mixers[0]  # type: ignore[union-attr, index]
    mixer.A_log = torch.nn.Parameter(wide["stack.layers.0.mixers.0.A_log"])  # as published files have it
    model.save_pretrained(tmp_path / "mixed")
    read = LanguageModel.from_pretrained(tmp_path / "mixed")
    assert same(model, read)
    state = read.state_dict()
    float32 = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert float32 == {"stack.layers.0.mixers.0.A_log", "stack.layers.1.channel.router.expert_bias"}
    assert {state[name].dtype for name in state.keys() - float32} == {torch.bfloat16}
    asked = LanguageModel.from_pretrained(tmp_path / "mixed", dtype=torch.bfloat16)
    assert same(asked, read.to(torch.bfloat16))
    assert same(LanguageModel.from_pretrained(tmp_path / "mixed", torch.float64, "cpu"), copy.deepcopy(model).double())
    with pytest.raises(ValueError, match=r"dtype must be a floating point torch\.dtype, got torch\.int8"):
        LanguageModel.from_pretrained(tmp_path / "mixed", torch.int8)
    with pytest.raises(ValueError, match=r"got torch\.float8_e5m2; expected one of at least 16 bits"):
        LanguageModel.from_pretrained(tmp_path / "mixed", torch.float8_e5m2)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    model = model_of(tie_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    assert "head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    read = LanguageModel.from_pretrained(tmp_path / "tied", verify=True)
    assert same(model, read)
    assert read.head.weight is read.embedding.weight


def _truncated(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])


def _without_manifest(spoil):
    def spoiled(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        spoil(folder)

    return spoiled


def _header(content: bytes):
    def spoiled(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(content)

    return spoiled


def _edit(name: str, change):
    def edited(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edited


INDEX = "model.safetensors.index.json"


def _all_to(file: str):
    return _edit(INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], file)))


def _tensors(change):
    """Change the tensors of the first file, which is written anew."""

    def changed(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return changed


def _pickle_alone(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX, folder / "manifest.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _quantised(tensors) -> None:
    tensors["embedding.weight"] = tensors["embedding.weight"].to(torch.float8_e4m3fn)


WRONG = [
    (shutil.rmtree, "model is no model's folder: there is no such folder"),
    (lambda folder: (folder / "config.json").unlink(), "model is no model's folder: it has no config.json"),
    (lambda folder: (folder / "config.json").write_text("["), r"cannot read .*config\.json"),
    (_edit("config.json", lambda config: config.update(format=9)), r"config\.json is of format 9, and this version"),
    (_edit("config.json", lambda config: config.pop("model")), r"config\.json has no 'model', a JSON object"),
    (_edit("config.json", lambda config: config["model"].update(pattern="mamba3x")), "unknown mixer 'mamba3x'.*mamba3"),
    (_edit("config.json", lambda config: config["model"].update(widht=1)), "unexpected keyword argument 'widht'"),
    (_edit("config.json", lambda config: config["model"].update(pattern=3)), "cannot build the model of .*model: "),
    (_edit("config.json", lambda config: config["model"].update(mixers="x")), "cannot build the model .*mixers must"),
    (_edit("config.json", lambda config: config["model"].update(vocab_size=2**31 - 1)), "cannot build|by config.json"),
    (_edit("config.json", lambda config: config.update(plugins="os")), "plugins is 'os', expected a list of modules'"),
    (_edit("config.json", lambda config: config.update(model_type=["mamba"])), "has no model_type, a family's name"),
    (_edit("config.json", lambda config: config.update(model_type="bambaa")), "unknown model_type 'bambaa': expected"),
    (_edit("config.json", lambda config: config.update(model_type="mamba22")), r"Did you mean 'mamba2'\?"),
    (_edit("config.json", lambda config: config["model"].update(depth=4)), r"  missing: stack\.layers\.2\.channel"),
    (_edit("config.json", lambda config: config["model"].update(pattern="mamba2")), "  left over: stack.layers.1.chan"),
    (_edit("config.json", lambda config: config["model"].update(vocab_size=32)),
     r"embedding\.weight is \[31, 32\], expected \[32, 32\] by config\.json"),
    (_truncated, r"is damaged: model-00002-of-.* is not what was written"),
    (_without_manifest(_truncated), r"model-00002-of-.*safetensors is damaged, or no safetensors file: "),
    (_without_manifest(_header(b"")), r"model-00001-of-.*safetensors is damaged, or no safetensors file: "),
    (_without_manifest(_header(struct.pack("<Q", 1 << 60) + b"{}")), "damaged, or no safetensors file: .*too large"),
    (_without_manifest(_header(struct.pack("<Q", 2) + b"[]")), "model-00001-of-.*damaged, or no safetensors file: "),
    (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "model-00002-of-.* is missing"),
    (_without_manifest(lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink()),
     r"model-00002-of-\d+\.safetensors is missing, of which .* says"),
    (_all_to("../model.safetensors"), r"index\.json names '\.\./model\.safetensors': expected a \.safetensors file of"),
    (_all_to("/etc/passwd"), r"index\.json names '/etc/passwd': expected a \.safetensors file of this folder"),
    (_all_to("config.json"), r"names 'config\.json': expected a \.safetensors file of this folder"),
    (_edit(INDEX, lambda index: index.pop("weight_map")), "index.json has no weight_map, an object of the file"),
    (_edit(INDEX, lambda index: index["weight_map"].update(more=next(iter(index["weight_map"].values())))),
     "has no tensor more, which model.safetensors.index.json says is there"),
    (_tensors(_quantised), "embedding.weight is of F8_E4M3, expected one of .*: quantised models are not read"),
    (_tensors(lambda tensors: tensors.update({"embedding.weight": tensors["embedding.weight"].view(torch.int32)})),
     r"model-00001-of-.*: embedding\.weight is of torch\.int32, expected floating point"),
    (_all_to(f"{'x' * 300}.safetensors"), r"names 'x*\.safetensors', which cannot be a file: File name too long"),
    (lambda folder: [(folder.parent / ".model.1.former").mkdir(), folder.rename(folder.parent / ".model.0.former")],
     r"its saving was killed; the former model is .*\.model\.0\.former: rename it"),
    (lambda folder: (folder / "merges.txt").symlink_to("/proc/self/mem"), "cannot read a file that goes along with"),
    (_tensors(lambda tensors: tensors.update({"head.weight": torch.zeros(1)})), "head.weight is in two files of"),
    (_pickle_alone, r"pytorch_model\.bin is a pickle, which may run anything as it is read .* Convert it once"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_cannot_be_read_is_one_error_that_names_it(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.from_pretrained(folder)


def test_unknown_families_list_the_known_ones(folder):
    _edit("config.json", lambda config: config.update(model_type="bloom"))(folder)
    with pytest.raises(CheckpointError, match=", ".join([*sorted([*FAMILIES, "seqarch"])])):
        LanguageModel.from_pretrained(folder)


def test_a_configuration_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(CheckpointError, match=r"config\.json has no model_type, a family's name, and no run's 'model'"):
        LanguageModel.from_pretrained(tmp_path)


def test_wrong_paths_are_told_what_they_are(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^org/name is no model's folder: .*a model of a hub is to be downloaded"
    ):
        LanguageModel.from_pretrained("org/name")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is no model's folder: it is a file"):
        LanguageModel.from_pretrained(tmp_path / "file")
    model_of().save_pretrained(tmp_path / "models--a--b" / "snapshots" / ("0" * 40))
    with pytest.raises(CheckpointError, match=f"but the cache of one: expected .*{'0' * 40}"):
        LanguageModel.from_pretrained(tmp_path / "models--a--b")
    read = LanguageModel.from_pretrained(tmp_path / "models--a--b" / "snapshots" / ("0" * 40))
    assert read.origin.revision == "0" * 40
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it has an adapter"):
        LanguageModel.from_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="is no run's folder, which alone has a step: got step=3"):
        LanguageModel.from_pretrained(read.origin.folder, step=3)


def test_changed_numbers_are_found_by_their_hash(folder):
    LanguageModel.from_pretrained(folder, verify=True)
    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    LanguageModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"is damaged: {file.name} is not what was written .*: its SHA-256 is"):
        LanguageModel.from_pretrained(folder, verify=True)
    manifest = (folder / "manifest.json").read_text()
    for spoilt in (manifest[:-9], manifest.replace('"bytes": ', '"bytes": 1')):
        (folder / "manifest.json").write_text(spoilt)
        with pytest.raises(CheckpointError, match=r"manifest\.json is not what was written: put the former one back"):
            LanguageModel.from_pretrained(folder)
    (folder / "manifest.json").write_text('["of another program"]')
    LanguageModel.from_pretrained(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest of seqarch's with the hashes"):
        LanguageModel.from_pretrained(folder, verify=True)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_takes_the_place_of_an_earlier_one_and_of_nothing_else(folder, monkeypatch):
    other = model_of("retention", depth=1)
    other.save_pretrained(folder)
    assert same(other, LanguageModel.from_pretrained(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert set(listing(folder)) == {"config.json", "manifest.json", "model.safetensors"}
    (folder.parent / "empty").mkdir()
    other.save_pretrained(folder.parent / "empty")
    (folder / "notes.txt").write_text("mine")
    before = listing(folder.parent)
    with pytest.raises(ValueError, match=r"cannot save to .*model: it holds notes\.txt, which no saved model"):
        model_of().save_pretrained(folder)
    (folder / "notes.txt").unlink()
    del before["model/notes.txt"]
    (folder.parent / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="link: it is a link; expected a folder"):
        model_of().save_pretrained(folder.parent / "link")
    (folder.parent / "link").unlink()
    with pytest.raises(ValueError, match=r"config\.json: it is a file; expected a folder"):
        model_of().save_pretrained(folder / "config.json")
    with pytest.raises(ValueError, match=r"expected the path of a folder of its own"):
        model_of().save_pretrained("/")
    stranger = folder.parent / "stranger"
    shutil.copytree(folder, stranger, ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(ValueError, match=r"stranger: it holds config\.json, model\.safetensors, which no saved model"):
        model_of().save_pretrained(stranger)
    shutil.rmtree(stranger)
    assert listing(folder.parent) == before


def _listed(name: str):
    """A manifest that says of a file that it was saved."""

    def listed(folder: Path) -> None:
        (folder.parent / "notes.txt").write_text("mine")
        (folder / "notes.txt").write_text("mine")
        manifest = read_manifest(folder)
        assert manifest is not None
        manifest["files"][name] = {"bytes": 4}
        content = {**manifest, "sha256": manifest_digest(manifest)}
        (folder / "manifest.json").write_text(json.dumps(content))

    return listed


def _replaced(put):
    def replaced(folder: Path) -> None:
        (folder / "config.json").rename(folder.parent / "config.json")
        put(folder / "config.json", folder.parent / "config.json")

    return replaced


FOREIGN = {
    "listed elsewhere": (_listed("../notes.txt"), "config.json, manifest.json, model"),
    "listed": (_listed("notes.txt"), "notes.txt"),
    "edited": (_edit("config.json", lambda config: config.update(note="mine")), "config.json"),
    "other numbers": (_tensors(lambda tensors: tensors["embedding.weight"].add_(1)), "config.json, model"),
    "of the same size": (_replaced(lambda file, old: file.write_bytes(b" " * old.stat().st_size)), "config.json"),
    "a folder": (_replaced(lambda file, _: (file / "mine").mkdir(parents=True)), "config.json"),
    "a link": (_replaced(lambda file, old: file.symlink_to(old)), "config.json"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_nothing_of_others_is_lost_under_the_names_of_a_saved_model(folder, case):
    change, named = FOREIGN[case]
    change(folder)
    before = listing(folder.parent)
    with pytest.raises(ValueError, match=f"cannot save to .*model: it holds {named}.*, which no saved model"):
        model_of().save_pretrained(folder)
    assert listing(folder.parent) == before


def test_what_comes_while_a_model_is_saved_stays(folder, monkeypatch):
    rename = Path.rename

    def late(path, target):
        if target.name.endswith(".former"):
            (path / "notes.txt").write_text("mine")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ValueError, match=r"it holds notes\.txt, which no saved model"):
        model_of().save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert same(model_of(), LanguageModel.from_pretrained(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["write_manifest", "rename"])
def test_a_failure_leaves_what_was_there(folder, monkeypatch, failing):
    before = listing(folder.parent)

    def fail(*_, **__):
        raise OSError("the disk is full")

    if failing == "rename":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.name.endswith(".tmp") else rename(a, b))
    else:
        monkeypatch.setattr("seqarch.pretrained.saving.write_manifest", fail)
    with pytest.raises(OSError, match="the disk is full"):
        model_of("retention", depth=1).save_pretrained(folder)
    monkeypatch.undo()
    assert listing(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_places_and_disks_that_take_no_folder_are_named(tmp_path, monkeypatch):
    """The working folder too, which a process would be left in without its name."""
    model = model_of("retention", depth=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="it is the working folder; expected one in it, or elsewhere"):
        model.save_pretrained(".")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot save to .*file/model: no folder can be made in .*file: "):
        model.save_pretrained(tmp_path / "file" / "model")

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("seqarch.pretrained.shards.save_file", full)
    with pytest.raises(OSError, match=r"cannot write \d+ bytes of tensors to .*: No space left on device"):
        model.save_pretrained(tmp_path / "model")
    assert listing(tmp_path) == {"file": b"mine"}
    assert len(list(tmp_path.iterdir())) == 1


def test_models_that_a_folder_cannot_hold_are_refused(tmp_path):
    model = model_of("attention", depth=1)
    model.head = torch.nn.Linear(32, 40)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"not the one that its config describes: head\.bias \(40,\) .*absent"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"is on the meta device, without numbers to save: embedding\.weight is"):
        model_of("attention", depth=1).to("meta").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"unknown family 'mamba22': .* Did you mean 'mamba2'\?"):
        model_of().save_pretrained(tmp_path / "model", family="mamba22")
    with pytest.raises(ValueError, match=r"unknown family \['mamba2'\]"):
        model_of().save_pretrained(tmp_path / "model", family=["mamba2"])  # type: ignore[arg-type]
    tied = model_of("attention", depth=1, tie_embeddings=True)
    tied.head.weight = torch.nn.Parameter(tied.head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"head\.weight and embedding\.weight hold different numbers"):
        tied.save_pretrained(tmp_path / "model")
    model = model_of("attention", depth=1)
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are one tensor, which the model's"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"embedding\.weight is of torch\.float8_e5m2, expected one of torch\.float64"):
        model_of("attention", depth=1).to(torch.float8_e5m2).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    for size in ("5 parsecs", 0, True, -1, "GB", None, f"{'1' * 400}GB"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            size_in_bytes(size)  # type: ignore[arg-type]
    assert [size_in_bytes(size) for size in (7, "5GB", "1.5 KiB")] == [7, 5 * 10**9, 1536]
    assert place.check_place(tmp_path / "nothing") is None


def test_registered_mixers_of_ones_own(plugin_folder, tmp_path):  # noqa: F811
    source = "from seqarch.layers import Retention, register_mixer\nclass Own(Retention):\n    pass\n"
    (plugin_folder / "own_layers.py").write_text(f'{source}register_mixer("own_here", Own)\n')
    importlib.import_module("own_layers")
    model = model_of("own_here own_layers:Own")
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["plugins"] == ["own_layers"]
    del MIXERS["own_here"], sys.modules["own_layers"]
    again = LanguageModel.from_pretrained(tmp_path / "model")
    assert same(model, again)
    again.save_pretrained(tmp_path / "again")
    del MIXERS["own_here"], sys.modules["own_layers"]
    (plugin_folder / "own_layers.py").unlink()
    with pytest.raises(CheckpointError, match=r"unknown mixer 'own_here'.*cannot import the plug-in own_layers"):
        LanguageModel.from_pretrained(tmp_path / "again")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    task = {"name": "needle", "length": 256, "validation_examples": 4, "test_examples": 4}
    code, folder = train_here(tiny_config(tmp_path_factory.mktemp("runs"), task=task, train__steps=5))
    assert code == 0
    return folder


def test_a_run_and_its_checkpoints_are_folders_too(run, tmp_path):
    model = seqarch.load(run.path)
    (checkpoint,) = run.checkpoints.glob("step-*")
    for path in (run.path, checkpoint):
        read = LanguageModel.from_pretrained(path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), read.parameters(), strict=True))
        assert (read.origin.family, read.origin.revision) == ("run", checkpoint.name)
    assert LanguageModel.from_pretrained(run.path, torch.bfloat16, step=5).head.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="has no step-000007, one of that step"):
        LanguageModel.from_pretrained(run.path, step=7)
    model.save_pretrained(tmp_path / "model")
    read = LanguageModel.from_pretrained(tmp_path / "model")
    assert isinstance(read.tokenizer, ByteTokenizer)
    state = json.loads((tmp_path / "model" / "manifest.json").read_text())["state"]
    assert (state["origin"]["family"], state["origin"]["revision"]) == ("run", checkpoint.name)


def test_tokenizers_and_other_files_go_along(folder, tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    beside = {"tokenizer_config.json": b"{}", "generation_config.json": b'{"do_sample": true}', "notes.md": b"no"}
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    model = LanguageModel.from_pretrained(folder)
    assert model.tokenizer.encode("b a") == [1, 0]
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "copy")
    files = listing(tmp_path / "copy")
    assert {name for name in files if not name.startswith(("model", "config", "manifest"))} == {
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    }
    assert files["generation_config.json"] == beside["generation_config.json"]
    assert LanguageModel.from_pretrained(tmp_path / "copy", verify=True).tokenizer.encode("b a") == [1, 0]
