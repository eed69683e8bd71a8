"""Rows of one step: which of its tokens they are, and where they are on their way out of the ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.copies import copied
from steer_compile.capture.results import Tracked
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError

POSITIONS, TOKEN_IDS = "\0positions", "\0token_ids"
"""Labels that cross with the values; no key begins like this."""


@dataclass(frozen=True)
class Limits:
    """How much a pipeline holds.

    Attributes:
        ring_bytes: rows whose copy is under way.
        queue_bytes: rows that wait for consumers.
        items: pieces of steps in the ring.
        requests: requests that have no result yet.
        results: requests whose results are remembered.
        spill_bytes: rows that wait on the disk.
    """

    ring_bytes: int = 256 << 20
    queue_bytes: int = 256 << 20
    items: int = 1024
    requests: int = 65536
    results: int = 4096
    spill_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise CaptureError(f"{name}={value} is no limit; give a number above 0")


@dataclass(frozen=True, eq=False)
class StepRows:
    """Which rows of a step are whose.

    Attributes:
        requests: names of the requests, all of which have begun.
        request: index in ``requests`` of each row (n,).
        rows: number of each row in the step's tensors (n,).
        step: number of the forward.
    """

    requests: Sequence[str]
    request: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    step: int

    def __post_init__(self) -> None:
        # copies: a host goes on with its own lists while a thread reads these
        object.__setattr__(self, "requests", tuple(self.requests))
        object.__setattr__(self, "request", np.array(self.request, np.int32))
        object.__setattr__(self, "rows", np.array(self.rows, np.int64))
        if self.request.shape != self.rows.shape or self.rows.ndim != 1:
            raise CaptureError(f"{self.request.shape} requests are given for {self.rows.shape} rows; give one for each")

    def tensors(self, positions: Tensor, values: Mapping[str, Tensor], token_ids: Tensor | None) -> dict[str, Tensor]:
        """All that crosses, by key.

        Raises:
            CaptureError: tensors of other lengths, rows beyond the tokens of the step, or requests that have no name.
        """
        tokens = positions.size(0)
        for what, index, most in (("row", self.rows, tokens), ("request", self.request, len(self.requests))):
            if len(index) and not 0 <= index.min() <= index.max() < most:
                raise CaptureError(f"{what} {index.max()} is asked for of {most}; number them from 0")
        found = {POSITIONS: positions.to(torch.int64), **values}
        if token_ids is not None:
            found[TOKEN_IDS] = token_ids.to(torch.int64)
        for key, tensor in found.items():
            if tensor.dim() == 0 or tensor.size(0) != tokens:
                raise CaptureError(
                    f"{key.strip(chr(0))} has shape {tuple(tensor.shape)} and positions {tokens} tokens; "
                    "give tensors with an entry for each token of the step"
                )
        return found

    def part(self, first: int, stop: int) -> StepRows:
        """Some of the rows that follow one another."""
        return StepRows(self.requests, self.request[first:stop], self.rows[first:stop], self.step)


@dataclass(eq=False)
class Item:
    """Rows in the ring, there once ``ready`` has passed."""

    of: StepRows
    tracked: tuple[Tracked, ...]
    views: dict[str, Tensor] | None
    ready: torch.cuda.Event | None

    def rows(self) -> Rows | None:
        """A copy outside of the ring; None where there is no memory for one, or the device failed."""
        if self.views is None:
            return None
        try:
            if self.ready is not None:
                self.ready.synchronize()
            values = {key: copied(view) for key, view in self.views.items()}
        except (MemoryError, RuntimeError):
            return None
        count = len(self.of.rows)
        ids = values.pop(TOKEN_IDS, None)
        return Rows(
            tuple(self.of.requests),
            torch.from_numpy(self.of.request.copy()),
            values.pop(POSITIONS),
            ids if ids is not None else torch.full((count,), -1, dtype=torch.int64),
            torch.full((count,), self.of.step, dtype=torch.int64),
            values,
        )

    def counts(self) -> list[int]:
        """Rows of each request."""
        counts: list[int] = np.bincount(self.of.request, minlength=len(self.tracked)).tolist()
        return counts
