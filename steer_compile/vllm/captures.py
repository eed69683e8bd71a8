"""`Captures`: what the tables hold after a forward, kept for the requests that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.running import Mean, Running, running_of
from steer_compile.capture.selection import Selection
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey
from steer_compile.vllm.capture_gather import Gather, to_host
from steer_compile.vllm.capture_requests import CaptureRequest

Numbers = npt.NDArray[np.int32]


@dataclass
class Chunk:
    """Rows of one step on the CPU, once ``ready`` has passed, of requests that asked for the same: positions, token
    ids, and the values of each key. It is in memory until the last of its ``holders`` has let it go."""

    positions: Tensor
    token_ids: Tensor
    values: dict[str, Tensor]
    step: int
    size: int
    holders: int
    ready: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class Part(NamedTuple):
    """Where the rows of a request are in a chunk."""

    chunk: Chunk
    rows: slice


@dataclass
class Kept:
    """The rows of one request so far, and how many found no room.

    Attributes:
        sites: those of the asked ones that this process has.
        running: what is kept on the device until the request ends, None where rows are; ``reserved`` bytes are for it.
        seen: positions below this one are in ``running``: a preempted request computes some again.
    """

    request: str
    asked: CaptureRequest
    sites: tuple[SiteKey, ...] = ()
    prompt: int = 0
    parts: list[Part] = field(default_factory=list)
    dropped: int = 0
    running: Running | None = None
    reserved: int = 0
    seen: int = 0


Rows: TypeAlias = npt.NDArray[np.int64]
Planned: TypeAlias = tuple[Kept, Rows]
Alike: TypeAlias = tuple[tuple[SiteKey, ...], Reduction, bool]
"""What requests have in common whose rows are copied together: sites, what is kept, and whether it is rows."""


class Room:
    """Bytes of captured rows in memory, those on their way to a file included."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._lock = threading.Lock()

    def take(self, sizes: Sequence[int]) -> list[bool]:
        """Whether there is room for each of so many bytes more, which are then taken."""
        found = []
        with self._lock:
            for size in sizes:
                found.append(self._used + size <= self._most)
                self._used += size if found[-1] else 0
        return found

    def let_go(self, kept: Kept) -> None:
        """A request needs its rows no more; a chunk that nobody needs gives its bytes back."""
        with self._lock:
            for part in kept.parts:
                part.chunk.holders -= 1
                self._used -= 0 if part.chunk.holders else part.chunk.size
            self._used -= kept.reserved
        kept.parts.clear()
        kept.reserved = 0

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used


class Captures:
    """Rows by request. `plan` says before a forward which of its tokens are kept, `collect` copies them after it.

    A request is *open* while rows of it may still come: one that wants prompt tokens alone costs nothing in decoding.
    """

    def __init__(self, tables: TableSet, room: Room) -> None:
        self._gather = Gather(tables)
        self._room = room
        self._live: dict[str, Kept] = {}
        self._open: dict[str, Kept] = {}
        self._planned: dict[Alike, list[Planned]] = {}
        self._step = 0

    @property
    def expecting(self) -> bool:
        """Whether any request is open."""
        return bool(self._open)

    def begin(self, request: str, asked: CaptureRequest) -> None:
        """A request begins or goes on; what it has so far stays, as after a preemption."""
        if request not in self._live:
            self._live[request] = self._kept(request, asked)
        self._open[request] = self._live[request]

    def _kept(self, request: str, asked: CaptureRequest) -> Kept:
        kept = Kept(request, asked, self._gather.own(asked.sites))
        top = asked.tokens.top
        if top is None and not asked.keep.mean:
            return kept
        size = self._gather.row_bytes(kept.sites, Reduction() if top is not None else asked.keep)
        size *= top.count if top is not None else 1
        if self._room.take([size])[0]:
            kept.reserved, kept.running = size, running_of(asked.keep, top, self._gather.device)
        return kept

    def finish(self, requests: Iterable[str]) -> list[Kept]:
        """What the finished ones among requests have."""
        ended = [request for request in requests if request in self._live]
        for request in ended:
            self._open.pop(request, None)
        found = [self._live.pop(request) for request in ended]
        chunks = [chunk for kept in found if (chunk := self._result(kept)) is not None]
        _record(chunks, self._gather.device)
        return found

    def _result(self, kept: Kept) -> Chunk | None:
        """What was kept on the device, on its way to the CPU in a chunk of its own."""
        if kept.running is None:
            return None
        positions, ids, values = kept.running.result()
        if not positions.numel():
            return None
        made = self._gather.reduced(kept.asked.keep, values)
        if isinstance(kept.running, Mean):
            made["tokens"] = torch.tensor([kept.running.count])
        chunk = Chunk(to_host(positions), to_host(ids), made, self._step, kept.reserved, 1)
        kept.parts.append(Part(chunk, slice(0, positions.numel())))
        kept.reserved, kept.running = 0, None
        return chunk

    def plan(self, requests: Sequence[str], starts: Numbers, counts: Numbers, prompts: Numbers, step: int = 0) -> None:
        """Choose tokens of the step that comes; arguments as in `RequestRows.step`, and the step's number."""
        self._planned, self._step = {}, step
        first = 0
        for request, start, count, prompt in zip(
            requests, starts.tolist(), counts.tolist(), prompts.tolist(), strict=True
        ):
            kept = self._open.get(request)
            if kept is not None and count:
                kept.prompt = prompt
                rows = chosen(kept.asked.tokens, start, count, prompt)
                whole = kept.asked.tokens.top is not None or kept.asked.keep.mean
                if whole:
                    rows, kept.seen = rows[rows + start >= kept.seen], max(kept.seen, start + count)
                if len(rows):
                    alike = kept.sites, kept.asked.keep, whole
                    self._planned.setdefault(alike, []).append((kept, rows + first))
                if not kept.asked.tokens.may_choose(start + count, prompt):
                    del self._open[request]
            first += count

    def collect(self, token_ids: Tensor, positions: Tensor) -> None:
        """Copy the chosen tokens' rows, behind the forward on its stream.

        Args:
            token_ids, positions: of the step's tokens (T,) on the device.
        """
        planned, self._planned = self._planned, {}
        chunks = []
        for (sites, keep, whole), each in planned.items():
            if whole:
                self._run(sites, each, token_ids, positions)
            elif (chunk := self._chunk(sites, keep, each, token_ids, positions)) is not None:
                chunks.append(chunk)
        _record(chunks, token_ids.device)

    def _run(
        self, sites: tuple[SiteKey, ...], planned: Sequence[Planned], token_ids: Tensor, positions: Tensor
    ) -> None:
        """Add tokens to what requests keep on the device."""
        for kept, rows in planned:
            kept.dropped += len(rows) if kept.running is None else 0
        taken = [each for each in planned if each[0].running is not None]
        if not taken:
            return
        index = _to(np.concatenate([rows for _, rows in taken]), token_ids.device)
        places, ids = positions.index_select(0, index), token_ids.index_select(0, index)
        blocks = self._gather.blocks(sites, index)
        for (kept, _), part in zip(taken, _slices(taken), strict=True):
            values: dict[Any, Tensor] = {group: block[:, part] for group, block in blocks.items()}
            if kept.asked.tokens.top is not None:
                values = {s: v for group, block in values.items() for s, v in zip(group, block, strict=True)}
            assert kept.running is not None
            kept.running.add(places[part], ids[part], values)

    def _chunk(
        self,
        sites: tuple[SiteKey, ...],
        keep: Reduction,
        planned: Sequence[Planned],
        token_ids: Tensor,
        positions: Tensor,
    ) -> Chunk | None:
        """The rows of requests that asked for the same, None where there is no room for any."""
        row = self._gather.row_bytes(sites, keep)
        fits = self._room.take([row * len(rows) for _, rows in planned])
        for (kept, rows), there in zip(planned, fits, strict=True):
            kept.dropped += 0 if there else len(rows)
        taken = [each for each, there in zip(planned, fits, strict=True) if there]
        if not taken:
            return None
        index = _to(np.concatenate([rows for _, rows in taken]), token_ids.device)
        places, ids = (to_host(t.index_select(0, index)) for t in (positions, token_ids))
        values = self._gather.reduced(keep, self._gather.blocks(sites, index))
        chunk = Chunk(places, ids, values, self._step, row * index.numel(), len(taken))
        for (kept, _), part in zip(taken, _slices(taken), strict=True):
            kept.parts.append(Part(chunk, part))
        return chunk


def chosen(tokens: Selection, start: int, count: int, prompt: int) -> Rows:
    """Which of a step's tokens of a request are kept, by their place among them."""
    if start >= prompt and tokens.every == 1 and not tokens.positions:
        return np.arange(count if tokens.tokens is not None and tokens.tokens.generated else 0)
    return np.flatnonzero(tokens.candidates(start, count, prompt))


def _slices(planned: Sequence[Planned]) -> Iterable[slice]:
    at = 0
    for _, rows in planned:
        yield slice(at, at + len(rows))
        at += len(rows)


def _record(chunks: Sequence[Chunk], device: torch.device) -> None:
    if device.type == "cuda" and chunks:
        ready = torch.cuda.Event()
        ready.record()
        for chunk in chunks:
            chunk.ready = ready


def _to(rows: Rows, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def joined(kept: Kept) -> Mapping[str, Tensor]:
    """The rows of a request in the order of their positions; of a position that was computed twice, the later ones."""
    for part in kept.parts:
        part.chunk.wait()
    places = _cat([part.chunk.positions[part.rows] for part in kept.parts], torch.int64)
    _, last = np.unique(places.numpy()[::-1], return_index=True)
    order = torch.from_numpy(places.numel() - 1 - last)
    ids = _cat([part.chunk.token_ids[part.rows] for part in kept.parts], torch.int64)
    steps = _cat(
        [torch.full_like(part.chunk.positions[part.rows], part.chunk.step) for part in kept.parts], torch.int64
    )
    found = {"positions": places[order], "token_ids": ids[order], "steps": steps[order]}
    whole = torch.equal(order, torch.arange(places.numel()))
    keys = [key for site in kept.sites for key in kept.asked.keep.keys(site)] + ["tokens"] * kept.asked.keep.mean
    for key in keys:
        rows = _cat([part.chunk.values[key][part.rows] for part in kept.parts], None)
        found[key] = rows if whole or not kept.parts else rows[order]
    return found


def _cat(parts: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    joint = torch.cat(parts) if parts else torch.zeros(0)
    return joint if dtype is None else joint.to(dtype)
