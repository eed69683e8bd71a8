"""Copies within the host's memory, on the thread that asks.

torch would share them out among its threads, which wait for one another when the machine is busy with a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]


def as_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a tensor on the CPU (rows, bytes of a row): a view where it is contiguous, else of a copy."""
    rows = tensor.size(0)
    if not tensor.numel():
        return np.empty((rows, 0), np.uint8)
    found: Bytes = tensor.detach().contiguous().view(rows, -1).view(torch.uint8).numpy()
    return found


def copied(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor (rows, \\*row shape)."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=False)
    np.copyto(as_bytes(found), as_bytes(tensor))
    return found


def pieces(tensor: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Copies of so many rows each, one behind the other."""
    source, shape, first = as_bytes(tensor), tensor.shape[1:], 0
    found = []
    for count in counts:
        flat = torch.from_numpy(source[first : first + count].copy().reshape(-1))
        found.append(flat.view(tensor.dtype).view(count, *shape))
        first += count
    return found


def gather(source: Tensor, rows: npt.NDArray[np.int64], out: Tensor) -> None:
    """Rows of a tensor by number into a contiguous tensor."""
    if source.numel() and len(rows):
        np.take(as_bytes(source), rows, axis=0, out=as_bytes(out), mode="clip")  # clip: numpy takes no copy of out


def widened(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array of its shape; bfloat16 becomes float32, which holds every one of them."""
    if tensor.dtype != torch.bfloat16:
        plain: npt.NDArray[Any] = tensor.numpy()
        return plain
    halves = tensor.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    found: npt.NDArray[Any] = (halves << 16).view(np.float32)
    return found
