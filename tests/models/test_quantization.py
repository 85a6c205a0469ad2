"""Weights of 8 and 4 bits: what they stand for, how they are computed with, and that nothing passes them by."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import seqarch
from seqarch.checkpoints.errors import CheckpointError
from seqarch.layers import MIXERS
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.quantized import QuantizedLinear, QuantizedWeight, WeightFormat
from seqarch.models import LanguageModel, Stack, StackConfig
from seqarch.models.quantization import formats_of
from seqarch.ops.native import cpu_library, quantized_linear
from seqarch.testing import assert_close, error
from tests.support.one_token import COMPILED, NOT_CAPTURED

FORMS = [WeightFormat(name, group) for name in ("int8", "int4") for group in (32, 64)]
LARGEST = {"int8": 0.5 / 127, "int4": 1 / 8}
"""What rounding changes a weight by at most, as a share of its group's largest; with 1 / 256 for scales in bfloat16.

Of 4 bits it is half a step but for what lies opposite of the largest, where a code is missing."""


def model(pattern: str = "gated_delta_net attention/moe", **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=40, d_model=64, pattern=pattern, depth=2, **options).eval()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_rounded_to_the_nearest_code(form: WeightFormat):
    torch.manual_seed(0)
    weight = torch.randn(7, 320)
    weight[0] = 0
    weight[1, :64] = torch.arange(64.0) / 63 * 7
    codes, scales = form.encode(weight)
    assert codes.shape == (7, form.code_bytes(320))
    assert scales.shape == (7, 320 // form.group_size)
    rounded = form.decode(codes, scales, torch.float32)
    most = weight.unflatten(1, (-1, form.group_size)).abs().amax(-1, keepdim=True).expand(-1, -1, form.group_size)
    bound = most.flatten(1) * (LARGEST[form.name] * 1.01 + 1 / 256)
    assert ((rounded - weight).abs() <= bound).all()
    assert not rounded[0].any()
    again, same = form.encode(rounded)
    assert_close(form.decode(again, same, torch.float32), rounded, 0.01)
    assert torch.equal(form.decode(codes, scales, torch.float64).float(), rounded)


@pytest.fixture(params=[True, False], ids=["integers", "floats"])
def integers(library: None, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether sums may be of integers: processors without AVX-512 VNNI compute as where they may not."""
    quantized_linear.integer_products(request.param)
    yield request.param
    quantized_linear.integer_products(True)


@pytest.mark.parametrize("isa", cpu_library.supported_isas())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_kernel_multiplies_by_what_codes_stand_for(form: WeightFormat, isa: str, integers: bool):
    torch.manual_seed(0)
    with cpu_library.use_isa(isa):
        assert not (quantized_linear.integer_products(integers) and (isa != "avx512" or not integers))
        for depth, width in ((64, 5), (192, 17), (1216, 33)):
            module = QuantizedLinear.of(torch.randn(width, depth), form)
            for rows in (1, 2, 3, 4, 9):
                x, bias = torch.randn(rows, 1, depth), torch.randn(width)
                expected = F.linear(x.double(), module.dequantized(torch.float64), bias.double())
                got = quantized_linear.quantized_linear(x, module.codes, module.scales, bias)
                assert_close(got, expected, 1e-6, f"{depth} {width} {rows}")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_any_size_are_multiplied(form: WeightFormat, integers: bool):
    torch.manual_seed(0)
    module, x = QuantizedLinear.of(torch.randn(9, 128), form), torch.randn(7, 128)
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e30
    x[3, 5] = 1e6
    x[4, 5], x[5, 5] = torch.nan, torch.inf
    y = quantized_linear.quantized_linear(x, module.codes, module.scales, None)
    assert not y[0].any()
    for row in (1, 2, 3, 6):
        expected = F.linear(x[row].double(), module.dequantized(torch.float64))
        assert_close(y[row], expected, 1e-6, str(row))
    assert y[4].isnan().all()
    assert not y[5].isfinite().any()


@pytest.mark.usefixtures("library")
def test_the_operator_keeps_torchs_rules_and_refuses_other_groups():
    module, x = QuantizedLinear.of(torch.randn(5, 64), FORMS[2]), torch.randn(2, 64)
    torch.library.opcheck(quantized_linear.quantized_linear, (x, module.codes, module.scales, torch.randn(5)))
    with pytest.raises(ValueError, match="outside its domain"):
        quantized_linear.quantized_linear(x[:, :48].contiguous(), module.codes, module.scales, None)


def test_many_rows_gradients_and_other_dtypes_are_torchs():
    layer = QuantizedLinear.of(torch.randn(96, 64), FORMS[3], nn.Parameter(torch.randn(96)))
    plain = Linear(64, 96)
    plain.load_state_dict({"weight": layer.dequantized(), "bias": layer.bias})  # type: ignore[dict-item]
    for x in (torch.randn(40, 64), torch.randn(2, 64)):
        x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(x).square().sum().backward()
        plain(other).square().sum().backward()
        assert x.grad is not None
        assert other.grad is not None
        assert_close(x.grad, other.grad, 1e-6)
    wide = copy.deepcopy(layer).double()
    assert wide(x.double()).dtype == torch.float64
    assert wide.scales.dtype == torch.int16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


OPTIONS: dict[str, dict[str, Any]] = {
    "mla": {"q_lora_rank": 32},
    "moba": {"block_size": 4},
    "jet_block": {"tap_reduction": 2},
    "preconditioned_gated_delta_net": {"num_heads": 2, "key_width": 16, "value_width": 32},
}
"""Of mixers whose maps have widths at this size that no group divides."""


QUICK = ("gated_delta_net", "mamba")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
def test_every_mixer_computes_with_the_rounded_weights(name: str):
    torch.manual_seed(0)
    mixers = {name: OPTIONS[name]} if name in OPTIONS else {}
    stack = Stack(StackConfig(d_model=64, pattern=name, depth=1, mixers=mixers)).eval()
    costs, maps = [stack.flops(9), stack.step_flops(9)], {p for p, m in stack.named_modules() if type(m) is Linear}
    seqarch.quantize(stack, "int4")
    assert [stack.flops(9), stack.step_flops(9)] == costs
    assert {path for path, each in stack.named_modules() if isinstance(each, QuantizedLinear)} <= maps
    plain, x = seqarch.dequantize(copy.deepcopy(stack)), torch.randn(2, 6, 64)
    assert {path for path, each in plain.named_modules() if type(each) is Linear} == maps
    with torch.no_grad():
        expected, _ = plain(x)
        assert_close(stack(x)[0], expected, 1e-6)
        state, outputs = None, []
        for token in x.split(1, dim=1):
            y, state = stack(token, state)
            outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected, 3e-6)
    if name not in NOT_CAPTURED:
        assert all(said.startswith(COMPILED) and "linear.default" not in said for said in stack.explain_one_token())


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_quantised_saved_read_and_dequantised(tied: bool, tmp_path: Path):
    own = model(tie_embeddings=tied, pattern="mamba attention/moe", channels={"moe": {"hidden": 32}})
    tokens, names = torch.randint(40, (2, 9)), list(own.state_dict())
    count, size = own.num_parameters(), seqarch.weight_bytes(own)
    assert seqarch.quantize(own, "int4", keep="stack.layers.0.*") is own
    assert own.num_parameters() == count
    assert seqarch.weight_bytes(own) < size
    expected = own(tokens)[0]
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(other(tokens)[0], expected)
    empty = copy.deepcopy(own).to("meta").to_empty(device="cpu")
    empty.load_state_dict(own.state_dict())
    assert torch.equal(empty(tokens)[0], expected)
    if tied:
        assert own.head.codes is own.embedding.codes
        assert empty.head.codes is empty.embedding.codes
    own.save_pretrained(tmp_path / "small")
    read = LanguageModel.from_pretrained(tmp_path / "small")
    assert formats_of(read) == formats_of(own)
    assert torch.equal(read(tokens)[0], expected)
    assert torch.equal(read.generate([1, 2, 3], 5)[0], own.generate([1, 2, 3], 5)[0])
    plain = seqarch.dequantize(read)
    assert list(plain.state_dict()) == names
    assert_close(plain(tokens)[0], expected, 1e-5)
    assert (plain.head.weight is plain.embedding.weight) == tied


@torch.no_grad()
def test_experts_that_are_chosen_are_read_alone():
    own = model(channels={"moe": {"hidden": 32, "shared_experts": 1}})
    tokens = torch.randint(40, (1, 5))
    plain = seqarch.dequantize(seqarch.quantize(copy.deepcopy(own), "int8", group_size=32))
    seqarch.quantize(own, "int8", group_size=32)
    assert (
        sum(isinstance(each, QuantizedWeight) for each in own.get_submodule("stack.layers.1.channel").children()) == 3
    )
    assert_close(own(tokens)[0], plain(tokens)[0], 1e-5)
    state, outputs = None, []
    for token in tokens.split(1, dim=1):
        y, state = own(token, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), plain(tokens)[0], 1e-5)
    with torch.enable_grad():
        own.loss(tokens, tokens).backward()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "int5"}, "int5"),
        ({"name": "int4", "group_size": 48}, "group_size is int 48, expected 32 or 64"),
        ({"name": "int4", "keep": ["nothing.there"]}, "nothing.there"),
        ({"name": "int4", "keep": "*"}, "left to quantise"),
        ({"name": "int8", "keep": ()}, "has 96 inputs, which groups of 64 do not divide"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(options: dict[str, Any], said: str):
    own = model(channels={"moe": {"hidden": 96}})
    with pytest.raises(ValueError, match=said):
        seqarch.quantize(own, **options)
    assert not formats_of(own)


def test_other_models_that_cannot_be_quantised():
    own = model(tie_embeddings=True)
    with pytest.raises(ValueError, match="are one weight"):
        seqarch.quantize(own, "int4", keep="head")
    with pytest.raises(ValueError, match="has no quantised weights"):
        seqarch.dequantize(own)
    hooked = own.get_submodule("stack.layers.0.mixers.0.out_proj")
    handle = hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="out_proj has hooks"):
        seqarch.quantize(own, "int4", group_size=32)
    handle.remove()
    with torch.no_grad():
        own.embedding.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers"):
        seqarch.quantize(own, "int4")


def test_folders_without_scales_or_with_other_formats_are_refused(tmp_path: Path):
    own = seqarch.quantize(model("gla"), "int4")
    with pytest.raises(ValueError, match="is quantised"):
        own.save_pretrained(tmp_path / "theirs", family="llama")
    own.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    file = tmp_path / "own" / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    save_file({name: each for name, each in tensors.items() if name != "head.scales"}, file)
    with pytest.raises(CheckpointError, match=r"head\.scales"):
        LanguageModel.from_pretrained(tmp_path / "own")
    save_file(tensors, file)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    for wrong in ({"head": {"name": "int3", "group_size": 32}}, {"heads": {"name": "int4", "group_size": 32}}, [1]):
        (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "quantization": wrong}))
        with pytest.raises(CheckpointError, match="quantization"):
            LanguageModel.from_pretrained(tmp_path / "own")
    assert error(torch.ones(2), torch.ones(2)) == 0
