"""Sequence parallelism against one process: real processes over gloo, started once for all tests of this file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.training.processes import gloo_in_order
from seqarch.layers import MIXERS
from seqarch.models import LanguageModel, LMConfig, Stack, StackConfig
from seqarch.models.stack_layer import StackLayer
from seqarch.parallel import Edge, own_slice, sequence_parallel, sum_gradients
from seqarch.testing import D_MODEL, assert_close

pytestmark = pytest.mark.slow

PROCESSES = 4
LENGTH = 67
SMALL: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 16},
    "moba": {"block_size": 16},
    "dsa": {"top_k": 5},
    "sparse_mla": {"top_k": 5},
    "longformer": {"window": 20, "global_tokens": 16},
    "nsa": {"compressed_length": 8, "compressed_stride": 4, "block_size": 8, "window": 16},
    "sliding_window": {"window": 24},
    "lolcats": {"window": 20},
}
PATTERNS = {
    **{name: f"2*{name}" for name in MIXERS},
    "hybrid": "mamba2 sliding_window+gated_delta_net/mlp",
    "first values": "rwkv7(value_residual=give) rwkv7(value_residual=take)",
    "keys and values": "attention(give_kv=a) attention(take_kv=a)",
    "index lists": "dsa(give_index=a) sparse_mla(take_index=a)",
    "streams": "mamba2 sliding_window/mlp",
}
OPTIONS: dict[str, dict[str, Any]] = {"streams": {"residual_streams": 2, "stream_mixing": "manifold"}}
PAIRS = ("attention", "gated_delta_net", "hybrid", "mamba2")
"""Patterns that two processes share as well."""
TIMED_LAYERS, LAYER_SECONDS = 8, 0.05


def small_stack(name: str) -> Stack:
    torch.manual_seed(0)
    own = OPTIONS.get(name, {})
    config = StackConfig(d_model=D_MODEL, pattern=PATTERNS[name], depth=2, channel="none", mixers=SMALL, **own)
    return Stack(config).double()


def small_model() -> LanguageModel:
    torch.manual_seed(0)
    config = LMConfig(vocab_size=17, d_model=D_MODEL, pattern="gla attention", depth=2, tie_embeddings=True)
    return LanguageModel(config).double()


def stack_inputs() -> Tensor:
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(17, (4, LENGTH + 1), generator=torch.Generator().manual_seed(2))


def weigh(y: Tensor) -> Tensor:
    """A weight for each output, so that no gradient is the same by symmetry."""
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).sin().view_as(y)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of each message that this process hands on."""
    sent, original = [], Edge.send

    def counted(self: Edge, tensors: Any) -> None:
        tensors = list(tensors)
        sent.extend(tensor.numel() * tensor.element_size() for tensor in tensors)
        original(self, tensors)

    Edge.send = counted
    yield sent
    Edge.send = original


def relay(model: nn.Module, group: dist.ProcessGroup | None) -> AbstractContextManager[None]:
    return nullcontext() if group is None else sequence_parallel(model, group)


def stack_results(name: str, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Outputs and gradients; with a group, of this process's slice, the parameters' summed up, and what it sent."""
    stack, x = small_stack(name), stack_inputs()
    weights = weigh(x)
    if group is not None:
        x, weights = own_slice(x, group).clone(), own_slice(weights, group)
    x.requires_grad_()
    with counted_bytes() as sent, relay(stack, group):
        y, _ = stack(x)
    (y * weights).sum().backward()
    if group is not None:
        sum_gradients(stack.parameters(), group)
    gradients = {key: parameter.grad for key, parameter in stack.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "bytes": sum(sent), **gradients}


def model_results(pieces: int, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The mean loss over all tokens and its gradients, with the rows in so many calls before one backward pass."""
    model, inputs, targets = small_model(), tokens()[:, :-1], tokens()[:, 1:]
    count = targets.numel()
    if group is not None:
        inputs, targets = own_slice(inputs, group), own_slice(targets, group)
    with relay(model, group):
        logits = torch.cat([model(rows)[0] for rows in inputs.chunk(pieces)])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count
    loss.backward()
    total = loss.detach().clone()
    if group is not None:
        sum_gradients(model.parameters(), group)
        dist.all_reduce(total, group=group)
    return {"loss": total, **{key: parameter.grad for key, parameter in model.named_parameters()}}


class Sleeping(StackLayer):
    """A layer whose work takes a fixed time, whatever else the machine does."""

    def __init__(self):
        nn.Module.__init__(self)
        self.mixers = nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor, states: Any, cu_seqlens: Any, token_mask: Any = None) -> tuple[Tensor, Any]:
        time.sleep(LAYER_SECONDS)
        return x, (x[:, -1],)


def timed_results(group: dist.ProcessGroup) -> float:
    stack = small_stack("gla")
    stack.layers = nn.ModuleList(Sleeping() for _ in range(TIMED_LAYERS))
    dist.barrier(group)
    started = time.monotonic()
    with sequence_parallel(stack, group):
        stack(own_slice(stack_inputs(), group))
    return time.monotonic() - started


def continued(group: dist.ProcessGroup) -> Tensor | None:
    """On the last process, the logits of one more token after the relay over all the others."""
    model = small_model()
    with torch.no_grad():
        with sequence_parallel(model, group):
            _, state = model(own_slice(tokens()[:, :-1], group))
        is_last = dist.get_rank(group) + 1 == dist.get_world_size(group)
        return model(tokens()[:, -1:], state)[0] if is_last else None


def frozen(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Only the head learns: nothing that is handed on needs a gradient."""
    model = small_model()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.embedding.requires_grad_(False)
    model.stack.requires_grad_(False)
    with sequence_parallel(model, group):
        model(own_slice(tokens()[:, :-1], group))[0].square().sum().backward()
    sum_gradients(model.head.parameters(), group)
    return {"head": model.head.weight.grad}


def refusals(group: dist.ProcessGroup) -> list[str]:
    """What a process other than the first is told."""
    stack, told = small_stack("gla"), []
    calls = (
        lambda: stack(stack_inputs()[:1], cu_seqlens=[0, LENGTH]),
        lambda: stack(stack_inputs(), stack.init_state(2)),
        lambda: sequence_parallel(nn.Linear(1, 1), group).__enter__(),
    )
    with sequence_parallel(stack, group):
        for call in calls if dist.get_rank(group) else ():
            try:
                call()
            except ValueError as error:
                told.append(str(error))
    return told


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": PROCESSES}
    dist.init_process_group(gloo_in_order(), **meeting)
    everyone, pair = dist.new_group(list(range(PROCESSES))), dist.new_group([1, 2])
    results: dict[str, Any] = {name: stack_results(name, everyone) for name in PATTERNS}
    results |= {
        "model": {pieces: model_results(pieces, everyone) for pieces in (1, 3)},
        "seconds": timed_results(everyone),
        "continued": continued(everyone),
        "frozen": frozen(everyone),
        "refusals": refusals(everyone),
    }
    if rank in (1, 2):
        results["pair"] = {name: stack_results(name, pair) for name in PAIRS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads may outlive this, and abort an interpreter that goes down: experiments/training/processes.py


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def assert_same(slices: list[dict[str, Any]], whole: dict[str, Any], split: tuple[str, ...] = ()) -> None:
    for name, expected in whole.items():
        if name in split:
            assert_close(torch.cat([part[name] for part in slices], dim=1), expected, 1e-10, name)
        elif expected is None:  # an index that only a loss of its own would train
            assert all(part[name] is None for part in slices)
        elif isinstance(expected, Tensor):
            for part in slices:
                assert_close(part[name], expected, 1e-10, name)


@pytest.mark.parametrize("name", PATTERNS)
def test_four_processes_give_the_outputs_and_gradients_of_one(processes, name):
    assert_same([found[name] for found in processes], stack_results(name), split=("y", "x"))


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_give_the_outputs_and_gradients_of_one(processes, name):
    """The second and third of four: a group of its own."""
    assert_same([found["pair"][name] for found in processes[1:3]], stack_results(name), split=("y", "x"))


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_language_model_has_the_same_loss_and_gradients(processes, pieces):
    assert_same([found["model"][pieces] for found in processes], model_results(1))


def test_processes_work_on_different_layers_at_a_time(processes):
    """Not one after another: that would take the time of 4 x 8 layers, and this of 8 + 3."""
    taken = max(found["seconds"] for found in processes)
    assert taken >= (TIMED_LAYERS + PROCESSES - 1) * LAYER_SECONDS
    assert taken < 2 * (TIMED_LAYERS + PROCESSES - 1) * LAYER_SECONDS


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_handed_on_is_the_state_and_nothing_else(processes, name):
    stack = small_stack(name)
    lengths = torch.tensor([part.shape[1] for part in stack_inputs().tensor_split(PROCESSES, 1)]).cumsum(0).tolist()
    expected = [stack.state_bytes(length, 2) for length in lengths[:-1]]
    assert [found[name]["bytes"] for found in processes] == [*expected, 0]


def test_the_last_process_goes_on_alone(processes):
    with torch.no_grad():
        expected = small_model()(tokens())[0][:, -1:]
    assert all(found["continued"] is None for found in processes[:-1])
    assert_close(processes[-1]["continued"], expected, 1e-10)


def test_frozen_layers_hand_on_no_gradients(processes):
    model = small_model()
    logits = model(tokens()[:, :-1])[0].detach()
    features = model.features(tokens()[:, :-1])[0].detach()
    expected = 2 * logits.flatten(0, 1).mT @ features.flatten(0, 1)
    for found in processes:
        assert_close(found["frozen"]["head"], expected, 1e-10)


def test_what_cannot_be_split_is_refused(processes):
    for found in processes[1:]:
        packed, state, none = found["refusals"]
        assert "packed sequences (cu_seqlens) cannot be split" in packed
        assert "only the first process may start from one" in state
        assert "Linear holds no Stack" in none
