"""The bytes that xz adds for a file when it has compressed other text before; a program of its own, with one thread.

The compressor that has read the text is copied for each beginning of a file by forking this process, which costs
milliseconds where reading the text again would take most of a minute. Input: a line of JSON, ``{"text": bytes, "files":
[bytes, ...], "edges": [bytes, ...]}``, and then the bytes themselves, end to end. Output: a line of JSON, per file the
bytes added for its first ``edge`` bytes, for each edge.
"""

from __future__ import annotations

import json
import lzma
import os
import sys

MOST = 2**30
"""Bytes of the largest window."""

CALL = 2**14
"""Bytes of the text in one call of the compressor."""


def compressor(window: int) -> lzma.LZMACompressor:
    """One that looks back over ``window`` bytes."""
    size = 2**16
    while size < min(window, MOST):
        size *= 2
    chain = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}
    return lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[chain])


def size_after(machine: lzma.LZMACompressor, content: bytes) -> int:
    """The bytes that a copy of a compressor still gives for some content and its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        size = len(machine.compress(content)) + len(machine.flush())
        os.write(writing, str(size).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not answer:
        raise RuntimeError(f"a copy of the compressor ended with status {status}")
    return int(answer)


def main() -> None:
    given = json.loads(sys.stdin.buffer.readline())
    machine = compressor(given["text"] + max(given["files"], default=0))
    # Of each call the compressor takes the content in and works on it in the next one; what is left for the copies is
    # small where the calls are.
    for begin in range(0, given["text"], CALL):
        machine.compress(sys.stdin.buffer.read(min(CALL, given["text"] - begin)))
    before = size_after(machine, b"")
    contents = [sys.stdin.buffer.read(size) for size in given["files"]]
    added = [[size_after(machine, content[:edge]) - before for edge in given["edges"]] for content in contents]
    print(json.dumps(added))


if __name__ == "__main__":
    main()
