"""Every law on every registered mixer, with its variants, on every backend that runs here."""

from __future__ import annotations

import pytest

from seqarch.testing import LAWS, Case, Law
from tests.support.variants import registered_cases

CASES = [pytest.param(case, id=f"{name}{case.setting}") for name, case in registered_cases()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, case: Case):
    law(case)
