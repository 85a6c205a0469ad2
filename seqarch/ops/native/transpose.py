"""A matrix transposed into columns of another, by the compiled CPU kernel (``csrc/cpu/transpose.cpp``) or by torch."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.native import cpu_library

_transpose = cpu_library.Kernel("transpose", "transpose_arguments")


def transpose_into(x: Tensor, y: Tensor, first: int = 0, threads: int | None = None) -> None:
    """``y[:, first : first + rows] = x^T`` for x ``[rows, columns]`` and y ``[columns, width]``, of one dtype.

    Args:
        threads: that the kernel may take; by default as many as torch.

    Raises:
        ValueError: if the columns do not lie in y, or have another length than x has columns.
    """
    rows, columns = x.shape
    if y.shape[0] != columns or not 0 <= first <= y.shape[1] - rows:
        raise ValueError(
            f"columns {first} to {first + rows - 1} of y {list(y.shape)} have no room for x {list(x.shape)}"
        )
    if cpu_library.unavailable() is not None or x.itemsize not in (2, 4, 8) or not _lie_as_read(x, y):
        y[:, first : first + rows] = x.T.contiguous()  # torch transposes by tiles only into the whole of a tensor
        return
    arguments = {
        "item_bytes": x.itemsize,
        "x": x,
        "y": y,
        "rows": rows,
        "columns": columns,
        "first": first,
        "width": y.shape[1],
    }
    _transpose(arguments, threads=threads)


def _lie_as_read(x: Tensor, y: Tensor) -> bool:
    return all(each.device.type == "cpu" and each.is_contiguous() for each in (x, y))
