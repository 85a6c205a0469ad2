"""Arguments beyond the sensible: each is served alike by every backend, or named in one error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops import OPS
from tests.support.backends import available


def given(op: str, T: int = 5, H: int = 2, K: int = 4, V: int = 4, D: int = 4, top: int = 2) -> dict[str, Any]:
    def heads(G: int = 1) -> dict[str, Tensor]:
        return {"q": torch.randn(2, T, H, K), "k": torch.randn(2, T, G, K), "v": torch.randn(2, T, G, V)}

    def recurrent() -> dict[str, Tensor]:
        q, k = torch.randn(2, T, 1, K), F.normalize(torch.randn(2, T, 1, K), dim=-1)
        return {"q": q, "k": k, "v": torch.randn(2, T, H, V), "log_decay": -torch.rand(2, T, H)}

    def indexer() -> dict[str, Tensor]:
        return {"q": torch.randn(2, T, H, K), "k": torch.randn(2, T, K), "weight": torch.randn(2, T, H)}

    return {
        "attention": heads,
        "block_sparse_attention": lambda: {
            **heads(),
            **{"block_index": torch.zeros(2, T, 1, 1, dtype=torch.int64), "block_size": 2},
        },
        "causal_conv1d": lambda: {"x": torch.randn(2, T, D), "weight": torch.randn(D, 3)},
        "compressed_attention": lambda: {
            **heads(),
            **{name: torch.randn(2, max(0, T - 1), 1, width) for name, width in (("k", K), ("v", V))},
            **{"compressed_length": 2, "compressed_stride": 1, "block_size": 2, "selected_blocks": 3},
        },
        "delta_rule": lambda: {**recurrent(), "beta": torch.rand(2, T, H)},
        "experts": lambda: {
            **{"x": torch.randn(2, T, D), "w_in": torch.randn(3, D, 3), "w_out": torch.randn(3, 3, D)},
            **{"expert_index": torch.zeros(2, T, top, dtype=torch.int64), "expert_weight": torch.rand(2, T, top)},
        },
        "gated_rnn": lambda: {
            **{"x": torch.randn(2, T, 3, 4, D), "weight": torch.randn(3, 4, D, D), "cell": "slstm"},
        },
        "index_topk": lambda: {**indexer(), "top_k": 2},
        "indexer_loss": lambda: {
            **{"index_q" if name == "q" else "index_k" if name == "k" else name: x for name, x in indexer().items()},
            **{"q": torch.randn(2, T, 2, K), "k": torch.randn(2, T, 1, K)},
        },
        "linear_attention": recurrent,
        "path_attention": lambda: {**heads(), "w": torch.randn(2, T, 1, K), "beta": torch.rand(2, T, 1)},
        "stick_breaking_attention": heads,
        "log_linear_attention": lambda: {
            **recurrent(),
            **{"beta": torch.rand(2, T, H), "level_weight": torch.rand(2, T, H, 4)},
        },
        "selective_scan": lambda: {
            **{"x": torch.randn(2, T, D), "dt": torch.rand(2, T, D), "A": -torch.rand(D, 3)},
            **{"B": torch.randn(2, T, 3), "C": torch.randn(2, T, 3)},
        },
    }[op]()


SCALED = (
    *("attention", "block_sparse_attention", "compressed_attention"),
    *("delta_rule", "indexer_loss", "linear_attention", "log_linear_attention"),
    *("path_attention", "stick_breaking_attention"),
)
EMPTY: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    *((op, {"T": 0}, {}) for op in OPS),
    *((op, sizes, {"scale": 0.5}) for op in SCALED for sizes in ({"V": 0}, {"H": 0})),
    *((op, {"D": 0}, {}) for op in ("causal_conv1d", "experts", "gated_rnn", "selective_scan")),
    ("experts", {"top": 0}, {}),
]
SCALES = [(op, {}, {"scale": scale}) for op in SCALED for scale in (0, -1.0)]
WINDOWS = [("attention", {}, {"window": window}) for window in (2**31, 2**62, 2**70)]


@pytest.mark.parametrize(("op", "sizes", "options"), [*EMPTY, *SCALES, *WINDOWS])
def test_backends_agree_where_nothing_is_left(op: str, sizes: dict[str, int], options: dict[str, Any]):
    """No tokens, no width, no heads; scales of 0 and below it; windows beyond all integers."""
    arguments, found = {**given(op, **sizes), **options}, {}
    for backend in available(op):
        if OPS[op].backends[backend].unsupported(OPS[op].inputs(**arguments)) is None:
            leaves = {
                name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in arguments.items()
            }
            outputs = getattr(ops, op)(**leaves, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            learnt = [y.sum() for y in outputs if y.requires_grad]
            if learnt:  # a choice has no gradient
                torch.stack(learnt).sum().backward()
            found[backend] = [y.detach() for y in outputs]
    assert len(found) > 1 or available(op) == [OPS[op].reference]
    expected = found[OPS[op].reference]
    for backend, outputs in found.items():
        torch.testing.assert_close(outputs, expected, msg=lambda text: f"{backend}: {text}")  # noqa: B023


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((op, given(op, K=0), "q and k are 0 wide, expected at least 1") for op in SCALED),
    *((op, {"scale": scale}, f"scale is .*{shown}.*, expected a finite number")
      for op in SCALED for scale, shown in ((float("nan"), "nan"), (float("inf"), "inf"), (2**2000, "114"))),
    ("attention", {"q": torch.ones(2, 5, 2, 4).to(torch.float8_e4m3fn)}, "q has dtype torch.float8.*expected a float"),
    ("experts", {"x": torch.ones(2, 5, 4).to_sparse()}, "x has layout torch.sparse_coo, expected torch.strided"),
    ("linear_attention", {"v": torch.ones(2, 5, 2, 4).to_sparse()}, "v has layout torch.sparse_coo"),
    ("experts", {"expert_index": torch.zeros(2, 5, 2).long().to_sparse()}, "expert_index has layout"),
    ("block_sparse_attention", {"block_index": torch.zeros(2, 5, 1, 1).long().to_sparse()}, "block_index has layout"),
    ("indexer_loss", {"token_index": torch.zeros(2, 5, 1).long().to_sparse()}, "token_index has layout"),
    ("attention", {"key_start": torch.tensor([0, 1]).to_sparse()}, "key_start has layout"),
    ("attention", {"v": torch.ones(2, 5, 1, 4, device="meta")}, "v is on meta, expected cpu as q"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "message"), REFUSED)
def test_one_error_names_what_was_given_and_expected(op: str, change: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
        getattr(ops, op)(**{**given(op), **change})


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 5], device="meta"), "cu_seqlens is on meta, expected a device that holds its values"),
        (torch.tensor([0, 5]).to_sparse(), "cu_seqlens has layout torch.sparse_coo"),
        ([0, True, 5], "cu_seqlens must be whole numbers"),
        ([0, 2**70], "cu_seqlens must end at the length 5"),
        ([0, None, 5], "cu_seqlens must be whole numbers"),
    ],
)
@pytest.mark.parametrize("op", [op for op in OPS if op != "experts"])
def test_offsets_are_checked(op: str, offsets: Any, message: str):
    arguments = {name: x[:1] if isinstance(x, Tensor) and x.shape[0] == 2 else x for name, x in given(op).items()}
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
        getattr(ops, op)(**arguments, cu_seqlens=offsets)
