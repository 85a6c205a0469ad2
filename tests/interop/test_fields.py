"""Every field of every family, one at a time: the model is theirs, or the field is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqarch.interop import FAMILIES, lm_config
from seqarch.testing import assert_close
from tests.support.families import VARIANTS
from tests.support.fields import Edit, Models, edits

BOUND = 1e-5


def names(models: Models, edit: Edit) -> set[str]:
    """What an error may call the field: its name, the one that it stands for, or that in their object."""
    aliases = type(models.base).attribute_map
    return {
        *{edit.name, aliases.get(edit.name, edit.name)},
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
    untouched = models.key(edit.theirs) == models.key(models.base)
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


@pytest.mark.filterwarnings("ignore:.*rope_scaling. is deprecated")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_field_has_their_meaning_or_is_refused(name: str):
    """From their object and from a file, with defaults in it and left out; fields of other families among them.

    In training mode, where dropout and noise count.
    """
    models = Models(name)
    made = [edit for edit in edits(name) if edit.theirs is not None]
    wrong = {edit.text: found for edit in made if (found := difference(models, edit)) is not None}
    assert not wrong, "\n".join(f"{text}: {found}" for text, found in wrong.items())
    # what theirs makes of the fields differs, so that the comparisons are of different models
    differ = {edit.name for edit in made if models.key(edit.theirs) != models.key(models.base)}
    settings: Any = FAMILIES[models.base.model_type]
    assert len(models.known) > 30
    assert {*settings.Settings.only} <= differ | {"per_layer_config"}
