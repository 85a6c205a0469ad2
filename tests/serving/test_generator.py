"""Requests that share a model: each continues as it would alone, whatever the others do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch.layers import MIXERS
from seqarch.models import LanguageModel
from seqarch.serving import Cancelled, Generator

REQUESTS: list[tuple[list[int], int, dict[str, Any]]] = [
    ([3, 1, 4], 12, {}),
    ([5, 9, 2, 6, 5, 3, 5, 8, 10] * 3, 5, {"temperature": 1.0, "seed": 1}),
    ([7], 9, {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 2}),
    ([7], 9, {"temperature": 0.9, "top_k": 5, "seed": 3, "repetition_penalty": 1.3}),
    ([2, 7, 1, 8], 1, {}),
    ([1, 6, 1, 8, 0, 3], 7, {"temperature": 1.5, "seed": 4, "logits_processors": [lambda _, logits: -logits]}),
]


def model(pattern: str = "gated_delta_net attention", depth: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=11, d_model=32, pattern=pattern, depth=depth).double().eval()


def alone(lm: LanguageModel, prompt: list[int], count: int, options: dict[str, Any]) -> list[int]:
    own = {name: value for name, value in options.items() if name != "seed"}
    source = torch.Generator().manual_seed(options.get("seed", 0))
    return lm.generate(prompt, count, **own, generator=source)[0].tolist()


@pytest.mark.parametrize("pattern", [*(pytest.param(name, marks=pytest.mark.slow) for name in MIXERS), "mamba2 moba"])
def test_a_requests_tokens_do_not_depend_on_the_others(pattern: str):
    """They come at different times, in parts of a prompt, with more requests than rows and room that has to grow."""
    lm = model(pattern, 1 + pattern.count(" "))
    expected = [alone(lm, *request) for request in REQUESTS]
    generator = Generator(lm, max_rows=3, prefill_tokens=10)
    requests = []
    for prompt, count, options in REQUESTS:
        requests.append(generator.submit(prompt, count, **options))
        generator.step()
    assert requests[0].new == expected[0][3:9]
    assert len(generator.running) <= 3
    assert list(requests[3]) == expected[3][1:]
    generator.run()
    assert [request.result().tolist() for request in requests] == expected
    assert all(request.state is None and request.done for request in requests)
    assert generator._state is None or not generator.running


def test_room_grows_as_it_is_needed(monkeypatch):
    monkeypatch.setattr("seqarch.serving.generator.ROOM", 4)
    lm = model("attention hyena", 2)
    generator = Generator(lm)
    requests = [generator.submit(prompt, 13) for prompt in ([1, 2, 3], [4])]
    assert [request.result().tolist() for request in requests] == [alone(lm, p, 13, {}) for p in ([1, 2, 3], [4])]


def test_a_bad_request_gets_its_error_and_the_others_go_on():
    lm, generator = model(), None

    def fails_later(tokens: Tensor, logits: Tensor) -> Tensor:
        if tokens.shape[1] > 4:
            raise KeyError("no such rule")
        return logits

    generator = Generator(lm)
    good = generator.submit([3, 1, 4], 8)
    generator.step()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1.0}, "temperature is float -1.0"),
        ({"stop_token": [12]}, r"stop_token is list \[12\]"),
        ({"seed": "1"}, "seed is str '1', expected an int from 0 to"),
        ({"seed": 1, "generator": torch.Generator()}, "both a seed and a generator"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            generator.submit([1, 2], 4, **options)
    for prompt, message in (([1, 11], "tokens 1 to 11"), ([[1], [2]], "2 prompts were given, expected one a request")):
        with pytest.raises(ValueError, match=message):
            generator.submit(prompt, 4)
    with pytest.raises(TypeError, match="num_sequences"):
        generator.submit([1, 2], 4, num_sequences=2)
    bad = generator.submit([1, 2, 3], 8, logits_processors=[fails_later])
    cancelled = generator.submit([1, 2], 8)
    generator.step()
    cancelled.cancel()
    assert good.result().tolist() == alone(lm, [3, 1, 4], 8, {})
    with pytest.raises(KeyError, match="no such rule"):
        bad.result()
    assert len(bad.new) == 2
    with pytest.raises(Cancelled, match="cancelled after 1 new tokens"):
        list(cancelled)
    assert not generator.step()


def test_an_error_of_the_model_ends_what_it_read_alone():
    """Of a prompt, that request; of a step, those that ran. Others are answered."""
    lm, failing = model(), []

    def fail(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[1] in failing:
            raise MemoryError(f"{inputs[0].shape[1]} tokens")

    lm.stack.register_forward_pre_hook(fail)
    generator = Generator(lm)
    first = generator.submit([3, 1, 4], 8)
    generator.step()
    failing.append(2)
    second, third = generator.submit([1, 2], 8), generator.submit([5], 3)
    with pytest.raises(MemoryError, match="2 tokens"):
        second.result()
    assert not first.done
    failing.append(1)
    generator.step()
    for request in (first, third):
        with pytest.raises(MemoryError, match="1 tokens"):
            request.result()
    failing.clear()
    assert generator.submit([5], 3).result().tolist() == alone(lm, [5], 3, {})


def test_threads_may_wait_for_requests_of_their_own():
    lm = model()
    generator, found = Generator(lm), {}

    def serve(number: int) -> None:
        prompt, count, options = REQUESTS[number]
        found[number] = generator.submit(prompt, count, **options).result().tolist()

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(REQUESTS))] == [alone(lm, *request) for request in REQUESTS]


def test_a_wrong_bound_is_named():
    for option in ("max_rows", "prefill_tokens"):
        with pytest.raises(ValueError, match=f"Generator: {option} is int 0, expected an int of at least 1"):
            Generator(model(), **{option: 0})
