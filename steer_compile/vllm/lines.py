"""`Lines`: which line of the gates' memory is whose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from steer_compile.errors import TooManyTokens
from steer_compile.runtime.tables import TableSet

Numbers = npt.NDArray[np.int32]


class Lines:
    """A line for each live request where the spec has the op family ``memory``; line 0 is of nobody.

    A request's first step forgets what its line held before: a prompt does so in the graph, and where the first token
    is a decoded one, as behind a cached prefix, the line is cleared here.
    """

    def __init__(self, tables: TableSet) -> None:
        self._parts = [tables.view("state", site) for site in tables.sites("state")]
        self._most = tables.spec.sequences
        self._free = list(range(self._most, 0, -1))
        self._of: dict[str, int] = {}
        self._fresh: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._parts)

    def begin(self, request: str) -> None:
        """A request begins, or begins again.

        Raises:
            TooManyTokens: more live requests than the spec has ``sequences``.
        """
        self.drop((request,))
        if not self._free:
            raise TooManyTokens(
                f"{self._most + 1} requests are live and the spec has sequences={self._most}; raise it, or lower "
                "max_num_seqs"
            )
        self._of[request] = self._free.pop()
        self._fresh.add(request)

    def drop(self, requests: Iterable[str]) -> None:
        """Requests ended or were preempted."""
        for request in requests:
            line = self._of.pop(request, None)
            if line is not None:
                self._free.append(line)
                self._fresh.discard(request)

    def step(self, requests: Sequence[str], starts: Numbers, counts: Numbers, prompts: Numbers) -> Numbers:
        """Line of each token of a step: its request's for the last one, 0 for others. As `RequestRows.step`."""
        if self._fresh:
            for request, start, prompt in zip(requests, starts.tolist(), prompts.tolist(), strict=True):
                if request in self._fresh:
                    self._fresh.discard(request)
                    if start >= prompt:
                        self._clear(self._of[request])
        ends = np.cumsum(counts)
        lines = np.zeros(int(ends[-1]) if ends.size else 0, np.int32)
        mine = np.fromiter((self._of.get(request, 0) for request in requests), np.int32, len(requests))
        there = counts > 0
        lines[ends[there] - 1] = mine[there]
        return lines

    def _clear(self, line: int) -> None:
        for part in self._parts:
            part[line].zero_()
