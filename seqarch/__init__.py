"""seqarch: sub-quadratic sequence architectures, one contract on every device.

``seqarch.ops`` holds pure functions on tensors, ``seqarch.layers`` the modules built on them and ``seqarch.models``
the stacks. Nothing here imports Hydra, a tracker, a plotting library, Triton or a compiled extension.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqarch.layers.registration import register_channel_mixer, register_mixer

__version__ = "0.1.0"

__all__ = ["__version__", "register_channel_mixer", "register_mixer"]


def __getattr__(name: str) -> Any:
    """``register_mixer`` and ``register_channel_mixer``, with torch imported when one is first asked for."""
    if name in ("register_mixer", "register_channel_mixer"):
        from seqarch.layers import registration

        return getattr(registration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
