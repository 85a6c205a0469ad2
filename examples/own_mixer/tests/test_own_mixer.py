"""The mixer obeys the laws of seqarch, and the task is solved by whoever counts."""

import numpy as np
import pytest
from own_mixer.mixers import LearntRetention
from own_mixer.tasks import Majority, MajorityConfig

from seqarch.testing import LAWS, check_mixer, mixer_cases


def test_all_laws():
    check_mixer(LearntRetention, options=[{}, {"num_heads": 2, "forget": 0.5}])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", mixer_cases(LearntRetention, options=[{}]), ids=str)
def test_each_law(case, law):
    law(case)


def test_the_answer_is_the_majority():
    batch = Majority(MajorityConfig(length=16)).train_batch(seed=0, start=0, size=8)
    ones = np.cumsum(batch.tokens, axis=1)
    assert np.array_equal(batch.targets, 2 * ones > np.arange(1, 17))
