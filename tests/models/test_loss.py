"""The loss of a language model, which holds its logits once, is torch's cross entropy of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import seqarch.models.loss
from seqarch.models import LanguageModel, LMConfig
from seqarch.ops.common.checks import accumulation_dtype

VOCABULARY = 37


def model(**options) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(LMConfig(vocab_size=VOCABULARY, d_model=32, pattern="attention", depth=1, **options)).double()
    torch.nn.init.normal_(lm.embedding.weight)
    return lm


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, targets = torch.randint(VOCABULARY, (3, 11)), torch.randint(VOCABULARY, (3, 11))
    targets[0, 3:7] = targets[2, 10] = -100
    return tokens, targets


def by_torch(lm: LanguageModel, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    logits = lm(tokens)[0].flatten(0, 1)
    return F.cross_entropy(logits.to(accumulation_dtype(logits)), targets.flatten(), reduction=reduction)


def gradients(lm: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}


@pytest.fixture(params=[1, 100, 10**6], ids="blocks of {} numbers".format)
def blocks(request, monkeypatch):
    monkeypatch.setattr(seqarch.models.loss, "BLOCK", request.param)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_torchs_with_its_gradients(blocks, tied: bool, reduction: str):
    lm, (tokens, targets) = model(tie_embeddings=tied), batch()
    own, expected = lm.loss(tokens, targets, reduction=reduction), by_torch(lm, tokens, targets, reduction)
    torch.testing.assert_close(own, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(lm, 3 * own), gradients(lm, 3 * expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda lm: lm, {"logit_cap": 2.0}),
        (lambda lm: lm.bfloat16(), {}),
        (lambda lm: lm.head.register_forward_hook(lambda head, x, y: 2 * y), {}),
        (lambda lm: torch.nn.utils.parametrizations.weight_norm(lm.head), {}),
    ],
    ids=["capped", "bfloat16", "a hook", "a parametrization"],
)
def test_where_logits_are_no_plain_product_it_is_torchs(change, options):
    lm, (tokens, targets) = model(**options), batch()
    change(lm)
    assert torch.equal(lm.loss(tokens, targets), by_torch(lm, tokens, targets))


def test_numbers_far_from_zero():
    """Logits that no exponential holds; a target that is certain costs nothing, and has no gradient."""
    lm, (tokens, targets) = model(), batch()
    lm.head.weight.data.mul_(1e4)
    own, expected = lm.loss(tokens, targets), by_torch(lm, tokens, targets)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(gradients(lm, own), gradients(lm, expected))


def test_the_logits_are_held_once():
    """What autograd keeps: the features of the head and one logit a word and token, where torch keeps two."""
    lm, (tokens, targets) = model(), batch()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == tokens.numel() * VOCABULARY:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lm.loss(tokens, targets)
    assert len(kept) == 1


def test_a_carried_state_and_packed_sequences():
    torch.manual_seed(0)
    lm = LanguageModel(LMConfig(vocab_size=VOCABULARY, d_model=32, pattern="retention", depth=2)).double()
    tokens, targets = batch()
    with torch.no_grad():
        first, state = lm(tokens[:, :4])[0], lm(tokens[:, :4])[1]
        rest = lm.loss(tokens[:, 4:], targets[:, 4:], state, reduction="sum")
        start = F.cross_entropy(first.flatten(0, 1), targets[:, :4].flatten(), reduction="sum")
        torch.testing.assert_close(start + rest, lm.loss(tokens, targets, reduction="sum"))
        packed = lm.loss(tokens.view(1, -1), targets.view(1, -1), cu_seqlens=[0, 11, 22, 33])
        torch.testing.assert_close(packed, lm.loss(tokens, targets))


def test_one_backward_pass_and_first_derivatives():
    lm, (tokens, targets) = model(), batch()
    loss = lm.loss(tokens, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = lm.loss(tokens, targets)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(loss, lm.head.weight, create_graph=True)


def test_its_products_are_counted():
    lm, (tokens, targets) = model(), batch()
    counts = []
    for loss in (lm.loss, lambda *both: by_torch(lm, *both)):
        with FlopCounterMode(display=False) as counter:
            loss(tokens, targets).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_no_target_counts():
    lm, (tokens, targets) = model(), batch()
    assert lm.loss(tokens, torch.full_like(targets, 7), ignore_index=7).isnan()
    assert lm.loss(tokens, torch.full_like(targets, 7), ignore_index=7, reduction="sum") == 0


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (torch.zeros(3, 10, dtype=torch.int64), {}, r"targets must be int64 \[3, 11\] as the tokens, got torch.int64"),
        (torch.zeros(3, 11), {}, r"got torch.float32 of shape \[3, 11\]"),
        (torch.full((3, 11), 37), {}, "targets has entries from 37 to 37, expected 0 to 36"),
        (torch.full((3, 11), -1), {}, "targets has entries from -1 to -1, expected 0 to 36"),
        (torch.zeros(3, 11, dtype=torch.int64), {"reduction": "none"}, "unknown reduction 'none', expected mean"),
    ],
)
def test_wrong_targets_are_told(targets, options, message):
    with pytest.raises(ValueError, match=message):
        model().loss(batch()[0], targets, **options)
