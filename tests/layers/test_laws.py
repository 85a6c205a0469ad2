"""Every law on every registered mixer, with its variants, on every backend that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from seqarch.layers import MIXERS
from seqarch.ops import OPS
from seqarch.testing import LAWS, Case, Law, laws
from tests.support.variants import registered_cases

CASES = [
    pytest.param(case, id=f"{name}{case.setting}", marks=() if quick else pytest.mark.slow)
    for name, case, quick in registered_cases()
]


@pytest.fixture(scope="module", autouse=True)
def references_once() -> Iterator[None]:
    """What the references say of a mixer is the same whatever is compared with it: computed once for all its cases."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_reference_gradients", "_reference_outputs"):
            patch.setattr(laws, name, once(getattr(laws, name)))
        yield


def once(function: Any) -> Any:
    kept = lru_cache(maxsize=8)(function)

    def of(case: Case, *arguments: Any) -> Any:
        return kept(Case(case.layer, "", "", case.options, case.d_model), *arguments)

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, case: Case):
    law(case)


def test_the_flops_of_every_mixer_are_counted():
    """In the cases of references, of which each mixer has one."""
    counted = {name for name, case, _ in registered_cases() if not case.op or case.backend == OPS[case.op].reference}
    assert counted == set(MIXERS)
