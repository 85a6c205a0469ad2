"""The reference of the library's public names, which Sphinx writes from their docstrings."""

from __future__ import annotations

from importlib import import_module

from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.ops import OPS

MODULES = (
    "seqarch.layers",
    "seqarch.models",
    "seqarch.ops",
    "seqarch.state",
    "seqarch.serving",
    "seqarch.pretrained",
    "seqarch.interop",
    "seqarch.parallel",
    "seqarch.testing",
)


def names(module: str) -> list[str]:
    """The public names of a module, but for layers and operations, which have pages of their own."""
    there = import_module(module)
    public = getattr(there, "__all__", None) or [
        name for name, value in vars(there).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]  # fmt: skip
    layers = {layer.__name__ for layer in (*MIXERS.values(), *CHANNEL_MIXERS.values())}
    elsewhere = layers | {f"{name}Config" for name in layers} | set(OPS)
    return [name for name in public if name not in elsewhere and getattr(getattr(there, name), "__doc__", None)]


def pages() -> dict[str, str]:
    """The sources of the reference, by their paths on the site."""
    made = {f"api/{module}.rst": _page(module) for module in MODULES}
    listed = "\n".join(f"   {module}" for module in MODULES)
    made["api/index.rst"] = (
        f"API\n===\n\nThe library's public names, by module. Mixers and operations have pages of their own:"
        f" :doc:`/mixers` and :doc:`/ops/index`.\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    )
    return made


def _page(module: str) -> str:
    members = ", ".join(names(module))
    return (
        f"{module}\n{'=' * len(module)}\n\n.. automodule:: {module}\n   :members: {members}\n   :imported-members:\n"
        "   :member-order: bysource\n"
    )
