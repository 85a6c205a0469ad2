"""The modules of the runner import one another in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.support.paths import ROOT


def test_no_module_imports_itself_through_others():
    """``TYPE_CHECKING`` is no way out: what only the types need is a dependency as well."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in (ROOT / "experiments").rglob("*.py")}
    names = {name.replace("/", "."): path for name, path in files.items() if not name.endswith("__init__")}
    graph = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                graph[name] |= (found & names.keys()) - {name}
    assert graph["experiments.train"] > {"experiments.training.run_record"}
    TopologicalSorter(graph).prepare()
