from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from experiments.util.errors import RunnerError
from experiments.util.items import decode_items, encode_items


@pytest.mark.parametrize(("answers", "kind"), [(1, "u1"), (4, "u1"), (255, "u1"), (1000, "u2"), (65535, "u2")])
def test_shares_are_kept_to_the_last_bit(answers, kind):
    right = np.random.default_rng(0).integers(0, answers + 1, 2048)
    text = encode_items(np.append(right, [answers, 1]) / answers)
    assert text.startswith(f"{kind}/{answers}:")
    assert np.array_equal(decode_items(text), np.append(right, [answers, 1]) / answers)


@pytest.mark.parametrize("special", [[], [-0.5], [1e9], [np.nan], [np.inf]])
def test_other_scores_are_kept_in_float32(special):
    scores = np.append(np.random.default_rng(0).normal(2.3, 0.4, 32), special)
    text = encode_items(scores)
    assert text.startswith("f4/1:")
    assert np.array_equal(decode_items(text), scores.astype(np.float32).astype(np.float64), equal_nan=True)


def test_shares_of_unlike_numbers_of_answers_may_have_no_small_denominator():
    answers = np.arange(31, 56)
    assert np.allclose(decode_items(encode_items(20 / answers)), 20 / answers, rtol=1e-7, atol=0)


def test_2048_sequences_take_a_kilobyte():
    rng = np.random.default_rng(0)
    assert len(encode_items(rng.binomial(4, 0.33, 2048) / 4)) < 1000
    assert len(encode_items(rng.binomial(256, 0.33, 2048) / 256)) < 2000


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    "text",
    ["", "0.75", "u1/4", "u1/4:", "u1/4:eJx", f"u1/0:{packed(b'12')}", f"i8/1:{packed(b'12345678')}",
     f"u1/x:{packed(b'12')}", f"f4/1:{packed(b'12345')}", f"u1/4:{packed(b'')}", "u1/4:*", None, 7],
)  # fmt: skip
def test_other_text_is_one_clear_error(text):
    with pytest.raises(RunnerError, match=r"holds no item scores \(.+\); expected text such as 'u1/4:eJxj"):
        decode_items(text)


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), np.zeros(0), np.float64(1)])
def test_scores_are_a_number_per_sequence(scores):
    with pytest.raises(ValueError, match="a number per sequence"):
        encode_items(scores)
