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
from steer_compile.vllm.lines import Lines
from steer_compile.vllm.requests import KEY
from steer_compile.vllm.transport import received

Numbers = npt.NDArray[np.int32]
_EVERYONE = (GLOBAL_ROWS["prefill"], GLOBAL_ROWS["decode"])


@dataclass(frozen=True)
class _Live:
    """A request with a slot; without a handle it has nothing of its own, and is routed elsewhere while it decodes."""

    slot: int
    handle: Handle | None

    @property
    def rows(self) -> tuple[int, int]:
        """Its own rows of prompt tokens and of decoded ones."""
        if self.handle is None:
            return _EVERYONE
        plan = self.handle.plan
        prefill, decode = (plan.row(phase) for phase in PHASES)
        return prefill, decode if plan.tokens is None or plan.tokens.generated else GLOBAL_ROWS["decode"]


class RequestRows:
    """Rows of the live requests of one process. Every rank makes the same ones, as they see the same steps.

    The rows of a request's two phases lie in a slot of an array, so that a step is a few operations on arrays however
    many requests and configurations it has. Slot 0 is of the requests that ask for nothing.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._live: dict[str, _Live] = {}
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._rows = np.array([_EVERYONE], np.int32)
        self._chosen: dict[int, TokenSelection] = {}
        self._lines = Lines(registry.tables)
        self._last, self._decoded, self._of_lines = np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.int32)
        self._gain = registry.sites.gain

    @property
    def live(self) -> int:
        """Requests that hold rows."""
        return sum(live.handle is not None for live in self._live.values())

    def set_everyone(self, everyone: Mapping[str, Contents]) -> None:
        """Replace what every request gets beside its own."""
        self.registry.adopt_global(everyone)

    def state(self) -> dict[str, int]:
        """Requests with rows of their own, rows in use, and rows in all."""
        rows = self.registry.tables.spec.rows
        return {"requests": self.live, "rows_in_use": self.registry.rows_in_use, "rows": rows}

    def drop(self, requests: Iterable[str]) -> None:
        """Give the rows of requests back that finished or were preempted."""
        names = tuple(requests)
        self._lines.drop(names)
        for request in names:
            gone = self._live.pop(request, None)
            if gone is not None:
                del self._slots[request]
                self._chosen.pop(gone.slot, None)
                self._free.append(gone.slot)
                if gone.handle is not None:
                    self.registry.release(gone.handle)

    def admit(self, request: str, extra_args: Mapping[str, Any] | None) -> None:
        """Rows for a request that begins or goes on, if it asks for steering; those that it had before go back.

        Raises:
            TableFull: no free row, which the scheduler is there to prevent. TooManyTokens: no line of gates' memory.
        """
        self.drop((request,))
        if self._lines:
            self._lines.begin(request)
        if not extra_args or KEY not in extra_args:
            return
        made, tokens = received(extra_args[KEY])
        if not any(made.values()):
            return
        handle = self.registry.adopt(made, tokens)
        live = self._take(request, handle)
        if handle.plan.tokens is not None:
            self._chosen[live.slot] = handle.plan.tokens

    def _take(self, request: str, handle: Handle | None) -> _Live:
        if not self._free:
            count = len(self._rows)
            self._free = list(range(2 * count - 1, count - 1, -1))
            self._rows = np.concatenate([self._rows, np.tile(np.array(_EVERYONE, np.int32), (count, 1))])
        live = _Live(self._free.pop(), handle)
        self._rows[live.slot] = live.rows
        self._live[request], self._slots[request] = live, live.slot
        return live

    def row(self, request: str) -> int:
        """Row that decoded tokens of a request read of its own, routed or not."""
        live = self._live.get(request)
        return _EVERYONE[1] if live is None else live.rows[1]

    def route(self, request: str, row: int | None) -> None:
        """From the next step on, decoded tokens of a request read this row; None: its own. Prompt tokens never do."""
        live = self._live.get(request)
        if row is not None:
            live = live or self._take(request, None)
            self._rows[live.slot, 1] = row
        elif live is not None and live.handle is not None:
            self._rows[live.slot] = live.rows
        elif live is not None:
            del self._live[request], self._slots[request]
            self._free.append(live.slot)

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
        lines = self._lines.step(requests, starts, counts, prompts) if self._lines else None
        self._write(picked, decoded, lines)

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

    def _write(self, rows: Numbers, decoded: npt.NDArray[np.bool_], lines: Numbers | None) -> None:
        """Hand the step to the tables, unless they hold just it, as in steady decoding.

        What the last step had behind this one's end is nothing again.
        """
        before, gain = self._last.size, self.registry.sites.gain
        same = before == rows.size and np.array_equal(self._last, rows) and np.array_equal(self._decoded, decoded)
        if same and gain == self._gain and (lines is None or np.array_equal(self._of_lines, lines)):
            return
        room = max(rows.size, before)
        padded = np.zeros(room, np.int32), np.zeros(room, np.bool_)
        padded[0][: rows.size], padded[1][: rows.size] = rows, decoded
        of_lines = None
        if lines is not None:
            of_lines = np.zeros(room, np.int32)
            of_lines[: lines.size] = self._of_lines = lines
        self._send(*padded, of_lines)
        self._last, self._decoded, self._gain = rows, decoded, gain

    def _send(self, rows: Numbers, decoded: npt.NDArray[np.bool_], lines: Numbers | None) -> None:
        most = self.registry.tables.spec.max_tokens
        if rows.size > most:
            raise TooManyTokens(f"a step has {rows.size} tokens and the tables have room for {most}; report the engine")
        with torch.no_grad():
            self.registry.tables.index(rows)
            self.registry.sites.before_step(decoded, lines)
