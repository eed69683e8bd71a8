"""`Captures`: what the tables hold after a forward, kept for the requests that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey, TokenSelection

EVERYTHING = TokenSelection(((None, None),), generated=True)
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CaptureRequest:
    """What one request wants kept: the values of some sites at some of its tokens, in a file of a name."""

    name: str
    sites: tuple[SiteKey, ...]
    tokens: TokenSelection = EVERYTHING

    def to_data(self) -> list[Any]:
        """Plain data that crosses processes."""
        spans = [list(span) for span in self.tokens.spans]
        return [
            self.name, [list(site) for site in self.sites], spans, self.tokens.last_prompt, self.tokens.generated,
        ]  # fmt: skip

    @classmethod
    def of_data(cls, data: Sequence[Any]) -> CaptureRequest:
        """The request of `to_data`."""
        name, sites, spans, last_prompt, generated = data
        tokens = TokenSelection(tuple(tuple(span) for span in spans), last_prompt, generated)
        return cls(name, tuple((hook, layer) for hook, layer in sites), tokens)


@dataclass
class Chunk:
    """Rows of one step on the CPU, once ``ready`` has passed: positions and token ids of all, and of each site the
    values of those that asked for it. It is in memory until the last of its ``holders`` has let it go."""

    positions: Tensor
    token_ids: Tensor
    values: dict[SiteKey, Tensor]
    ready: torch.cuda.Event | None
    size: int
    holders: int

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


@dataclass(frozen=True)
class Part:
    """Where the rows of a request are in a chunk: in its positions and ids, and in the values of each site."""

    chunk: Chunk
    rows: slice
    values: dict[SiteKey, slice]


@dataclass
class Kept:
    """The rows of one request so far, and how many found no room."""

    request: str
    asked: CaptureRequest
    prompt: int = 0
    parts: list[Part] = field(default_factory=list)
    dropped: int = 0


class Room:
    """Bytes of captured rows in memory, those on their way to a file included."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which are then taken."""
        with self._lock:
            fits = self._used + size <= self._most
            self._used += size if fits else 0
            return fits

    def let_go(self, kept: Kept) -> None:
        """A request needs its rows no more; a chunk that nobody needs gives its bytes back."""
        with self._lock:
            for part in kept.parts:
                part.chunk.holders -= 1
                self._used -= 0 if part.chunk.holders else part.chunk.size
        kept.parts.clear()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used


class Captures:
    """Rows by request. `plan` says before a forward which of its tokens are kept, `collect` copies them after it."""

    def __init__(self, tables: TableSet, room: Room) -> None:
        self._banks = {bank.sites[0]: t[0] for bank, t in zip(tables.banks, tables.tensors, strict=True) if _is(bank)}
        self._room = room
        self._live: dict[str, Kept] = {}
        self._planned: list[tuple[Kept, npt.NDArray[np.int64]]] = []

    def __bool__(self) -> bool:
        return bool(self._live)

    def begin(self, request: str, asked: CaptureRequest) -> None:
        """A request begins or goes on; what it has so far stays, as after a preemption."""
        if request not in self._live:
            self._live[request] = Kept(request, asked)

    def finish(self, requests: Iterable[str]) -> list[Kept]:
        """What the finished ones among requests have."""
        return [self._live.pop(request) for request in requests if request in self._live]

    def plan(self, requests: Sequence[str], starts: Numbers, counts: Numbers, prompts: Numbers) -> None:
        """Choose tokens of the step that comes; arguments as in `RequestRows.step`."""
        self._planned = []
        firsts = np.cumsum(counts) - counts
        for i, request in enumerate(requests):
            kept = self._live.get(request)
            if kept is None:
                continue
            kept.prompt = int(prompts[i])
            chosen = np.flatnonzero(kept.asked.tokens.mask(int(starts[i]), int(counts[i]), kept.prompt))
            if chosen.size:
                self._planned.append((kept, chosen + int(firsts[i])))

    def collect(self, token_ids: Tensor, positions: Tensor) -> None:
        """Copy the chosen tokens' rows, behind the forward on its stream.

        Args:
            token_ids, positions: of the step's tokens (T,) on the device.
        """
        planned, self._planned = self._planned, []
        taken = [(kept, rows) for kept, rows in planned if self._fits(kept, rows.size)]
        if not taken:
            return
        device = token_ids.device
        index = _to(np.concatenate([rows for _, rows in taken]), device)
        values, places = self._values(taken, device)
        ids, positions = (_to_host(t.index_select(0, index)) for t in (token_ids, positions))
        ready = None
        if token_ids.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        size = sum(self._size(kept, rows.size) for kept, rows in taken)
        chunk, at = Chunk(positions, ids, values, ready, size, len(taken)), 0
        for (kept, rows), where in zip(taken, places, strict=True):
            kept.parts.append(Part(chunk, slice(at, at + rows.size), where))
            at += rows.size

    def _values(
        self, taken: Sequence[tuple[Kept, npt.NDArray[np.int64]]], device: torch.device
    ) -> tuple[dict[SiteKey, Tensor], list[dict[SiteKey, slice]]]:
        """Copies of each site's rows, one copy for all that asked for it, and where those of each request are."""
        by_site: dict[SiteKey, list[int]] = {}
        for i, (kept, _) in enumerate(taken):
            for site in kept.asked.sites:
                by_site.setdefault(site, []).append(i)
        indices: dict[tuple[int, ...], Tensor] = {}
        values, places = {}, [dict[SiteKey, slice]() for _ in taken]
        for site, wanted in by_site.items():
            key, at = tuple(wanted), 0
            if key not in indices:
                indices[key] = _to(np.concatenate([taken[i][1] for i in wanted]), device)
            values[site] = _to_host(self._banks[site].index_select(0, indices[key]))
            for i in wanted:
                places[i][site] = slice(at, at + taken[i][1].size)
                at += taken[i][1].size
        return values, places

    def _size(self, kept: Kept, rows: int) -> int:
        return rows * sum(self._banks[s].size(1) * self._banks[s].element_size() for s in kept.asked.sites)

    def _fits(self, kept: Kept, rows: int) -> bool:
        if self._room.take(self._size(kept, rows)):
            return True
        kept.dropped += rows
        return False


def _is(bank: Any) -> bool:
    return bool(bank.kind == "capture")


def _to(rows: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU that is there once the stream has come so far."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def joined(kept: Kept) -> Mapping[str, Tensor]:
    """The rows of a request in the order of their positions; of a position that was computed twice, the later ones."""
    for part in kept.parts:
        part.chunk.wait()
    places = _cat([part.chunk.positions[part.rows] for part in kept.parts], torch.int64)
    latest = {int(place): i for i, place in enumerate(places.tolist())}
    order = torch.tensor([latest[place] for place in sorted(latest)], dtype=torch.int64)
    ids = _cat([part.chunk.token_ids[part.rows] for part in kept.parts], torch.int64)
    found = {"positions": places[order], "token_ids": ids[order]}
    for site in kept.asked.sites:
        rows = [part.chunk.values[site][part.values[site]] for part in kept.parts]
        found[f"layers.{site[1]}.{site[0]}"] = torch.cat(rows)[order] if rows else torch.zeros(0)
    return found


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)
