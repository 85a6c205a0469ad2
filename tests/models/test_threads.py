"""Threads that share a model: each computes what it would alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from torch import Tensor, nn

from seqarch.layers import MIXERS
from seqarch.models import LanguageModel, LMConfig

THREADS = 3


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def make(pattern: str, depth: int = 1, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    config = LMConfig(vocab_size=30, d_model=64, pattern=pattern, depth=depth, **options)  # type: ignore[arg-type]
    return LanguageModel(config).eval()


def in_threads(work: Callable[[int], object]) -> None:
    """``work(i)`` in several threads that begin together; what one raises is raised."""
    start = Barrier(THREADS)

    def begin(number: int) -> object:
        start.wait(60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(begin, range(THREADS)))


@torch.no_grad()
def decode(model: LanguageModel, tokens: Tensor, prompt: int) -> Tensor:
    """The logits of a prompt and of one token after another."""
    features, state = model.features(tokens[:, :prompt])
    steps = [features]
    for token in tokens[:, prompt:].split(1, dim=1):
        features, state = model.features(token, state)
        steps.append(features)
    return model.logits(torch.cat(steps, dim=1))


@pytest.mark.parametrize("pattern", [*MIXERS, "2*mamba attention", "mamba+attention"])
def test_any_number_of_threads_decode_with_one_model(pattern: str):
    model = make(pattern, depth=3 if "2*" in pattern else 1)
    # all rows of one number, so that compiled programs are shared, and prompts of different lengths
    texts = [(torch.randint(30, (1, 18)), 3 + 5 * number) for number in range(THREADS)]
    expected = [decode(model, *text) for text in texts]

    def work(number: int) -> None:
        for _ in range(8 if "mamba" in pattern else 2):
            assert torch.equal(decode(model, *texts[number]), expected[number])

    in_threads(work)


def test_experts_route_in_threads():
    model = make("attention", channel="moe", channels={"moe": {"num_experts": 4, "top_k": 2}})
    expected = model.generate([1, 2, 3], 8)[0]
    in_threads(lambda _: [torch.testing.assert_close(model.generate([1, 2, 3], 8)[0], expected) for _ in range(3)])


def test_weights_and_hooks_that_change_meanwhile_end_no_process():
    """What is decoded while weights are replaced by equal ones is the same: their old memory is not given back yet."""
    model, done = make("mamba", depth=2), Event()
    expected = model.generate([1, 2, 3], 8)[0]

    def change() -> None:
        while not done.is_set():
            handles = [module.register_forward_hook(_nothing) for module in model.modules()]
            model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
            for handle in handles:
                handle.remove()

    def work(number: int) -> None:
        if number == 0:
            return change()
        try:
            for _ in range(20):
                torch.testing.assert_close(model.generate([1, 2, 3], 8)[0], expected)
        finally:
            done.set()

    in_threads(work)


def _nothing(module: nn.Module, inputs: object, output: object) -> None:
    return None
