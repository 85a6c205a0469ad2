"""A folder for plug-ins of a test, which leave nothing in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.config import plugins
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from seqarch.layers import CHANNEL_MIXERS, MIXERS


@pytest.fixture
def plugin_folder(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """A folder in Python's path; what is imported from it and registered by it is forgotten after the test."""
    folder = tmp_path_factory.mktemp("plugins")
    monkeypatch.syspath_prepend(folder)
    registries: list[dict] = [TASKS, TRACKERS, MIXERS, CHANNEL_MIXERS, plugins._packages]
    before, modules = [dict(each) for each in registries], set(sys.modules)
    plugins._import_installed.cache_clear()
    yield folder
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    plugins._import_installed.cache_clear()
