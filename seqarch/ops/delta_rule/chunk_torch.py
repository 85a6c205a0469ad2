"""Chunks of 32 tokens in the WY form (Yang et al. 2024, "Parallelizing Linear Transformers", section 3).

Within a chunk that starts from state S, step t writes ``k_t^T u_t`` with

    u_t = beta_t (v_t - exp(L_t) k_t S - sum_{j < t} exp(L_t - L_j) (k_t . k_j) u_j),

a unit lower triangular system ``(I + A) U = beta (V - K' S)``: solved once for V and once for K', before S is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.common.decay import chunk_decay, chunk_heads, join_heads
from seqarch.ops.common.packed import Chunks

CHUNK = 32


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    batch, length, groups, _ = q.shape
    chunks = Chunks(batch, length, CHUNK, offsets, q.device)
    decay = chunk_decay(log_decay, chunks, groups, state.dtype)
    qc, kc, vc = (chunk_heads(x, chunks, groups, state.dtype) for x in (q, k, v))
    qc = qc * scale
    rate = chunk_heads(beta.unsqueeze(-1), chunks, groups, state.dtype)

    system = rate * decay.scores(kc, kc).tril(-1)
    right = torch.cat([rate * vc, rate * decay.from_start(kc)], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, recall = (part.unbind(1) for part in solved.split([vc.shape[-1], kc.shape[-1]], dim=-1))

    keys = decay.to_end(kc).mT.unbind(1)
    state = state.unflatten(1, (groups, -1))
    before: list[Tensor] = [torch.zeros_like(state[:batch])] * chunks.count
    corrected = list(values)
    last = []
    for rows, members in chunks.segments:
        carried = state[rows]
        for n in members:
            before[n] = carried
            corrected[n] = values[n] - recall[n] @ carried
            carried = decay.over(n, carried) + keys[n] @ corrected[n]
        last.append(carried)
    o = decay.scores(qc, kc) @ torch.stack(corrected, dim=1) + decay.from_start(qc) @ torch.stack(before, dim=1)
    return join_heads(o, chunks).to(v.dtype), torch.cat(last).flatten(1, 2)
