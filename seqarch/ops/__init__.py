"""Pure functions on tensors, one folder per operation, each with several backends behind one contract.

Layout is ``[B, T, H, D]``. Decays are natural logarithms (``log_decay <= 0``). ``cu_seqlens`` packs several sequences
into a batch of one. Recurrent states are float32 (float64 for float64 inputs); gradients flow into and out of them.
"""

from contextlib import AbstractContextManager
from typing import Any

from seqarch.ops.attention import OP as _attention
from seqarch.ops.attention import attention
from seqarch.ops.block_sparse_attention import OP as _block_sparse_attention
from seqarch.ops.block_sparse_attention import block_sparse_attention
from seqarch.ops.causal_conv1d import OP as _causal_conv1d
from seqarch.ops.causal_conv1d import causal_conv1d
from seqarch.ops.compressed_attention import OP as _compressed_attention
from seqarch.ops.compressed_attention import compressed_attention
from seqarch.ops.delta_rule import OP as _delta_rule
from seqarch.ops.delta_rule import delta_rule
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.ops.dispatch.op import BackendError, Call, Explanation, Op, choose_backends, record_backends, record_calls
from seqarch.ops.experts import OP as _experts
from seqarch.ops.experts import experts
from seqarch.ops.gated_rnn import OP as _gated_rnn
from seqarch.ops.gated_rnn import gated_rnn
from seqarch.ops.index_topk import OP as _index_topk
from seqarch.ops.index_topk import index_topk
from seqarch.ops.indexer_loss import OP as _indexer_loss
from seqarch.ops.indexer_loss import indexer_loss
from seqarch.ops.linear_attention import OP as _linear_attention
from seqarch.ops.linear_attention import linear_attention
from seqarch.ops.log_linear_attention import OP as _log_linear_attention
from seqarch.ops.log_linear_attention import log_linear_attention
from seqarch.ops.path_attention import OP as _path_attention
from seqarch.ops.path_attention import path_attention
from seqarch.ops.selective_scan import OP as _selective_scan
from seqarch.ops.selective_scan import selective_scan
from seqarch.ops.stick_breaking_attention import OP as _stick_breaking_attention
from seqarch.ops.stick_breaking_attention import stick_breaking_attention

OPS: dict[str, Op] = {
    "attention": _attention,
    "block_sparse_attention": _block_sparse_attention,
    "causal_conv1d": _causal_conv1d,
    "compressed_attention": _compressed_attention,
    "delta_rule": _delta_rule,
    "experts": _experts,
    "gated_rnn": _gated_rnn,
    "index_topk": _index_topk,
    "indexer_loss": _indexer_loss,
    "linear_attention": _linear_attention,
    "log_linear_attention": _log_linear_attention,
    "path_attention": _path_attention,
    "selective_scan": _selective_scan,
    "stick_breaking_attention": _stick_breaking_attention,
}


def use_backends(**choices: str) -> AbstractContextManager[None]:
    """Within the block, what ``backend="auto"`` means: ``use_backends(linear_attention="recurrent_torch")``.

    In this thread or task, and in the threads of torch that run the block's backward passes.

    Raises:
        ValueError: no operation, or no backend of it, has that name.
    """
    for op, backend in choices.items():
        if op not in OPS:
            raise unknown_name("operation", op, OPS)
        if backend not in OPS[op].backends:
            raise unknown_name(f"backend of {op}", backend, OPS[op].backends)
    return choose_backends(choices)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """The backend that would run ``op(*args, **kwargs)``, and why each other one would not.

    Args:
        op: a key of ``OPS``; the rest are the operation's own arguments without ``backend``.

    Raises:
        ValueError: no operation has that name, or the arguments are not valid for it.
    """
    if op not in OPS:
        raise unknown_name("operation", op, OPS)
    return OPS[op].explain(OPS[op].inputs(*args, **kwargs))


__all__ = [
    "OPS",
    "BackendError",
    "Call",
    "Explanation",
    "Op",
    "attention",
    "block_sparse_attention",
    "causal_conv1d",
    "compressed_attention",
    "delta_rule",
    "experts",
    "explain",
    "gated_rnn",
    "index_topk",
    "indexer_loss",
    "linear_attention",
    "log_linear_attention",
    "path_attention",
    "record_backends",
    "record_calls",
    "selective_scan",
    "stick_breaking_attention",
    "use_backends",
]
