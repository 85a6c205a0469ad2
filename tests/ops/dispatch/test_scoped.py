"""What ``with`` blocks set is each thread's and each task's own, and reaches the backward passes of the block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.native import cpu_library

Q = torch.randn(1, 4, 1, 3)


def chosen() -> str | None:
    return ops.explain("linear_attention", Q, Q, Q).backend


def in_thread(run: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join(10)
    return found[0]


def test_blocks_of_threads_that_overlap_leave_nothing_behind():
    """The first to enter is the first to leave."""
    usual, entered, left = chosen(), [threading.Event() for _ in range(2)], threading.Event()
    seen: dict[str, Any] = {}

    def first() -> None:
        with ops.use_backends(linear_attention="recurrent_torch"), ops.record_backends() as seen["first"]:
            entered[0].set()
            entered[1].wait(10)
            ops.linear_attention(Q, Q, Q)
        left.set()

    def second() -> None:
        entered[0].wait(10)
        seen["before"] = chosen()
        with ops.use_backends(linear_attention="chunk_torch"), ops.record_calls() as seen["second"]:
            entered[1].set()
            left.wait(10)
            ops.linear_attention(Q, Q, Q)
        seen["after"] = chosen()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen["first"] == {"linear_attention": {"recurrent_torch": 1}}
    assert [call.backend for call in seen["second"]] == ["chunk_torch"]
    assert [seen["before"], seen["after"], chosen(), in_thread(chosen)] == [usual] * 4


def test_blocks_of_tasks_are_apart():
    async def one(backend: str, turns: int) -> str | None:
        with ops.use_backends(linear_attention=backend):
            for _ in range(turns):
                await asyncio.sleep(0)
            return chosen()

    async def both() -> list[str | None]:
        return [*await asyncio.gather(one("recurrent_torch", 1), one("chunk_torch", 3))]

    usual = chosen()
    assert asyncio.run(both()) == ["recurrent_torch", "chunk_torch"]
    assert chosen() == usual


class Deeper(torch.autograd.Function):
    """A backward pass within a backward pass; beyond some depth torch goes on in threads of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, seen: list[Any]) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            if ctx.depth:
                Deeper.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).sum().backward()
            else:
                ctx.seen.append((threading.get_ident(), chosen()))
        return gradients[0], None, None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_backward_passes_in_threads_of_torch_see_the_block_that_they_are_of():
    usual, seen = chosen(), []
    x = torch.ones(1, requires_grad=True)
    with ops.use_backends(linear_attention="recurrent_torch"):
        Deeper.apply(x, 70, seen).sum().backward()
    Deeper.apply(x, 70, seen).sum().backward()
    (there, within), (_, after) = seen
    assert there != threading.get_ident()
    assert (within, after) == ("recurrent_torch", usual)


def test_compiled_functions_follow_the_block_of_their_thread():
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda q: ops.linear_attention(q, q, q)[0], fullgraph=True, backend=keep)
    with ops.use_backends(linear_attention="recurrent_torch"):
        expected = compiled(Q)
        torch.testing.assert_close(in_thread(lambda: compiled(Q)), expected)
        assert len(graphs) == 2
        assert chosen() == "recurrent_torch"
    torch.testing.assert_close(compiled(Q), expected)
    assert len(graphs) == 2
    assert graphs[0] != graphs[1]


def test_instruction_sets_are_of_the_thread():
    usual = cpu_library.chosen_isa()
    for isa in cpu_library.supported_isas():
        with cpu_library.use_isa(isa):
            assert cpu_library.chosen_isa() == isa
            assert in_thread(cpu_library.chosen_isa) == usual
