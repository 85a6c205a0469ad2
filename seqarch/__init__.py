"""seqarch: sub-quadratic sequence architectures, one contract on every device.

``seqarch.ops`` holds pure functions on tensors, ``seqarch.layers`` the modules built on them and ``seqarch.models``
the stacks. Nothing here imports Hydra, a tracker, a plotting library, Triton or a compiled extension.
"""

__version__ = "0.1.0"
