"""Vectors, probes and directions for parallel streams: of one stream, or the same on each.

A site of m streams of H numbers is m*H wide, its streams one after another. What is added, read or clamped there is a
vector of m*H numbers; these make one of a vector of H. A probe of one stream reads that stream alone; one on every
stream reads their sum.
"""

from __future__ import annotations

from typing import Any

import torch

from steer_compile.errors import VectorError
from steer_compile.runtime.vectors import checked_vector


def one_stream(vector: Any, stream: int, streams: int) -> torch.Tensor:
    """The vector on one stream, zeros on the others.

    Args:
        vector: (H,), floating.
        stream: its number, 0 to ``streams`` - 1.

    Returns:
        (streams * H,) fp32 on the CPU.

    Raises:
        VectorError: no such stream, or what is no vector.
    """
    checked = checked_vector("the vector of one stream", vector)
    many = _many(streams)
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < many:
        raise VectorError(f"there is no stream {stream!r} among {many}; give a number from 0 to {many - 1}")
    found = checked.new_zeros(many, checked.numel())
    found[stream] = checked
    return found.view(-1)


def every_stream(vector: Any, streams: int) -> torch.Tensor:
    """The vector on each stream.

    Args:
        vector: (H,), floating.

    Returns:
        (streams * H,) fp32 on the CPU.

    Raises:
        VectorError: a number of streams below one, or what is no vector.
    """
    return checked_vector("the vector of every stream", vector).repeat(_many(streams))


def _many(streams: object) -> int:
    if isinstance(streams, bool) or not isinstance(streams, int) or streams < 1:
        raise VectorError(f"streams={streams!r} is no number of streams; give the model's, for example 4")
    return streams
