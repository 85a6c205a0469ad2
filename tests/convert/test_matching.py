"""How far a student is from its teacher: against the definitions written out, with gradients where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import LanguageModel
from seqarch.convert import check_pair, convert, layer_by_layer, of_logits, of_matrices, of_outputs
from seqarch.layers import materialize
from seqarch.testing import assert_close

WIDTH = 32
TOKENS = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(1))


def pair(pattern: str, **options: Any) -> tuple[LanguageModel, LanguageModel]:
    """A teacher and what is made of it, in float64."""
    torch.manual_seed(0)
    heads = {"attention": {"num_heads": 4, "position": "none"}}
    model = LanguageModel(vocab_size=19, d_model=WIDTH, pattern="attention", depth=4, mixers=heads, **options).double()
    return model.eval(), convert(model, pattern)[0]


def inputs_of_mixers(model: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer's mixer reads and gives in a forward pass, caught at the mixers."""
    read: list[Tensor] = []
    given: list[Tensor] = []

    def note(_: Any, arguments: Any, output: Any) -> None:
        read.append(arguments[0])
        given.append(output[0])

    mixers: Any = [layer.mixers[0] for layer in model.stack.layers]  # type: ignore[index, union-attr]
    hooks = [mixer.register_forward_hook(note) for mixer in mixers]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return read, given


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return ((found - wanted) ** 2).sum() / (wanted**2).sum()


def test_outputs_are_compared_at_the_teachers_inputs():
    """Layers 0 and 2 differ, and layer 3's input does not depend on the student."""
    teacher, student = pair("retention attention gated_delta_net attention")
    read, given = inputs_of_mixers(teacher)
    found = list(layer_by_layer(teacher, student, TOKENS, of_outputs))
    expected = [relative(student.stack.layers[i].mixers[0](read[i])[0], given[i]) / 2 for i in (0, 2)]  # type: ignore[index, union-attr, operator]
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-12)


def test_only_the_layers_mixer_gets_a_gradient():
    teacher, student = pair("retention attention gated_delta_net attention")
    for i, loss in zip((0, 2), layer_by_layer(teacher, student, TOKENS, of_outputs), strict=True):
        loss.backward()
        touched = {name.split(".mixers.")[0] for name, p in student.named_parameters() if p.grad is not None}
        assert touched == {f"stack.layers.{i}"}
        assert all(".mixers." in name for name, p in student.named_parameters() if p.grad is not None)
        student.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_counts_for_nothing():
    teacher, student = pair("retention")
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 6:] = False
    for what in (of_outputs, of_matrices):
        found = sum(layer_by_layer(teacher, student, TOKENS, what, mask))
        other = TOKENS.clone()
        other[1, 6:] = 3
        assert_close(torch.as_tensor(sum(layer_by_layer(teacher, student, other, what, mask))), found, 1e-12)
        assert not torch.equal(torch.as_tensor(sum(layer_by_layer(teacher, student, TOKENS, what))), found)


def test_a_student_that_is_its_teacher_is_at_no_distance():
    teacher, student = pair("sliding_window(window=64)")
    for what in (of_outputs, of_matrices):
        losses = list(layer_by_layer(teacher, student, TOKENS, what))
        assert len(losses) == 4
        assert all(loss < 1e-24 for loss in losses)


def test_matrices_are_those_of_the_mixers():
    """Of attention the softmax itself; of retention the decayed products: both written out."""
    teacher, student = pair("retention attention attention attention")
    (loss,) = layer_by_layer(teacher, student, TOKENS, of_matrices)
    x = inputs_of_mixers(teacher)[0][0]
    old: Any = teacher.stack.layers[0].mixers[0]  # type: ignore[index, union-attr]
    new: Any = student.stack.layers[0].mixers[0]  # type: ignore[index, union-attr]
    q, k, _ = (m.unflatten(-1, (4, 8)).transpose(1, 2) for m in (x @ old.qkv_proj.linear.weight.mT).split(32, -1))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
    assert_close(materialize(new, x)[0].matrix.detach(), _retention(new, x), 1e-12)
    assert_close(loss, relative(_retention(new, x), scores.softmax(-1)), 1e-12)
    loss.backward()
    size = 32 * 2  # queries and keys, and nothing else, make the matrix
    assert new.qkv_proj.linear.weight.grad[:size].abs().min(dim=1).values.gt(0).all()
    assert not new.qkv_proj.linear.weight.grad[size:].any()
    assert new.out_proj.weight.grad is None


def _retention(mixer: Any, x: Tensor) -> Tensor:
    """The decayed products of rotated queries and keys, Sun et al. 2023, eq. 5."""
    angle = torch.arange(11.0, dtype=torch.float64)[:, None] * 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    q, k, _ = (m.unflatten(-1, (4, -1)) for m in (x @ mixer.qkv_proj.linear.weight.mT).split(32, -1))
    turned = [torch.view_as_complex(torch.stack([m[..., :4], m[..., 4:]], -1)) for m in (q, k)]
    turned = [m * torch.polar(torch.ones_like(angle), angle)[:, None] for m in turned]
    age = torch.arange(11)[:, None] - torch.arange(11)
    decay = torch.tril((1 - torch.exp2(-5.0 - torch.arange(4, dtype=torch.float64)))[:, None, None] ** age.clamp(min=0))
    return torch.einsum("bthc,bshc->bhts", turned[0], turned[1].conj()).real * 8**-0.5 * decay


def test_logits_by_the_definition():
    """``t^2 sum p log(p / q)``, and at t = 1 the cross entropy of soft targets but for their entropy."""
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    found.requires_grad_()
    for t in (1.0, 3.0):
        p, q = (wanted / t).softmax(-1), (found / t).softmax(-1)
        assert_close(of_logits(found, wanted, t), t**2 * (p * (p / q).log()).sum(), 1e-12)
        (grad,) = torch.autograd.grad(of_logits(found, wanted, t), found)
        assert_close(grad, t * (q - p), 1e-12)
    assert of_logits(found, found.detach()).abs() < 1e-12
    assert of_logits(found.bfloat16(), wanted.bfloat16()).dtype == torch.float32


def test_training_brings_a_student_nearer():
    teacher, student = pair("gated_delta_net")
    optimizer, before = torch.optim.AdamW(student.parameters(), lr=3e-3), None
    for _ in range(40):
        optimizer.zero_grad()
        total = 0.0
        for loss in layer_by_layer(teacher, student, TOKENS, of_outputs):
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        before = total if before is None else before
    assert total < before / 3  # type: ignore[operator]


def test_what_does_not_fit():
    teacher, student = pair("gated_delta_product")
    with pytest.raises(ValueError, match=r"layer 0: GatedDeltaProduct has matrices .*22.*, expected .*11"):
        list(layer_by_layer(teacher, student, TOKENS, of_matrices))
    _, student = pair("gated_delta_net+sliding_window")
    with pytest.raises(ValueError, match="layer 0: 2 mixers side by side, expected one"):
        list(layer_by_layer(teacher, student, TOKENS, of_matrices))
    with pytest.raises(ValueError, match="the same mixers in every layer"):
        check_pair(teacher, teacher, of_layers=True)
    narrow = LanguageModel(vocab_size=19, d_model=64, pattern="mamba2", depth=4)
    with pytest.raises(ValueError, match="d_model is 32 in the teacher and 64 here"):
        check_pair(teacher, narrow, of_layers=True)
    check_pair(teacher, narrow, of_layers=False)
    other = LanguageModel(vocab_size=20, d_model=64, pattern="mamba2", depth=4)
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 19, expected 20 as here"):
        check_pair(teacher, other, of_layers=False)


def test_several_streams_and_layers_that_hand_tensors_on():
    """The teacher's other layers run as in the teacher, whatever their residual streams and exchanges."""
    torch.manual_seed(0)
    model = LanguageModel(
        vocab_size=19, d_model=WIDTH, depth=3, residual_streams=2, norm_placement="both",
        pattern="attention(give_kv=a) attention(position=none) attention(take_kv=a)",
    ).double().eval()  # fmt: skip
    student, _ = convert(model, "attention retention attention")
    read, _ = inputs_of_mixers(model)
    (loss,) = layer_by_layer(model, student, TOKENS, of_outputs)
    layers: Any = model.stack.layers[1], student.stack.layers[1]
    wanted, found = (layer.post_norms[0](layer.mixers[0](read[1])[0]) for layer in layers)
    assert_close(loss, relative(found, wanted), 1e-12)
