"""Chunks of 32 tokens in the WY form (Yang et al. 2024, "Parallelizing Linear Transformers", section 3).

Within a chunk that starts from state S, step t writes ``k_t^T u_t`` with

    u_t = beta_t (v_t - exp(L_t) k_t S - sum_{j < t} exp(L_t - L_j) (k_t . k_j) u_j),

a unit lower triangular system ``(I + A) U = beta (V - K' S)``: solved once for V and once for K', before S is known.
With read, erase and write apart it is ``erase_t^T u_t`` with ``u_t = -beta_t read_t P_t``, in which the writes
``beta_j k_j^T v_j`` of the chunk's earlier tokens stand where v did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.decay import chunk_decay, chunk_heads, join_heads
from seqarch.ops.chunked.packing import Chunks
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs

TRANSFORMABLE = True
CHUNK = 32


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    q, k, v, erase, state = inputs.q, inputs.k, inputs.v, inputs.erase, inputs.state
    read = k if inputs.read is None else inputs.read
    batch, length, groups, _ = q.shape
    chunks = Chunks(batch, length, CHUNK, inputs.offsets, q.device)
    decay = chunk_decay(inputs.log_decay, chunks, groups, state.dtype)
    qc, kc, vc, reads = (chunk_heads(x, chunks, groups, state.dtype) for x in (q, k, v, read))
    qc = qc * inputs.scale
    beta = chunk_heads(inputs.beta.unsqueeze(-1), chunks, groups, state.dtype)
    erases = kc if erase is None else chunk_heads(erase, chunks, groups, state.dtype)

    system = beta * decay.scores(reads, erases).tril(-1)
    writes = beta * vc
    known = writes if erase is None else -beta * (decay.scores(reads, kc).tril(-1) @ writes)
    right = torch.cat([known, beta * decay.from_start(reads)], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, recall = (part.unbind(1) for part in solved.split([vc.shape[-1], kc.shape[-1]], dim=-1))

    keys = decay.to_end(erases).mT.unbind(1)
    written = None if erase is None else (decay.to_end(kc).mT @ writes).unbind(1)
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
            carried = carried if written is None else carried + written[n]
        last.append(carried)
    o = decay.scores(qc, erases) @ torch.stack(corrected, dim=1) + decay.from_start(qc) @ torch.stack(before, dim=1)
    o = o if erase is None else o + decay.scores(qc, kc) @ writes
    return join_heads(o, chunks).to(v.dtype), torch.cat(last).flatten(1, 2)
