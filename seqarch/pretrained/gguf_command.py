"""``python -m seqarch gguf FOLDER FILE``: the model of a folder as a file that llama.cpp reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from seqarch.pretrained.gguf_architectures import ARCHITECTURES
from seqarch.pretrained.gguf_file import FILE_TYPES, save_gguf
from seqarch.pretrained.loading import from_pretrained

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FILE_TYPES}


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m seqarch gguf", description=(__doc__ or "").splitlines()[0])
    command.add_argument("folder", help="of the model, as LanguageModel.from_pretrained takes it")
    command.add_argument("file", help="to write, which must not be there")
    command.add_argument("--family", choices=ARCHITECTURES, help="by default that which the folder is of")
    command.add_argument("--dtype", choices=DTYPES, help="of matrices; by default as they are stored")
    command.add_argument("--pre", help="llama.cpp's name of how the tokenizer cuts text into words, such as falcon-h1")
    return command


def main(arguments: Sequence[str]) -> int:
    """Write the file; returns the exit code."""
    given = parser().parse_args(arguments)
    dtype: torch.dtype | None = DTYPES.get(given.dtype)
    try:
        save_gguf(from_pretrained(given.folder), given.file, family=given.family, dtype=dtype, pre=given.pre)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        hint = ": pip install 'seqarch[gguf]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    print(f"written to {given.file}")
    return 0
