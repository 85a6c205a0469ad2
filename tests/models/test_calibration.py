"""Codes that are calibrated on inputs: GPTQ against its definition, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import seqarch
from seqarch.layers import MIXERS
from seqarch.layers.modules.quantized import QuantizedWeight, WeightFormat
from seqarch.models import LanguageModel, Stack, StackConfig
from seqarch.models.calibration import DAMPING, calibrated, moments
from seqarch.models.quantization import formats_of
from seqarch.testing import assert_close

FORMS = [WeightFormat("int8", 64), WeightFormat("int4", 32)]


def correlated(count: int, width: int) -> Tensor:
    """Inputs with a few directions that most of their size lies in, as those of trained models."""
    few = torch.randn(width // 8, width)
    return torch.randn(count, width // 8) @ few + 0.3 * torch.randn(count, width)


def by_definition(weight: Tensor, moment: Tensor, form: WeightFormat) -> Tensor:
    """The rounded weights, with the inverse of the moments of the columns that are left taken anew at every column."""
    wide, depth = weight.double().clone(), weight.shape[1]
    moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(depth, dtype=torch.float64)
    scale = torch.empty(0)
    for k in range(depth):
        if k % form.group_size == 0:
            scale = form.scales_of(wide[:, k : k + form.group_size]).double()
        rounded = form.rounded(wide[:, k], scale) * scale
        inverse = torch.linalg.inv(moment[k:, k:])
        wide[:, k:] -= torch.outer((wide[:, k] - rounded) / inverse[0, 0], inverse[0])
        wide[:, k] = rounded
    return wide


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_columns_make_up_for_those_before_them_as_the_definition_says(form: WeightFormat):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 192), correlated(400, 192).double()
    moment = x.mT @ x / len(x)
    got = form.decode(*calibrated(weight, moment, form), torch.float64)
    assert_close(got, by_definition(weight, moment, form), 1e-12)
    nearest = form.decode(*form.encode(weight), torch.float64)
    off, plain = (F.linear(x, rounded - weight).square().mean() for rounded in (got, nearest))
    assert off < 0.6 * plain


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 64), torch.randn(100, 64).double()
    x[:, 40] = 0
    got = FORMS[1].decode(*calibrated(weight, x.mT @ x / 100, FORMS[1]), torch.float64)
    assert got.isfinite().all()
    assert (got[:, 40] - weight[:, 40]).abs().max() < weight.abs().max() / 7
    assert_close(
        FORMS[1].decode(*calibrated(weight, torch.zeros(64, 64).double(), FORMS[1]), torch.float64),
        FORMS[1].decode(*FORMS[1].encode(weight), torch.float64),
        1e-6,
    )


def test_moments_are_means_over_all_that_a_map_reads():
    torch.manual_seed(0)
    own = LanguageModel(vocab_size=40, d_model=64, pattern="gated_delta_net", depth=1).train()
    tokens, read = torch.randint(40, (11, 5)), []
    found = moments(own, ["head"], tokens)["head"]
    assert own.training
    handle = own.head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].flatten(0, 1).double()))
    with torch.no_grad():
        own.eval()(tokens)
    handle.remove()
    assert_close(found, read[0].mT @ read[0] / len(read[0]), 1e-6)


QUICK = ("gated_delta_net",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
@torch.no_grad()
def test_every_mixer_is_nearer_to_itself_with_calibration(name: str):
    torch.manual_seed(0)
    mixers = {"mla": {"q_lora_rank": 32}, "moba": {"block_size": 4}, "jet_block": {"tap_reduction": 2}}
    mixers["preconditioned_gated_delta_net"] = {"num_heads": 2, "key_width": 16, "value_width": 32}
    mixers = {name: mixers[name]} if name in mixers else {}
    own = Stack(StackConfig(d_model=64, pattern=name, depth=2, mixers=mixers)).eval()
    x = correlated(9 * 64, 64).unflatten(0, (9, 64))
    expected = own(x)[0]
    plain, better = (seqarch.quantize(copy.deepcopy(own), "int4", calibration=c) for c in (None, x))
    assert formats_of(plain) == formats_of(better)
    off, nearest = (float((each(x)[0] - expected).square().mean()) for each in (better, plain))
    assert off < nearest


@torch.no_grad()
def test_a_calibrated_model_is_one_of_its_kind(tmp_path):
    torch.manual_seed(0)
    own = LanguageModel(
        vocab_size=40, d_model=64, pattern="mamba attention/moe", depth=2, channels={"moe": {"hidden": 32}}
    ).eval()
    tokens, names = torch.randint(40, (4, 16)), {*formats_of(seqarch.quantize(copy.deepcopy(own), "int4"))}
    tied = LanguageModel(vocab_size=40, d_model=64, pattern="gla", depth=1, tie_embeddings=True)
    seqarch.quantize(tied, "int4", calibration=tokens)
    assert tied.head.codes is tied.embedding.codes
    seqarch.quantize(own, "int4", calibration=tokens)
    assert {*formats_of(own)} == names
    own.save_pretrained(tmp_path / "small")
    assert torch.equal(LanguageModel.from_pretrained(tmp_path / "small")(tokens)[0], own(tokens)[0])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([[1, 2]], "calibration is list"),
        (torch.zeros(4), "a sequence a row"),
        (torch.full((2, 3), 99), "99|index|range"),
    ],
)
def test_inputs_that_calibrate_nothing_change_nothing(inputs, said):
    own = LanguageModel(vocab_size=40, d_model=64, pattern="gated_delta_net", depth=2)
    before = dict(own.state_dict())
    with pytest.raises((ValueError, IndexError), match=said):
        seqarch.quantize(own, "int4", calibration=inputs)
    assert before.keys() == own.state_dict().keys()


def test_a_map_that_is_not_called_or_reads_nan_is_named_and_all_is_put_back():
    own = LanguageModel(vocab_size=40, d_model=64, pattern="gated_delta_net attention/moe", depth=2)
    before, tokens = list(own.state_dict()), torch.randint(40, (2, 9))
    own.spare = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="spare is not called"):
        seqarch.quantize(own, "int4", calibration=tokens, group_size=32)
    del own.spare
    with torch.no_grad():
        own.get_submodule("stack.layers.1.norm").weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\..* has inputs that are no finite"):
        seqarch.quantize(own, "int4", calibration=tokens)
    assert list(own.state_dict()) == before
    assert not any(isinstance(each, QuantizedWeight) for each in own.modules())
