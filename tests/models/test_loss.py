"""The loss of a language model, which holds its logits once, is torch's cross entropy of them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import seqarch.models.loss
from seqarch.models import LanguageModel, LMConfig
from seqarch.models.loss import head_cross_entropy
from seqarch.models.stack import in_turn
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native import onednn

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


COUNTED = {"none": 0, "one": 1, "few": 9, "three of four": 24, "most": 28, "all": 33}


def counting(count: int) -> tuple[Tensor, Tensor]:
    """A batch of 33 tokens of which so many targets count."""
    tokens, targets = batch()[0], torch.randint(VOCABULARY, (33,))
    targets[torch.randperm(33)[count:]] = -100
    return tokens, targets.view(3, 11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [count for count in COUNTED.values() if count])
def test_it_is_torchs_with_its_gradients(blocks, count: int, tied: bool, reduction: str):
    lm, (tokens, targets) = model(tie_embeddings=tied, logit_scale=0.3 if tied else 1.0), counting(count)
    own, expected = lm.loss(tokens, targets, reduction=reduction), by_torch(lm, tokens, targets, reduction)
    torch.testing.assert_close(own, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(lm, 3 * own), gradients(lm, 3 * expected), rtol=1e-11, atol=1e-13)


class Seen:
    """The shapes that a module's input and the head's logits had."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
        self.counted: list[int] = []
        monkeypatch.setattr(
            "seqarch.models.language_model.head_cross_entropy",
            lambda features, *rest: (self.counted.append(len(features)), head_cross_entropy(features, *rest))[1],
        )
        kind = type(lm.stack.layers[-1].channel)
        self.channel: list[int] = []
        inner = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda own, x: (self.channel.append(x.shape[:2].numel()), inner(own, x))[1]
        )


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (9, 9), (24, 24), (25, 33), (33, 33), (0, 33)])
def test_head_and_last_channel_mixer_see_targets_that_count(count: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Up to three of four; from there on, all."""
    lm, (tokens, targets) = model(), counting(count)
    seen = Seen(lm, monkeypatch)
    lm.loss(tokens, targets)
    assert (seen.counted, seen.channel) == ([rows], [rows])


WATCHED = {
    "a hook on the channel mixer": lambda lm: lm.stack.layers[-1].channel.register_forward_hook(lambda *_: None),
    "a hook inside of it": lambda lm: lm.stack.layers[-1].channel.in_proj.register_forward_hook(lambda *_: None),
    "a forward of the layer": lambda lm: setattr(
        lm.stack.layers[-1], "forward", partial(checkpoint, lm.stack.layers[-1].forward, use_reentrant=False)
    ),
    "another schedule": lambda lm: setattr(lm.stack, "schedule", lambda *given: in_turn(*given)),
}


@pytest.mark.parametrize("watch", WATCHED)
def test_who_watches_a_layer_sees_all_tokens(watch: str, monkeypatch: pytest.MonkeyPatch):
    lm, (tokens, targets) = model(), counting(9)
    expected = gradients(lm, by_torch(lm, tokens, targets))
    seen = Seen(lm, monkeypatch)
    WATCHED[watch](lm)
    loss = lm.loss(tokens, targets)
    assert (seen.counted, seen.channel) == ([9], [33])
    torch.testing.assert_close(gradients(lm, loss), expected, rtol=1e-11, atol=1e-13)


def test_a_router_sees_all_tokens():
    options = {"channel": "moe", "channels": {"moe": {"num_experts": 4, "top_k": 2, "hidden": 32}}}
    lm, (tokens, targets) = model(**options), counting(9)
    whole = gradients(lm, by_torch(lm, tokens, targets) + lm.auxiliary_loss())
    metrics = lm.router_metrics()
    loss = lm.loss(tokens, targets)
    torch.testing.assert_close(gradients(lm, loss + lm.auxiliary_loss()), whole, rtol=1e-11, atol=1e-13)
    assert lm.router_metrics() == metrics


@pytest.mark.parametrize("channel", ["swiglu", "none"])
@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED)
def test_each_targets_loss_and_whether_it_is_the_likeliest(count: int, channel: str):
    lm, (tokens, targets) = model(channel=channel, logit_cap=3.0), counting(count)
    logits = lm(tokens)[0]
    losses, hits = lm.score_targets(tokens, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    assert torch.equal(hits, (logits.argmax(-1) == targets))
    assert not losses.requires_grad
    assert not losses[targets == -100].any()
    lm.bfloat16()
    assert lm.score_targets(tokens, targets)[0].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"logit_cap": 2.0}, {"logit_scale": 0.3}], ids=["plain", "capped", "scaled"])
def test_few_targets_under_autocast(options: dict[str, float]):
    lm, (tokens, targets) = model(**options).float(), counting(9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lm.loss(tokens, targets), by_torch(lm, tokens, targets))


def test_transforms_see_every_target():
    """Whose values, and so their number, cannot be asked for there."""
    lm, (tokens, targets) = model(), counting(9)
    expected = by_torch(lm, tokens, targets)
    parameters = {name: each.detach() for name, each in lm.named_parameters()}

    def loss(given: dict[str, Tensor], targets: Tensor) -> Tensor:
        return functional_call(lm, given, (tokens, targets))

    lm.forward = lm.loss
    torch.testing.assert_close(vmap(loss, (None, 0))(parameters, targets[None])[0], expected)
    found = grad(loss)(parameters, targets)
    for name, value in gradients(lm, expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13)


class Doubled(LanguageModel):
    def logits(self, features: Tensor) -> Tensor:
        return 2 * super().logits(features)


def replace_forward(lm: LanguageModel) -> None:
    forward = lm.head.forward
    lm.head.forward = lambda x: 3 * forward(x)


def replace_logits(lm: LanguageModel) -> None:
    logits = lm.logits
    lm.logits = lambda x: 3 * logits(x)


CHANGES = {
    "nothing": lambda lm: None,
    "bfloat16": lambda lm: lm.bfloat16(),
    "a hook": lambda lm: lm.head.register_forward_hook(lambda head, x, y: 2 * y),
    "a hook before": lambda lm: lm.head.register_forward_pre_hook(lambda head, x: (2 * x[0],)),
    "a parametrization": lambda lm: torch.nn.utils.parametrizations.weight_norm(lm.head),
    "a forward of its own": replace_forward,
    "logits of its own": replace_logits,
    "a subclass": lambda lm: setattr(lm, "__class__", Doubled),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"logit_cap": 2.0}, {"logit_scale": 0.3}], ids=["plain", "capped", "scaled"])
def test_it_is_torchs_whatever_logits_are(change: str, options: dict[str, float]):
    lm, (tokens, targets) = model(**options), batch()
    CHANGES[change](lm)
    torch.testing.assert_close(lm.loss(tokens, targets), by_torch(lm, tokens, targets))


def test_hooks_on_all_modules_see_the_head():
    lm, (tokens, targets) = model(), batch()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, x, y: 2 * y if module is lm.head else y)
    try:
        torch.testing.assert_close(lm.loss(tokens, targets), by_torch(lm, tokens, targets))
    finally:
        hook.remove()


def test_hooks_on_the_head_see_the_backward_pass():
    lm, seen = model(), []
    lm.head.register_full_backward_hook(lambda head, of_x, of_y: seen.append(of_y[0].shape))
    lm.loss(*batch()).backward()
    assert seen == [(33, VOCABULARY)]


@pytest.mark.parametrize("here", [True, False], ids=["oneDNN", "torch"])
def test_float32_products_of_either_library(here: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "unavailable", lambda: None if here else "not here")
    lm, (tokens, targets) = model(), batch()
    expected = by_torch(lm, tokens, targets)
    exact = gradients(lm, expected)
    own = lm.float().loss(tokens, targets)
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=0)
    for name, value in gradients(lm, own).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-3, atol=1e-5 * exact[name].abs().max())


def test_numbers_far_from_zero():
    """Logits that no exponential holds; a target that is certain costs nothing, and has no gradient."""
    lm, (tokens, targets) = model(), batch()
    lm.head.weight.data.mul_(1e4)
    own, expected = lm.loss(tokens, targets), by_torch(lm, tokens, targets)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(gradients(lm, own), gradients(lm, expected))


class Allocations(TorchDispatchMode):
    """Counts tensors with a number a word and token that a call makes, forward and backward; none is freed."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers, self.made = numbers, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor) and each.numel() == self.numbers:
                self.made[each.untyped_storage().data_ptr()] = each
        return result


def test_the_logits_are_held_once():
    """And by torch four times: logits, their log-probabilities, and the gradient of each."""
    lm, (tokens, targets) = model(), batch()
    counts = {}
    for name, loss in {"own": lm.loss, "torch": lambda *both: by_torch(lm, *both)}.items():
        with Allocations(tokens.numel() * VOCABULARY) as found:
            loss(tokens, targets).backward()
        counts[name] = len(found.made)
    assert counts == {"own": 1, "torch": 4}


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


@pytest.mark.parametrize("count", [9, 33])
def test_one_backward_pass_and_first_derivatives(count: int):
    lm, (tokens, targets) = model(), counting(count)
    loss = lm.loss(tokens, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward pass"):
        loss.backward()
    with torch.autograd.graph.save_on_cpu():
        loss = lm.loss(tokens, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward pass"):
        loss.backward()
    loss = lm.loss(tokens, targets)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(loss, lm.head.weight, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_several_multiples_at_once(dtype: torch.dtype):
    lm, (tokens, targets) = model().to(dtype), batch()
    parameters, times = list(lm.parameters()), torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    for wanted in (targets, torch.full_like(targets, -100)):
        expected = torch.autograd.grad(lm.loss(tokens, wanted), parameters)
        found = torch.autograd.grad(lm.loss(tokens, wanted), parameters, times, is_grads_batched=True)
        for each, one in zip(found, expected, strict=True):
            torch.testing.assert_close(each, torch.stack([time * one for time in times]))


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
    none = torch.full_like(targets, 7)
    loss = lm.loss(tokens, none, ignore_index=7)
    assert loss.isnan()
    assert all(not gradient.any() for gradient in gradients(lm, loss).values())
    assert lm.loss(tokens, none, ignore_index=7, reduction="sum") == 0


@pytest.mark.parametrize("options", [{}, {"logit_cap": 2.0}, {"logit_scale": 0.3}], ids=["plain", "capped", "scaled"])
@pytest.mark.parametrize(
    ("targets", "arguments", "message"),
    [
        (
            torch.zeros(3, 10, dtype=torch.int64),
            {},
            r"targets are torch.int64 \[3, 10\], expected torch.int64 \[3, 11\]",
        ),
        (torch.zeros(3, 11), {}, r"targets are torch.float32 \[3, 11\], expected torch.int64"),
        ([[0]], {}, "targets are list, expected torch.int64"),
        (torch.full((3, 11), 37), {}, "targets has entries from 37 to 37, expected 0 to 36"),
        (torch.full((3, 11), -1), {}, "targets has entries from -1 to -1, expected 0 to 36"),
        (torch.zeros(3, 11, dtype=torch.int64), {"ignore_index": "x"}, "ignore_index is str 'x', expected an int"),
        (torch.zeros(3, 11, dtype=torch.int64), {"reduction": "men"}, "unknown reduction 'men'.* Did you mean 'mean'"),
    ],
)
def test_wrong_targets_are_told(targets, arguments, message, options):
    with pytest.raises(ValueError, match=message):
        model(**options).loss(batch()[0], targets, **arguments)


def test_wrong_tokens_are_told_as_by_the_model():
    with pytest.raises(ValueError, match="tokens must be int32 or int64"):
        model().loss([[1, 2]], batch()[1])
