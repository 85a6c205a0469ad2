"""Which configuration a Triton kernel runs in: chosen by timing, once for each form of it, and kept on disk.

A form is the kernel with the dtypes of its tensors and its compile-time constants: widths, kinds of decay, precision.
Sizes that differ from call to call (the batch, the length, how many sequences are packed) are no part of it, so no
batch of data makes a kernel try its configurations again. A launch too small to fill the device shows nothing, and is
not timed. The kernel's source and Triton's version belong to the form: a choice does not outlive what it was made for.

``SEQARCH_AUTOTUNE=0`` takes the first configuration of each kernel, without timing any and whatever is kept.
``SEQARCH_TUNING`` names the folder of the choices, one file a kind of device. ``python -m seqarch tuning`` prints them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CLOSE = 0.02
"""A later configuration must be faster than an earlier one by this share: less is noise."""


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled: warps of a program, depth of the pipelines, and tiles that its caller leaves open."""

    warps: int = 4
    stages: int = 2
    tiles: dict[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        tiles = [f"{name}={size}" for name, size in self.tiles.items()]
        return ", ".join([*tiles, f"{self.warps} warps", f"{self.stages} stages"])


@dataclass(frozen=True)
class Choice:
    """A configuration and what it was chosen from: milliseconds by configuration, ``None`` where it cannot run."""

    configuration: Configuration
    milliseconds: dict[str, float | None]


def enabled() -> bool:
    """Whether kernels may be timed."""
    return os.environ.get("SEQARCH_AUTOTUNE", "1") != "0"


def folder() -> Path:
    """Where choices are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEQARCH_TUNING") or Path(cache) / "seqarch" / "tuning")


class Choices:
    """The choices made for one kind of device, in memory and in ``FOLDER/DEVICE.json``.

    Another process may add to the file at any time: it is read when a form is unknown, and written whole, with what it
    holds by then, under a new name that replaces it. A folder that cannot be written leaves choices to this process.
    """

    def __init__(self, device: str):
        self.file = folder() / f"{device.replace(' ', '_').replace('/', '_')}.json"
        self.known = read(self.file)

    def configuration(
        self, form: str, configurations: Sequence[Configuration], time: Callable[[Configuration], float | None]
    ) -> Configuration:
        """The choice for a form, made now if there is none.

        Args:
            configurations: the one to prefer where times are close comes first.
            time: milliseconds of a configuration, ``None`` where it cannot run.

        Raises:
            RuntimeError: none of them can run.
        """
        if form not in self.known:
            self.known = read(self.file) | self.known
        kept = self.known.get(form)
        if kept is None or kept.configuration not in configurations:
            kept = choose(form, configurations, time)
            self.known = read(self.file) | self.known | {form: kept}
            with suppress(OSError):
                write(self.file, self.known)
        return kept.configuration


def choose(form: str, configurations: Sequence[Configuration], time: Callable[[Configuration], float | None]) -> Choice:
    """Time all; the first of those within :data:`CLOSE` of the fastest."""
    times = [time(configuration) for configuration in configurations]
    able = [each for each in times if each is not None]
    if not able:
        raise RuntimeError(f"{form} runs in none of its configurations: {'; '.join(map(str, configurations))}")
    best = next(
        configuration
        for configuration, each in zip(configurations, times, strict=True)
        if each is not None and each <= min(able) * (1 + CLOSE)
    )
    return Choice(best, {str(configuration): each for configuration, each in zip(configurations, times, strict=True)})


def read(file: Path) -> dict[str, Choice]:
    """The content of a file; nothing where there is none, or one that is not whole."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {form: Choice(Configuration(**one["configuration"]), one["milliseconds"]) for form, one in kept.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(file: Path, choices: dict[str, Choice]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({form: asdict(choice) for form, choice in choices.items()}, indent=1) + "\n")
    whole.replace(file)


def report() -> Iterator[str]:
    """Lines that show all choices that are kept, and how they were made."""
    yield f"choices are kept in {folder()}" + ("" if enabled() else "; SEQARCH_AUTOTUNE=0, so none is used or made")
    for file in sorted(folder().glob("*.json")):
        yield file.stem.replace("_", " ")
        for form, choice in sorted(read(file).items()):
            yield f"  {form}"
            for name, time in choice.milliseconds.items():
                mark = "*" if name == str(choice.configuration) else " "
                yield f"  {mark} {name}: {'does not fit' if time is None else f'{time:.4g} ms'}"
