"""Modules that are made of one config, or of its options as keywords: ``Mamba2(config)``, ``Mamba2(d_model=256)``."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, TypeVar, get_type_hints, overload

import torch
from torch import nn

P = ParamSpec("P")
C_co = TypeVar("C_co", covariant=True)
C_contra = TypeVar("C_contra", contravariant=True)

MYPY = False
"""True to mypy, which takes no descriptor for a constructor: it knows what is made, and not the options."""

if TYPE_CHECKING:

    class _HasConfig(Protocol[P, C_co]):
        @property
        def Config(self) -> Callable[P, C_co]: ...

    class _Init(Protocol[C_contra, P]):  # pyright: ignore[reportInvalidTypeVarUse]
        @overload
        def __call__(self, config: C_contra, *more: Any, **named: Any) -> None: ...
        @overload
        def __call__(self, *options: P.args, **named: P.kwargs) -> None: ...

    if MYPY:

        def from_options(init: Callable[..., None]) -> Callable[..., None]: ...  # pyright: ignore[reportRedeclaration]

    else:

        class from_options:  # noqa: N801
            """To a type checker: the options are those of the ``Config`` of the very class that is made."""

            def __init__(self, init: Callable[..., None]): ...
            @overload
            def __get__(self, instance: _HasConfig[P, C_co], owner: Any = None) -> _Init[C_co, P]: ...
            @overload
            def __get__(self, instance: object, owner: Any = None) -> Callable[..., None]: ...
            def __get__(self, instance: Any, owner: Any = None) -> Any: ...

else:

    def from_options(init):
        """Let an ``__init__(self, config)`` take the options of the class's ``Config`` as keywords in its place.

        Every subclass of :class:`Configured` has it anyway; written above an ``__init__``, it tells type checkers.
        One whose first argument is no ``config`` stays as it is.
        """
        own = list(inspect.signature(init).parameters.values())[1:]
        if hasattr(init, "takes_options") or not own or own[0].name != "config":
            return init
        known = {each.name for each in own}
        anything = any(each.kind is each.VAR_KEYWORD for each in own)

        @functools.wraps(init)
        def made(self, *given, **named):
            if not given and "config" not in named and hasattr(type(self), "Config"):
                given, named = (make_config(type(self).__name__, type(self).Config, named),), {}
            elif (options := [name for name in named if name not in known]) and not anything:
                raise ValueError(
                    f"{type(self).__name__}: given a config and {', '.join(options)} beside it; expected either one"
                    f" config or options alone (dataclasses.replace changes some of a config)"
                )
            init(self, *given, **named)

        made.takes_options = True
        return made


class _Signature:
    """``Class.__signature__``: its config, or each option with its default. An instance has the one of its call."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None or not (hasattr(owner, "Config") and hasattr(owner.__init__, "takes_options")):
            raise AttributeError("__signature__")
        config = inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        config = config.replace(annotation=owner.Config | None)
        hints = get_type_hints(owner.Config)
        return inspect.Signature([config, *(_option(field, hints[field.name]) for field in fields(owner.Config))])


def _option(field: Field[Any], hint: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty
    if field.default is not MISSING:
        default = field.default
    elif field.default_factory is not MISSING:
        default = field.default_factory()
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


class Configured(nn.Module):
    """A module with a ``Config``, a frozen dataclass, and ``__init__(self, config)``.

    It is made of that config, or of the config's options as keywords, as its subclasses are, wherever they are written.
    """

    Config: ClassVar[type[object]]
    __signature__: ClassVar[Any] = _Signature()

    def __init_subclass__(cls, **given: Any):
        super().__init_subclass__(**given)
        if init := vars(cls).get("__init__"):
            cls.__init__ = from_options(init)  # pyright: ignore[reportAttributeAccessIssue]


def build_config(kind: str, name: str, config_class: Any, options: dict[str, Any]) -> Any:
    """``config_class(**options)``, where a wrong option is an error that lists the right ones.

    Raises:
        ValueError: there is no such option, or a value is of the wrong type or out of range; it names the layer.
    """
    return make_config(f"{kind} {name!r}", config_class, options)


def make_config(who: str, config_class: Any, options: dict[str, Any]) -> Any:
    """As :func:`build_config`; ``who`` is how an error calls what is made."""
    right = [field.name for field in fields(config_class)]
    for option in options:
        if option not in right:
            near = difflib.get_close_matches(option, right, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{who} has no option {option!r}: it has {', '.join(right)}.{hint}")
    needed = (each for each in fields(config_class) if each.default is MISSING and each.default_factory is MISSING)
    with _naming(who, options):
        if missing := [each.name for each in needed if each.name not in options]:
            raise ValueError(f"it needs {' and '.join(missing)}")
        return config_class(**options)


def build_layer(kind: str, name: str, layer: Any, options: dict[str, Any]) -> Any:
    """The layer with these options of its config; errors as in :func:`build_config`."""
    config = build_config(kind, name, layer.Config, options)
    with _naming(f"{kind} {name!r}", options):
        return layer(config)


@contextmanager
def _naming(who: str, options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        given = ", ".join(f"{option}={reprlib.repr(value)}" for option, value in options.items())
        raise ValueError(f"{who}: {str(error).splitlines()[0]} (given {given or 'nothing'})") from error
