"""seqarch: sub-quadratic sequence architectures, one contract on every device.

    from seqarch import LanguageModel, Mamba2

    mixer = Mamba2(d_model=256)            # y, state = mixer(x, state), with x, y: [B, T, D]
    model = LanguageModel(vocab_size=256, d_model=64, pattern="3*mamba2 attention", depth=4)

Here is all that ``seqarch.layers`` (mixers, channel mixers, their configs and registries) and ``seqarch.models``
(stacks and language models) export, and ``load`` for the model of a run. ``seqarch.ops`` holds pure functions on
tensors. Whatever is asked for first is imported then: ``import seqarch`` loads no torch.

Nothing here imports Hydra, a tracker, a plotting library, Triton or a compiled extension.
"""

__version__ = "0.1.0"

_EXPORTERS = ("layers/__init__.py", "models/__init__.py", "checkpoints/loading.py")
"""The files whose ``__all__`` are names of ``seqarch`` too."""

TYPE_CHECKING = False  # Type checkers know the name; to import it from typing would take longer than all the rest.
if TYPE_CHECKING:
    from seqarch import checkpoints as checkpoints
    from seqarch import interop as interop
    from seqarch import layers as layers
    from seqarch import models as models
    from seqarch import ops as ops
    from seqarch import parallel as parallel
    from seqarch import pretrained as pretrained
    from seqarch import testing as testing
    from seqarch.checkpoints.loading import *  # noqa: F403
    from seqarch.layers import *  # noqa: F403
    from seqarch.models import *  # noqa: F403

else:

    def _exports() -> dict[str, str]:
        """By each of these names the module that it is in."""
        paths = {file: file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in _EXPORTERS}
        modules = {file: f"{__name__}.{path}" for file, path in paths.items()}
        return {name: module for file, module in modules.items() for name in _listed(file, module)}

    def _listed(file: str, module: str) -> list[str]:
        """A module's ``__all__``, from its source, so that nothing is imported; where there is none, from itself."""
        import ast
        import importlib
        import pkgutil

        try:
            source = pkgutil.get_data(__name__, file)
        except OSError:
            source = None
        for node in ast.parse(source or b"").body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return ast.literal_eval(node.value)
        return importlib.import_module(module).__all__

    def _modules() -> list[str]:
        import pkgutil

        folders = globals()["__path__"]
        return [module.name for module in pkgutil.iter_modules(folders) if not module.name.startswith("_")]

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__all__":
            return sorted([*_exports(), *_modules()])
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
            if module := _exports().get(name):
                value = globals()[name] = getattr(importlib.import_module(module), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=__import__(__name__))

    def __dir__() -> list[str]:
        return sorted({*(name for name in globals() if name.startswith("__")), *_exports(), *_modules()})
