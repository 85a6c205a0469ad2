"""Every field of every family, one at a time: the model is theirs, or the field is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqarch.interop import FAMILIES, lm_config, weight_map
from seqarch.testing import assert_close
from tests.support.families import VARIANTS
from tests.support.fields import Edit, Models, edits

BOUND = 1e-5


def names(models: Models, edit: Edit) -> set[str]:
    """What an error may call the field: its name, the one that it stands for, or that in their object."""
    aliases = type(models.base).attribute_map
    renamed = FAMILIES[models.base.model_type].Settings.aliases
    return {
        *{edit.name, aliases.get(edit.name, edit.name), renamed.get(edit.name, edit.name)},
        *(alias for alias, name in aliases.items() if edit.name in (alias, name)),
        *(["rope_parameters"] if edit.name.startswith("rope_") else []),
    }


def refused(edit: Edit) -> str | None:
    try:
        lm_config(edit.ours)
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def difference(models: Models, edit: Edit) -> str | None:
    """What is wrong: another model than theirs, an error that does not name the field, or one for nothing."""
    untouched = models.key(edit.theirs) == models.base_key
    message = refused(edit)
    if message is not None:
        named = any(name in message for name in names(models, edit))
        # a field that theirs does not read is none of ours, unless its value is no value at all
        return None if named and not (untouched and "None" not in message) else f"refused: {message}"
    found = models(edit.theirs)
    if found is None:
        return None
    state, expected = found
    try:
        assert_close(models.ours(edit.ours, state), expected, BOUND, "logits")
    except (AssertionError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


QUICK = ("Mamba2ForCausalLM", "RecurrentGemmaForCausalLM")
"""Classes whose every field is varied by default, those of other families among them; of the others when slow."""

SURROUNDED = [pytest.param(name, False, marks=() if name in QUICK else (pytest.mark.slow,)) for name in VARIANTS]
ALONE = [pytest.param(name, True, id=f"{name}-alone") for name in ("LlamaForCausalLM", "BambaForCausalLM")]


@pytest.mark.filterwarnings("ignore:.*rope_scaling. is deprecated")
@pytest.mark.parametrize(("name", "alone"), [*SURROUNDED, *ALONE])
def test_every_field_has_their_meaning_or_is_refused(name: str, alone: bool):
    """From their object and from a file, with defaults in it and left out; fields of other families among them.

    In training mode, where dropout and noise count. Families ``alone`` have their own fields varied, as what they read.
    """
    models = Models(name)
    made = [edit for edit in edits(name, alone) if edit.theirs is not None]
    wrong = {edit.text: found for edit in made if (found := difference(models, edit)) is not None}
    assert not wrong, "\n".join(f"{text}: {found}" for text, found in wrong.items())
    # what theirs makes of the fields differs, so that the comparisons are of different models
    differ = {edit.name for edit in made if models.key(edit.theirs) != models.base_key}
    settings: Any = FAMILIES[models.base.model_type]
    assert len(models.known) > (10 if alone else 30)
    assert {*settings.Settings.only} <= differ | {"per_layer_config"}


OUT_OF_REACH = {
    "layers": ("mamba", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be at most 10000, got 2147483647"),
    "heads": ("falcon_h1", {"hidden_size": 8, "num_attention_heads": 9}, r"heads of width 0 \(head_dim or hidden_size"),
    "width": ("qwen3_next", {"head_dim": 10**7}, "keys and values of 10000000 channels each make 40"),
    "keys": ("qwen3_next", {"linear_key_head_dim": 10**7}, "16 heads of 20000512 channels each make 320008192"),
    "shared": ("qwen3_next", {"num_key_value_heads": 10**8}, "num_key_value_heads=100000000 keys and values"),
}


@pytest.mark.parametrize("case", OUT_OF_REACH)
def test_sizes_out_of_reach_are_refused_before_they_are_listed(case: str):
    family, changes, message = OUT_OF_REACH[case]
    with pytest.raises(ValueError, match=message):
        weight_map({"model_type": family, **changes})
