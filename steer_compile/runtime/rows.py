"""Rows: which row of the tables each token reads. Pure bookkeeping, no tensors on a device.

Row 0 is zeros, row 1 the global prefill tier, row 2 the global decode tier, then one row for each distinct
(phase, content) of the live requests, shared by reference count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steer_compile.errors import NotSteered, TableFull
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.spec import RESERVED_ROWS

GLOBAL_ROWS = {"prefill": 1, "decode": 2}
RowKey = tuple[str, str]


class RowAllocator:
    """Request rows, reference-counted by key ``(phase, digest)``. Strict: never more rows than ``capacity``."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: dict[RowKey, int] = {}
        self._counts: dict[RowKey, int] = {}
        self._free = list(range(RESERVED_ROWS + capacity - 1, RESERVED_ROWS - 1, -1))

    @property
    def in_use(self) -> int:
        return len(self._rows)

    def acquire(self, keys: Sequence[RowKey]) -> dict[RowKey, tuple[int, bool]]:
        """Rows of ``keys`` and whether each is new; all of them or none.

        Raises:
            TableFull: the new keys need more rows than are free.
        """
        unique = list(dict.fromkeys(keys))
        new = [k for k in unique if k not in self._rows]
        if len(new) > len(self._free):
            raise TableFull(
                f"no row for a new steering configuration: {self.in_use} of {self.capacity} rows are in use and "
                f"{len(new)} more are needed (one for each phase); release a handle or raise rows in the spec"
            )
        for key in new:
            self._rows[key] = self._free.pop()
        for key in unique:
            self._counts[key] = self._counts.get(key, 0) + 1
        return {key: (self._rows[key], key in new) for key in unique}

    def release(self, keys: Sequence[RowKey]) -> None:
        """Give one reference of each key back; a row without references is free again."""
        for key in dict.fromkeys(keys):
            self._counts[key] -= 1
            if self._counts[key] == 0:
                del self._counts[key]
                self._free.append(self._rows.pop(key))

    def row(self, key: RowKey) -> int:
        return self._rows[key]

    def live(self) -> dict[RowKey, int]:
        """Rows in use by key."""
        return dict(self._rows)


@dataclass(frozen=True)
class RowPlan:
    """Rows of one batch element: its row in each phase (0 for none of its own) and the tokens that use it."""

    rows: tuple[int, int] = (0, 0)
    tokens: TokenSelection | None = None

    def row(self, phase: str) -> int:
        return self.rows[0 if phase == "prefill" else 1] or GLOBAL_ROWS[phase]


@dataclass(frozen=True)
class Step:
    """One call of the model: ``length`` tokens of each of ``batch`` sequences.

    Attributes:
        start: position of the first token of the call in the padded sequence.
        prompts: prompt length of each element, padding excluded.
        pads: padding of each element in front of the call's tokens.
        padded: length of the prompts with padding on either side.
    """

    batch: int
    length: int
    phase: str
    start: int
    prompts: tuple[int, ...]
    pads: tuple[int, ...]
    padded: int = 0

    def span(self, element: int) -> tuple[int, int, int]:
        """Position of an element's first token in this call, and the span of positions that are no padding."""
        prompt, pad = self.prompts[element], self.pads[element]
        if self.phase == "decode":
            first = self.start - max(pad, self.padded - prompt)
            return first, max(first, 0), first + self.length
        first = self.start - pad
        return first, max(first, 0), max(0, min(first + self.length, prompt))


def token_rows(step: Step, plans: Sequence[RowPlan]) -> npt.NDArray[np.int32]:
    """Row of every token of the call, ``(batch, length)``; padding reads row 0."""
    rows = np.empty((step.batch, step.length), np.int32)
    for b, plan in enumerate(plans):
        rows[b] = plan.row(step.phase)
        first = step.start - step.pads[b]
        if plan.tokens is not None:
            rows[b, ~plan.tokens.mask(first, step.length, step.prompts[b])] = GLOBAL_ROWS[step.phase]
        if first < 0:
            rows[b, : min(-first, step.length)] = 0
        if step.phase == "prefill":
            rows[b, max(0, step.prompts[b] - first) :] = 0
    return rows


def real_tokens(step: Step, element: int) -> tuple[range, int]:
    """Which of a call's tokens of an element are no padding, and the position of the first of them."""
    first = step.start - step.pads[element]
    begin = min(max(0, -first), step.length)
    end = min(step.length, max(begin, step.prompts[element] - first)) if step.phase == "prefill" else step.length
    return range(begin, end), first + begin


@dataclass
class PhaseTracker:
    """Phase and position of each call, from its shape or as told.

    A call of more than one token starts new prompts; a call of one token goes on with decoding. The first call after
    `restart` is prefill whatever its length. ``told`` overrides the shape.
    """

    told: str | None = None
    prompts: tuple[int, ...] | None = None
    padding: str = "left"
    position: int = 0
    fresh: bool = True
    _prompt: int = field(default=0, repr=False)
    _batch: int = field(default=0, repr=False)

    def restart(self) -> None:
        self.fresh, self.position = True, 0

    def advance(self, batch: int, length: int) -> Step:
        """The step of a call with this shape.

        Raises:
            NotSteered: the prompt lengths do not fit the call.
        """
        phase = self.told or ("prefill" if self.fresh or length > 1 or batch != self._batch else "decode")
        if self.prompts is not None:
            self._check_prompts(self.prompts, batch, length if phase == "prefill" and self.told is None else None)
        start, padded = self._place(phase, length)
        prompts = self.prompts if self.prompts is not None else (padded,) * batch
        # What is generated behind a prompt that is padded on the right has that padding in front of it.
        behind = self.prompts is not None and (self.padding == "left" or phase == "decode")
        pads = tuple(padded - p for p in prompts) if behind else (0,) * batch
        self.position, self.fresh = start + length, False
        self._prompt, self._batch = padded, batch
        return Step(batch, length, phase, start, prompts, pads, padded)

    def _place(self, phase: str, length: int) -> tuple[int, int]:
        """Position of the call's first token and padded length of the prompts."""
        longest = max(self.prompts or (0,))
        if phase == "prefill":
            start = self.position if self.told and not self.fresh else 0
            return start, max(start + length, longest)
        return (longest, longest) if self.fresh else (self.position, self._prompt)

    def _check_prompts(self, prompts: tuple[int, ...], batch: int, length: int | None) -> None:
        if len(prompts) != batch:
            raise NotSteered(
                f"{len(prompts)} prompt lengths are given but the call has {batch} sequences; give one for each"
            )
        if length is not None and max(prompts, default=0) > length:
            raise NotSteered(
                f"a prompt of {max(prompts)} tokens is given but the call has {length} of each sequence; "
                "pass phase='prefill' for prompts that come in parts"
            )
