"""Which layers a model can spare: each replaced alone."""

from __future__ import annotations

import pytest
import torch

from seqarch import LanguageModel
from seqarch.convert import LayerCost, convert, most_costly, sensitivity, with_layers

TOKENS = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(1))


def pair() -> tuple[LanguageModel, LanguageModel]:
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=19, d_model=32, pattern="attention", depth=4).eval()
    return model, convert(model, "gated_delta_net", keep_layers=[1])[0]


def test_each_layer_is_replaced_alone():
    """By hand: the teacher with one layer of the student's in its place."""
    teacher, student = pair()
    seen = []

    def score(model: LanguageModel) -> float:
        seen.append(model)
        return float(model(TOKENS)[0].square().mean().detach())

    costs = sensitivity(teacher, student, score)
    assert [each.layer for each in costs] == [0, 2, 3]
    assert [each.mixers for each in costs] == ["gated_delta_net"] * 3
    for each in costs:
        layers = [(student if i == each.layer else teacher).stack.layers[i] for i in range(4)]
        x = teacher.embedding(TOKENS)
        for layer in layers:
            x = layer(x, (None,), None)[0]
        expected = float(teacher.logits(teacher.norm(x)).square().mean().detach())
        assert each.score == pytest.approx(expected, rel=1e-5)
        assert each.change == pytest.approx(expected - score(teacher), rel=1e-4, abs=1e-6)
    assert seen[0] is teacher


def test_all_layers_of_the_student_are_the_student():
    teacher, student = pair()
    made = with_layers(teacher, student, range(4))
    assert made.config == student.config
    assert torch.equal(made(TOKENS)[0], student(TOKENS)[0])
    assert torch.equal(with_layers(teacher, student, [])(TOKENS)[0], teacher(TOKENS)[0])


@pytest.mark.parametrize(("higher", "kept"), [(False, [0, 3]), (True, [1, 2])])
def test_the_dearest_layers_are_kept(higher: bool, kept: list[int]):
    """Of a loss, those that raise it most; of an accuracy, those that lower it most."""
    costs = [LayerCost(i, "m", 1 + change, change) for i, change in enumerate([0.5, -0.1, 0.0, 0.9])]
    assert most_costly(costs, 2, higher) == kept


def test_models_that_cannot_be_taken_apart():
    teacher, student = pair()
    with pytest.raises(ValueError, match="there is no layer 4, expected numbers from 0 to 3"):
        with_layers(teacher, student, [4])
    other = LanguageModel(vocab_size=20, d_model=32, pattern="mamba2", depth=4)
    with pytest.raises(ValueError, match="vocab_size is 19 in the teacher and 20 here"):
        with_layers(teacher, other, [0])
    heads = LanguageModel(vocab_size=19, d_model=32, pattern="attention", depth=4, mixers={"attention": {"window": 2}})
    one = LanguageModel(vocab_size=19, d_model=32, pattern="attention", depth=4, mixers={"attention": {"window": 4}})
    with pytest.raises(ValueError, match=r"mixers of attention is .*2.* in the teacher and .*4.* in the student"):
        with_layers(heads, one, [0])
