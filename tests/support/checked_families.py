"""Measures how far every family of ``seqarch.interop`` is from ``transformers``, for ``python -m seqarch families``.

    python -m tests.support.checked_families [CLASS ...]

writes ``seqarch/pretrained/checked.json``, or what it says of these classes of ``transformers``. It is run again when a
family or the version of ``transformers`` changes; the tests of ``tests/interop`` hold the same to their bound every
time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.func import functional_call

from seqarch import LanguageModel
from seqarch.interop import lm_config, weight_map
from seqarch.pretrained.families import CHECKED
from tests.support.families import UNTAUGHT, VARIANTS, build

TOKENS = torch.randint(3, 53, (2, 37), generator=torch.Generator().manual_seed(1))


def distance(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what is expected."""
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def gradients(config: Any, theirs: Any) -> float:
    """The largest distance of a parameter's gradient from theirs."""
    tensors = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    leaves = {name: each for name, each in theirs.named_parameters() if UNTAUGHT not in name}
    weights = torch.randn(*TOKENS.shape, 53, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((theirs(TOKENS, use_cache=False).logits * weights).sum(), list(leaves.values()))
    state = {key: tensors[key] for key in theirs.state_dict() if key in tensors}
    model = LanguageModel(lm_config(config)).eval()
    logits, _ = functional_call(model, weight_map(config).to_seqarch(state), (TOKENS,))
    found = torch.autograd.grad((logits * weights).sum(), list(leaves.values()))
    return max(distance(got, wanted) for got, wanted in zip(found, expected, strict=True))


@torch.no_grad()
def folders(config: Any, theirs: Any) -> dict[str, Any]:
    """Of a folder that they saved: our logits, at once and in steps; and what comes back of the tensors of theirs."""
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(Path(name) / "theirs")
        model = LanguageModel.from_pretrained(Path(name) / "theirs")
        model.save_pretrained(Path(name) / "ours", family=config.model_type)
        back = transformers.AutoModelForCausalLM.from_pretrained(Path(name) / "ours").state_dict()
    expected = theirs(TOKENS, use_cache=False).logits
    state, pieces = model.init_state(2, max_length=37), []
    for piece in TOKENS.split([20, 1, 1, 15], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    tensors = theirs.state_dict()
    return {
        "logits": distance(model(TOKENS)[0], expected),
        "steps": distance(torch.cat(pieces, dim=1), expected),
        "rounded": sum(not torch.equal(back[key], tensor) for key, tensor in tensors.items()),
        "tensors": len(tensors),
    }


def measure(name: str) -> tuple[str, dict[str, Any]]:
    """The ``model_type`` of a class, and the largest of each number over the settings that it is tried with."""
    found = []
    for changes in VARIANTS[name][1]:
        config, theirs = build(name, changes)
        found.append({**folders(config, theirs), "gradients": gradients(config, theirs)})
    worst = {key: max(each[key] for each in found) for key in found[0]}
    return config.model_type, {key: float(f"{n:.1e}") if isinstance(n, float) else n for key, n in worst.items()}


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names, record = sys.argv[1:] or list(VARIANTS), {"transformers": transformers.__version__}
    former = json.loads(CHECKED.read_text(encoding="utf-8")) if sys.argv[1:] else {}
    if former.get("transformers", transformers.__version__) != transformers.__version__:
        raise SystemExit(f"{CHECKED} is of another version of transformers: measure all families")
    families = former.get("families", {}) | dict(measure(name) for name in names)
    record["families"] = dict(sorted(families.items()))
    CHECKED.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
