"""The laws that mixers obey, for anybody's mixer, in a test of one's own: ``check_mixer(MyMixer)``.

With pytest, a test for each case and law is::

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    @pytest.mark.parametrize("case", mixer_cases(MyMixer, options=[{}, {"num_heads": 2}]), ids=str)
    def test_my_mixer(case, law):
        law(case)

Pytest itself is not needed. ``import seqarch`` does not import this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from seqarch.layers import ChannelMixer, Mixer
from seqarch.testing.cases import (
    D_MODEL,
    Case,
    channel_mixer_cases,
    inputs,
    mixer_cases,
    reference_backends,
)
from seqarch.testing.channel_laws import CHANNEL_LAWS
from seqarch.testing.compare import LawBroken, assert_close, error
from seqarch.testing.laws import LAWS, Law, hold


def check_mixer(
    mixer: type[Mixer],
    *,
    d_model: int = D_MODEL,
    options: Iterable[Mapping[str, Any]] = ({},),
    laws: Iterable[Law] = LAWS,
) -> list[Case]:
    """Hold a mixer to the laws, on every backend of the operations that it uses which runs on a CPU of this machine.

    Args:
        mixer: a subclass of :class:`seqarch.layers.Mixer` with its ``Config``; it need not be registered.
        d_model: the width at which it is built; at 32 the laws take seconds per case.
        options: of its ``Config``; it is tried under each of these, by default with its defaults alone.
        laws: some of :data:`LAWS`, or functions of a case like them.

    Returns:
        The cases that were held to them: each of the options, with each backend.

    Raises:
        LawBroken: a law does not hold; it names the mixer, the law, the part of it, by how much, and the case.
        ValueError: it is no mixer's class, has no such option, or there are no laws.
    """
    cases, laws = mixer_cases(mixer, d_model=d_model, options=options), tuple(laws)
    for case in cases:
        hold(case, laws)
    return cases


def check_channel_mixer(
    channel: type[ChannelMixer],
    *,
    d_model: int = D_MODEL,
    options: Iterable[Mapping[str, Any]] = ({},),
    laws: Iterable[Law] = CHANNEL_LAWS,
) -> list[Case]:
    """Hold a channel mixer to its laws; arguments, results and errors as of :func:`check_mixer`."""
    cases, laws = channel_mixer_cases(channel, d_model=d_model, options=options), tuple(laws)
    for case in cases:
        hold(case, laws)
    return cases


__all__ = [
    "CHANNEL_LAWS",
    "D_MODEL",
    "LAWS",
    "Case",
    "Law",
    "LawBroken",
    "assert_close",
    "channel_mixer_cases",
    "check_channel_mixer",
    "check_mixer",
    "error",
    "inputs",
    "mixer_cases",
    "reference_backends",
]
