"""The generated parts of docs/tasks.md, from the registry of tasks and their docstrings."""

from __future__ import annotations

from pathlib import Path

from docs.docstrings import cell, markdown, module_docstring, option_rows, source
from experiments.tasks import TASKS, Task
from experiments.tasks.byte_text import WHO_GUESSES, ByteText
from experiments.tasks.generated import GeneratedTask
from experiments.tasks.text import Text
from experiments.util.blocks import table

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "tasks"


def text(name: str) -> str:
    return module_docstring(FOLDER / f"{name}.py")


def chance(task: type[Task]) -> str:
    """The measured level, where it is the same on every machine, and who reaches it."""
    if issubclass(task, ByteText):
        return f"measured by each run, {WHO_GUESSES}"
    if issubclass(task, Text):
        return "measured by each run, token frequencies alone"
    made = task(task.Config())
    value, words = made.chance()
    unit = f" {made.metric.unit}" if made.metric.unit else ""
    return f"{value:.3f}{unit}, {words}"


def groups(task: type[Task]) -> str:
    """The groups of its batches: ``by`` what its results are told apart."""
    if issubclass(task, ByteText | Text):
        return "-"
    made = task(task.Config())
    return ", ".join(f"`{name}`" for name in next(made.evaluation("validation")).groups or {}) or "-"


def task_table() -> str:
    rows = []
    for name, task in TASKS.items():
        paper = cell(source(text(name), name)) if issubclass(task, GeneratedTask) else "-"
        rows.append((f"[`{name}`](#{name})", task.title, paper, chance(task), groups(task)))
    return table(("task", "", "source", "chance, with the default options", "results by"), rows)


def task_sections() -> str:
    parts = []
    for name, task in TASKS.items():
        parts += [
            f"## {name}",
            markdown(text(name)).strip(),
            table(("option", "default", "meaning"), option_rows(task.Config)),
        ]
    return "\n\n".join(parts)
