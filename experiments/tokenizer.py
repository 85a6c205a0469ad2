"""Trains a tokenizer on text of one's own: byte-level BPE, as of GPT-2, kept in one ``tokenizer.json``.

    python -m experiments.tokenizer notes --vocab-size 4096 --out tokenizer.json
    python -m experiments.tokenizer 'src/**/*.py' rows.jsonl --field content --vocab-size 16384 --out tokenizer.json
    python -m experiments.run experiment=text task=text task.path=notes task.tokenizer=tokenizer.json

Sources are what ``task.path`` may name. Only documents of the training split are read, so that nothing of the held-out
ones is in the vocabulary: give the --cut and --held-out that the task has. Token 0 is the separator, <|endoftext|>.
Exit codes: 0 the tokenizer is written, 1 it is not, and why.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.tasks import TaskError
from experiments.tasks.text import Text, TextConfig
from experiments.tasks.text_tokens import train_tokenizer
from experiments.util.errors import RunnerError
from experiments.util.files import make_folder, write_atomic
from experiments.util.output import exit_code
from experiments.util.program import program

SMALLEST = 257
"""Every byte, and the separator."""


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("tokenizer"),
        description="Train a byte-level BPE tokenizer on text of your own.",
        allow_abbrev=False,
    )
    defaults = TextConfig()
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, a folder or a pattern as 'src/**/*.py'")
    command.add_argument("--vocab-size", type=int, required=True, help="tokens, with 256 bytes and the separator")
    command.add_argument("--out", type=Path, required=True, help="the file to write, such as tokenizer.json")
    command.add_argument("--again", action="store_true", help="write over a file that is there")
    command.add_argument("--bytes", type=int, help="of text that are read at most, taken evenly (default: all)")
    command.add_argument("--field", default=defaults.field, help="the key or column of a row that is text")
    command.add_argument("--extensions", nargs="+", default=defaults.extensions, help="of the files of a folder")
    command.add_argument("--cut", type=int, default=0, help="as task.cut")
    command.add_argument("--held-out", type=float, default=defaults.held_out, help="as task.held_out")
    command.add_argument("--unusable", choices=["stop", "skip"], default="stop", help="as task.unusable")
    command.add_argument("--data-cache", default="", help="as task.data_cache")
    return command


def train(arguments: argparse.Namespace) -> int:
    if arguments.vocab_size < SMALLEST:
        raise RunnerError(f"--vocab-size must be at least {SMALLEST}, got {arguments.vocab_size}")
    if arguments.bytes is not None and arguments.bytes < 1:
        raise RunnerError(f"--bytes must be at least 1, got {arguments.bytes}")
    if arguments.out.is_dir() or (arguments.out.exists() and not arguments.again):
        raise RunnerError(f"{arguments.out} is there already; --again writes over a file, or give another name")
    task = Text(
        TextConfig(
            sources=[{"path": path} for path in arguments.sources],
            field=arguments.field,
            extensions=arguments.extensions,
            cut=arguments.cut,
            held_out=arguments.held_out,
            unusable=arguments.unusable,
            data_cache=arguments.data_cache,
        )
    )
    began, count = time.perf_counter(), {"bytes": 0}
    content = train_tokenizer(counted(task, arguments.bytes, count), arguments.vocab_size, task.config.separator)
    if not count["bytes"]:
        raise RunnerError("no document of these sources is in the training split; give more text, or a --cut")
    make_folder(arguments.out.absolute().parent)
    write_atomic(arguments.out, content)
    size, seconds = f"{count['bytes']:,} bytes of training text", time.perf_counter() - began
    print(f"{arguments.out}: {arguments.vocab_size} tokens from {size} in {seconds:.0f} s, {sha256(content)}")
    return 0


def counted(task: Text, most: int | None, count: dict[str, Any]) -> Iterator[str]:
    """The training text in pieces, of each source its share of ``most`` bytes from evenly over it; counts them."""
    size = sum(source.size for source in task.sources)
    every = max(1.0, size / most) if most is not None else 1.0
    seen = 0.0
    for source in task.sources:
        for piece in source.pieces():
            seen += 1
            if piece.split == "train" and seen >= every:
                seen -= every
                count["bytes"] += len(piece.content)
                yield piece.content.decode()


def sha256(content: str) -> str:
    return f"SHA-256 {hashlib.sha256(content.encode()).hexdigest()}"


def main() -> int:
    arguments = parser().parse_args()

    def act() -> int:
        try:
            return train(arguments)
        except (TaskError, ValueError) as error:
            raise RunnerError(str(error)) from error

    return exit_code(act)


if __name__ == "__main__":
    sys.exit(main())
