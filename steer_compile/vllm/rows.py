"""`RequestRows`: which row of the tables each token of a step reads, by request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_compile.runtime.registry import Handle, Registry
from steer_compile.runtime.rows import GLOBAL_ROWS
from steer_compile.vllm.requests import KEY, parse


@dataclass(frozen=True)
class Span:
    """Tokens of one request in one step: positions ``start`` to ``start + length``, behind a prompt of ``prompt``."""

    request: str
    start: int
    length: int
    prompt: int


class RequestRows:
    """Rows of the live requests of one process. Every rank makes the same ones, as they see the same steps."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._handles: dict[str, Handle] = {}
        self._last, self._decoded = np.zeros(0, np.int32), np.zeros(0, np.bool_)

    @property
    def live(self) -> int:
        """Requests that hold rows."""
        return len(self._handles)

    def drop(self, requests: Iterable[str]) -> None:
        """Give the rows of requests back that finished or were preempted."""
        for request in requests:
            handle = self._handles.pop(request, None)
            if handle is not None:
                self._registry.release(handle)

    def admit(self, request: str, extra_args: Mapping[str, Any] | None) -> None:
        """Rows for a request that begins or goes on, if it asks for steering and has none yet.

        Raises:
            TableFull: no free row, which the scheduler is there to prevent.
        """
        if request not in self._handles and extra_args and KEY in extra_args:
            self._handles[request] = self._registry.register(parse(extra_args[KEY]))

    def step(self, spans: Sequence[Span]) -> None:
        """Write the row of every token, and whether it is decoded; rows behind the last token are 0.

        A token's phase is that of its position: below the prompt's length it is prefill. So a request that was
        preempted computes its generated tokens again with the rows that they had.
        """
        counts = np.array([s.length for s in spans], np.int64)
        starts = np.repeat(np.array([s.start for s in spans], np.int64), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        positions = starts + np.arange(starts.size) - first
        decoded = positions >= np.repeat(np.array([s.prompt for s in spans], np.int64), counts)
        plans = [self._handles[s.request].plan if s.request in self._handles else None for s in spans]
        phases = ("prefill", "decode")
        rows = np.array(
            [[plan.row(phase) if plan else GLOBAL_ROWS[phase] for phase in phases] for plan in plans], np.int32
        ).reshape(-1, 2)
        picked = np.where(decoded, np.repeat(rows[:, 1], counts), np.repeat(rows[:, 0], counts))
        at = 0
        for span, plan in zip(spans, plans, strict=True):
            if plan is not None and plan.tokens is not None:
                chosen = plan.tokens.mask(span.start, span.length, span.prompt)
                part = slice(at, at + span.length)
                everyone = np.where(decoded[part], GLOBAL_ROWS["decode"], GLOBAL_ROWS["prefill"])
                picked[part] = np.where(chosen, picked[part], everyone)
            at += span.length
        self._write(picked.astype(np.int32), decoded)

    def _write(self, rows: npt.NDArray[np.int32], decoded: npt.NDArray[np.bool_]) -> None:
        """Hand the step to the tables, unless they hold just it, as in steady decoding.

        What the last step had behind this one's end is nothing again.
        """
        before = self._last.size
        if before == rows.size and np.array_equal(self._last, rows) and np.array_equal(self._decoded, decoded):
            return
        room = max(rows.size, before)
        padded = np.zeros(room, np.int32), np.zeros(room, np.bool_)
        padded[0][: rows.size], padded[1][: rows.size] = rows, decoded
        self._registry.set_tokens(*padded)
        self._last, self._decoded = rows, decoded
