"""`RequestRows`: which row of the tables each token of a step reads, by request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import TooManyTokens
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Handle, Registry
from steer_compile.runtime.rows import GLOBAL_ROWS
from steer_compile.runtime.vectors import PHASES, TokenSelection
from steer_compile.vllm.requests import KEY
from steer_compile.vllm.transport import received

Numbers = npt.NDArray[np.int32]
_EVERYONE = tuple(GLOBAL_ROWS[phase] for phase in PHASES)


@dataclass(frozen=True)
class _Live:
    slot: int
    handle: Handle


class RequestRows:
    """Rows of the live requests of one process. Every rank makes the same ones, as they see the same steps.

    The rows of a request's two phases lie in a slot of an array, so that a step is a few operations on arrays however
    many requests and configurations it has. Slot 0 is of the requests that ask for nothing.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._live: dict[str, _Live] = {}
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._rows = np.array([_EVERYONE], np.int32)
        self._chosen: dict[int, TokenSelection] = {}
        self._last, self._decoded = np.zeros(0, np.int32), np.zeros(0, np.bool_)

    @property
    def live(self) -> int:
        """Requests that hold rows."""
        return len(self._live)

    def set_everyone(self, everyone: Mapping[str, Contents]) -> None:
        """Replace what every request gets beside its own."""
        self._registry.adopt_global(everyone)

    def state(self) -> dict[str, int]:
        """Requests with rows of their own, rows in use, and rows in all."""
        rows = self._registry.tables.spec.rows
        return {"requests": self.live, "rows_in_use": self._registry.rows_in_use, "rows": rows}

    def drop(self, requests: Iterable[str]) -> None:
        """Give the rows of requests back that finished or were preempted."""
        for request in requests:
            gone = self._live.pop(request, None)
            if gone is not None:
                del self._slots[request]
                self._chosen.pop(gone.slot, None)
                self._free.append(gone.slot)
                self._registry.release(gone.handle)

    def admit(self, request: str, extra_args: Mapping[str, Any] | None) -> None:
        """Rows for a request that begins or goes on, if it asks for steering; those that it had before go back.

        Raises:
            TableFull: no free row, which the scheduler is there to prevent.
        """
        self.drop((request,))
        if not extra_args or KEY not in extra_args:
            return
        made, tokens = received(extra_args[KEY])
        if not any(made.values()):
            return
        handle = self._registry.adopt(made, tokens)
        if not self._free:
            count = len(self._rows)
            self._free = list(range(2 * count - 1, count - 1, -1))
            self._rows = np.concatenate([self._rows, np.tile(np.array(_EVERYONE, np.int32), (count, 1))])
        slot = self._free.pop()
        plan = handle.plan
        rows = [plan.row(phase) for phase in PHASES]
        if plan.tokens is not None:
            self._chosen[slot] = plan.tokens
            rows[1] = rows[1] if plan.tokens.generated else GLOBAL_ROWS["decode"]
        self._rows[slot] = rows
        self._live[request], self._slots[request] = _Live(slot, handle), slot

    def step(self, requests: Sequence[str], starts: Numbers, counts: Numbers, prompts: Numbers) -> None:
        """Write the row of every token, and whether it is decoded; rows behind the last token are 0.

        A token's phase is that of its position: below the prompt's length it is prefill. So a request that was
        preempted computes its generated tokens again with the rows that they had.

        Args:
            requests: in the order of the batch.
            starts: position of each request's first token in this step (N,).
            counts: its tokens in this step (N,).
            prompts: tokens of its prompt (N,).
        """
        if self._slots:
            slots = np.fromiter(map(self._slots.get, requests, repeat(0)), np.intp, len(requests))
        else:
            slots = np.zeros(len(requests), np.intp)
        if int(counts.sum()) == len(requests):  # one token each, as in decoding
            decoded = starts >= prompts
            picked = self._rows[slots, decoded.view(np.int8)]
        else:
            owner = np.repeat(np.arange(len(requests)), counts)
            ends = np.cumsum(counts)
            positions = np.arange(owner.size) + (starts - ends + counts)[owner]
            decoded = positions >= prompts[owner]
            picked = self._rows[slots[owner], decoded.view(np.int8)]
        if self._chosen:
            self._choose(picked, slots, (starts, counts, prompts))
        self._write(picked, decoded)

    def _choose(
        self, picked: npt.NDArray[np.int32], slots: npt.NDArray[np.intp], spans: tuple[Numbers, Numbers, Numbers]
    ) -> None:
        """Prompt tokens that a request does not steer read the row of everyone."""
        starts, counts, prompts = spans
        firsts = np.cumsum(counts) - counts
        for i in np.flatnonzero((slots > 0) & (starts < prompts)):
            chosen = self._chosen.get(int(slots[i]))
            if chosen is not None:
                start, prompt = int(starts[i]), int(prompts[i])
                length = min(int(counts[i]), prompt - start)
                part = picked[firsts[i] : firsts[i] + length]
                part[~chosen.mask(start, length, prompt)] = GLOBAL_ROWS["prefill"]

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
        self._send(*padded)
        self._last, self._decoded = rows, decoded

    def _send(self, rows: npt.NDArray[np.int32], decoded: npt.NDArray[np.bool_]) -> None:
        most = self._registry.tables.spec.max_tokens
        if rows.size > most:
            raise TooManyTokens(f"a step has {rows.size} tokens and the tables have room for {most}; report the engine")
        with torch.no_grad():
            self._registry.tables.index(rows)
            self._registry.sites.before_step(decoded)
