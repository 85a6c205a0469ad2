"""What models are trained on and judged by: one generator a file, one line here each."""

from experiments.tasks.mqar import MQAR
from experiments.tasks.stdlib_text import StdlibText
from experiments.tasks.task import Batch, Metric, Task

TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "stdlib_text": StdlibText,
}

__all__ = ["TASKS", "Batch", "Metric", "Task"]
