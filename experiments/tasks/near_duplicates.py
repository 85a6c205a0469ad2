"""Held-out documents that are mostly copies of training documents.

Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", call a text that occurs twice over 50
tokens a duplicate, and find them by a suffix array. Here windows of 32 bytes stand for the text, of which those are
compared whose hash ends in five zeros: which ones that are depends on their bytes alone, so that a copy is found
wherever it lies, at a 32nd of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

WINDOW = 32
SAMPLED = 32
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def sampled_windows(content: bytes) -> np.ndarray:
    """Hashes of the distinct windows of a document that are compared, uint64; none of one that is too short."""
    if len(content) < WINDOW:
        return np.zeros(0, np.uint64)
    every = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), 8)
    words = np.ascontiguousarray(every).view("<u8")[:, 0]
    length = len(content) - WINDOW + 1
    hashes = np.zeros(length, np.uint64)
    for part, multiplier in enumerate(_MULTIPLIERS):
        hashes = (hashes ^ words[8 * part : 8 * part + length]) * multiplier
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes[hashes % np.uint64(SAMPLED) == 0])


def copied_shares(documents: Iterable[bytes], training: Iterable[bytes]) -> list[float]:
    """For each document the share of its windows that some training document has, too; 0 where none is compared."""
    parts = [sampled_windows(content) for content in training]
    known = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    shares = []
    for content in documents:
        windows = sampled_windows(content)
        shares.append(float(np.isin(windows, known, assume_unique=True).mean()) if len(windows) else 0.0)
    return shares
