"""`Block`: rows on their way to a file, collected until there are enough for one large write."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from steer_compile.capture.copies import as_bytes
from steer_compile.capture.parts import Signature
from steer_compile.capture.rows import Rows

LABELS = {"positions": torch.int64, "token_ids": torch.int64, "steps": torch.int64, "request": torch.int32}
"""Labels of a row and their dtypes."""


def row_bytes(signature: Signature) -> int:
    """Bytes of one row, labels included."""
    values = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in signature)
    return values + sum(dtype.itemsize for dtype in LABELS.values())


class Block:
    """Buffers for ``size`` rows of a kind, the labels first.

    Attributes:
        filled: rows that are in them.
    """

    def __init__(self, signature: Signature, size: int) -> None:
        self.size, self.filled = size, 0
        self._buffers = {name: torch.empty(size, dtype=dtype) for name, dtype in LABELS.items()}
        self._buffers |= {key: torch.empty(size, *shape, dtype=dtype) for key, dtype, shape in signature}
        self._bytes = {name: as_bytes(buffer) for name, buffer in self._buffers.items()}

    @property
    def full(self) -> bool:
        return self.filled == self.size

    def take(self, rows: Rows, request: Tensor, first: int, stop: int) -> int:
        """Copy rows from ``first`` up to ``stop``, as many as fit; returns the number of the next one."""
        count = min(stop - first, self.size - self.filled)
        labels = {
            "positions": rows.positions, "token_ids": rows.token_ids, "steps": rows.steps, "request": request
        }  # fmt: skip
        for name, source in (*labels.items(), *rows.values.items()):
            np.copyto(self._bytes[name][self.filled : self.filled + count], as_bytes(source[first : first + count]))
        self.filled += count
        return first + count

    def tensors(self) -> Mapping[str, Tensor]:
        """The rows that are there; views, which the next `take` behind `clear` writes to."""
        return {name: buffer[: self.filled] for name, buffer in self._buffers.items()}

    def clear(self) -> None:
        """Begin anew."""
        self.filled = 0
