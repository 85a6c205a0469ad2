"""Every law on every registered mixer, with its variants, on every backend that runs here."""

from __future__ import annotations

import pytest

from seqarch.layers import MIXERS
from seqarch.ops import OPS
from seqarch.testing import LAWS, Case, Law
from tests.support.variants import registered_cases

CASES = [pytest.param(case, id=f"{name}{case.setting}") for name, case in registered_cases()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, case: Case):
    law(case)


def test_the_flops_of_every_mixer_are_counted():
    """In the cases of references, of which each mixer has one."""
    counted = {name for name, case in registered_cases() if not case.op or case.backend == OPS[case.op].reference}
    assert counted == set(MIXERS)
