"""Small texts that are streamed, for one process and for two."""

from __future__ import annotations

import random
from pathlib import Path

LENGTH, ROWS = 24, 4


def write_texts(folder: Path) -> Path:
    """Sixty documents, shorter than a window and much longer."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        words = random.Random(number).choices("abcdefgh \n", k=30 + 5 * number)
        (folder / f"{number}.txt").write_text("".join(words))
    return folder


def streamed(texts: Path) -> dict[str, object]:
    """As changes of the tiny configuration."""
    task = {"name": "text", "path": str(texts), "documents": "streamed", "length": LENGTH}
    return {
        "task": {**task, "data_cache": f"{texts}-tokens", "validation_tokens": 256, "test_tokens": 256},
        "train__batch_size": ROWS,
        "model__pattern": "mamba2 sliding_window",
        "model__depth": 2,
        "model__mixers": {"sliding_window": {"window": 7}},
    }
