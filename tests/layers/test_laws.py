"""Every law on every case of :mod:`tests.laws`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import laws


@pytest.mark.parametrize("case", list(laws.cases()), ids=str)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[laws.Case], None], case: laws.Case):
    law(case)
