"""The picture of what mixers do with their values: ``python -m docs.matrices`` draws ``docs/images/matrices.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments.util.plot_style import QUIET, figure
from seqarch.layers import build_mixer, materialize

IMAGE = Path(__file__).parent / "images" / "matrices.png"
WIDTH, LENGTH = 64, 48

SHOWN: dict[str, dict] = {
    "attention": {"position": "none"},
    "sliding_window": {"window": 12},
    "big_bird": {"block_size": 4},
    "nsa": {
        "compressed_length": 4,
        "compressed_stride": 4,
        "block_size": 4,
        "selected_blocks": 4,
        "window": 4,
    },
    "linear_attention": {},
    "retention": {},
    "gla": {},
    "mamba2": {"d_state": 32},
    "delta_net": {},
    "gated_delta_net": {},
    "rwkv7": {},
    "rg_lru": {},
}


def magnitudes(name: str, options: dict) -> torch.Tensor:
    """``[T, T]``: the weights of the first head, each row divided by its largest, of a mixer that was not trained.

    The second half of the input repeats the first: a mixer that looks at contents shows a second diagonal.
    """
    torch.manual_seed(0)
    half = torch.randn(1, LENGTH // 2, WIDTH, dtype=torch.float64)
    mixer = build_mixer(name, d_model=WIDTH, **options).double()
    weights = sum(found.matrix[0, 0].abs() for found in materialize(mixer, torch.cat([half, half], dim=1)))
    assert isinstance(weights, torch.Tensor)
    return weights / weights.amax(-1, keepdim=True).clamp(min=1e-12)


def main() -> None:
    IMAGE.parent.mkdir(exist_ok=True)
    with figure([IMAGE], columns=4, rows=-(-len(SHOWN) // 4), size=(8, 6.4)) as (_, axes):
        for cell, (name, options) in zip(axes, SHOWN.items(), strict=False):
            cell.imshow(magnitudes(name, options), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            cell.set_title(name)
            cell.grid(visible=False)
            cell.set_xticks([0, LENGTH // 2, LENGTH - 1], ["1", str(LENGTH // 2 + 1), str(LENGTH)], color=QUIET)
            cell.set_yticks([0, LENGTH // 2, LENGTH - 1], ["1", str(LENGTH // 2 + 1), str(LENGTH)], color=QUIET)
            cell.set_xlabel("value of token")
            cell.set_ylabel("output of token")
            cell.label_outer()
    print(IMAGE)


if __name__ == "__main__":
    argparse.ArgumentParser("python -m docs.matrices", description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
