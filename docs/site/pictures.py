"""Pictures of plots in as few bytes as show the same: 256 colours of their own in place of all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def shrink(folder: Path) -> None:
    """Write each opaque PNG of a folder anew where that makes it smaller."""
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            if picture.mode in ("RGBA", "LA") and min(picture.getchannel("A").tobytes()) < 255:
                continue
            reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        written = io.BytesIO()
        reduced.save(written, "PNG", optimize=True)
        if written.tell() < path.stat().st_size:
            path.write_bytes(written.getvalue())
