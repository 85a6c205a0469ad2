"""The families whose folders are read and written, and what was checked of each: ``python -m seqarch families``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from seqarch.interop import FAMILIES
from seqarch.pretrained.their_settings import CLASSES

CHECKED = Path(__file__).with_name("checked.json")
"""What was measured against ``transformers``, by tests/support/checked_families.py."""


def rows() -> Iterator[tuple[str, ...]]:
    """A table: each family, and the largest distances that were measured over the settings it is tried with."""
    record = json.loads(CHECKED.read_text(encoding="utf-8"))["families"]
    yield "family", "class in transformers", "logits", "steps", "gradients", "there and back"
    for family in FAMILIES:
        if (found := record.get(family)) is None:
            yield family, CLASSES.get(family, ""), *("",) * 3, "not measured"
            continue
        distances = (f"{found[key]:.0e}" for key in ("logits", "steps", "gradients"))
        rounded = (
            f", {found['rounded']} of {found['tensors']} tensors are rounded" if found["rounded"] else " to the bit"
        )
        yield family, CLASSES.get(family, ""), *distances, f"by folders{rounded}"


def explanation() -> str:
    """What the columns say."""
    version = json.loads(CHECKED.read_text(encoding="utf-8"))["transformers"]
    return (
        f"Against transformers {version}, tiny random models in float32: RMS of the difference over that of theirs,\n"
        "of the logits of 37 tokens, of the same in pieces of 20, 1, 1 and 15, and of each parameter's gradient;\n"
        "and whether its tensors come back when a folder of theirs is read, saved for them and loaded there.\n"
        "RWKV7ForCausalLM is flash-linear-attention's: measured against its equations, token by token, which the\n"
        "tests hold to what that package computes."
    )
