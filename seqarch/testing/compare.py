"""The distance of two tensors, and the error that a broken law raises."""

from __future__ import annotations

from torch import Tensor


class LawBroken(AssertionError):
    """A law does not hold.

    Attributes:
        layer: name of the class that breaks it; empty where a law was called by itself.
        law: name of the law, as in :data:`seqarch.testing.LAWS`; likewise.
        case: options and backend under which it breaks; likewise.
        detail: the part of the law that does not hold, and by how much.
    """

    def __init__(self, detail: str, *, layer: str = "", law: str = "", case: str = ""):
        super().__init__(f"{layer} breaks the law of {law}: {detail} (case {case})" if law else detail)
        self.layer, self.law, self.case, self.detail = layer, law, case, detail


def require(holds: bool, detail: str) -> None:
    """Raise :class:`LawBroken` with ``detail`` unless it holds."""
    if not holds:
        raise LawBroken(detail)


def error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what was expected."""
    got, expected = got.detach().double(), expected.detach().double()
    difference, scale = (got - expected).square().mean(), expected.square().mean()
    return float((difference / scale.clamp(min=1e-30)).sqrt())


def assert_close(got: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    """Raise :class:`LawBroken` unless shapes agree, numbers are finite and :func:`error` is at most ``bound``."""
    require(got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
    require(bool(got.isfinite().all()), f"{what}: not finite")
    found = error(got, expected)
    require(found <= bound, f"{what}: error {found:.2e}, bound {bound:.0e}")


def assert_same_count(counted: int, formula: int, what: str) -> None:
    """Raise :class:`LawBroken` unless a count equals what the layer's own formula says."""
    require(counted == formula, f"{what}: counted {counted}, the layer says {formula}")
