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
    """Rows of one step on the CPU, once ``ready`` has passed, of requests that asked for the same sites: positions,
    token ids, and the values of each site. It is in memory until the last of its ``holders`` has let it go."""

    positions: Tensor
    token_ids: Tensor
    values: dict[SiteKey, Tensor]
    ready: torch.cuda.Event | None
    size: int
    holders: int

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class Part(NamedTuple):
    """Where the rows of a request are in a chunk."""

    chunk: Chunk
    rows: slice


@dataclass
class Kept:
    """The rows of one request so far, and how many found no room."""

    request: str
    asked: CaptureRequest
    prompt: int = 0
    parts: list[Part] = field(default_factory=list)
    dropped: int = 0


Planned: TypeAlias = tuple[Kept, npt.NDArray[np.int64]]


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
        kept.parts.clear()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used


class Captures:
    """Rows by request. `plan` says before a forward which of its tokens are kept, `collect` copies them after it.

    A request is *open* while rows of it may still come: one that wants prompt tokens alone costs nothing in decoding.
    """

    def __init__(self, tables: TableSet, room: Room) -> None:
        self._banks = {bank.sites[0]: t[0] for bank, t in zip(tables.banks, tables.tensors, strict=True) if _is(bank)}
        self._room = room
        self._live: dict[str, Kept] = {}
        self._open: dict[str, Kept] = {}
        self._planned: dict[tuple[SiteKey, ...], list[Planned]] = {}

    @property
    def expecting(self) -> bool:
        """Whether any request is open."""
        return bool(self._open)

    def begin(self, request: str, asked: CaptureRequest) -> None:
        """A request begins or goes on; what it has so far stays, as after a preemption."""
        kept = self._live.setdefault(request, Kept(request, asked))
        self._open[request] = kept

    def finish(self, requests: Iterable[str]) -> list[Kept]:
        """What the finished ones among requests have."""
        ended = [request for request in requests if request in self._live]
        for request in ended:
            self._open.pop(request, None)
        return [self._live.pop(request) for request in ended]

    def plan(self, requests: Sequence[str], starts: Numbers, counts: Numbers, prompts: Numbers) -> None:
        """Choose tokens of the step that comes; arguments as in `RequestRows.step`."""
        self._planned = {}
        first = 0
        for request, start, count, prompt in zip(
            requests, starts.tolist(), counts.tolist(), prompts.tolist(), strict=True
        ):
            kept = self._open.get(request)
            if kept is not None and count:
                kept.prompt = prompt
                rows = _chosen(kept.asked.tokens, start, count, prompt)
                if len(rows):
                    self._planned.setdefault(kept.asked.sites, []).append((kept, rows + first))
                if start + count >= prompt and not kept.asked.tokens.generated:
                    del self._open[request]
            first += count

    def collect(self, token_ids: Tensor, positions: Tensor) -> None:
        """Copy the chosen tokens' rows, behind the forward on its stream.

        Args:
            token_ids, positions: of the step's tokens (T,) on the device.
        """
        planned, self._planned = self._planned, {}
        chunks = [self._chunk(sites, each, token_ids, positions) for sites, each in planned.items()]
        if token_ids.is_cuda and any(chunks):
            ready = torch.cuda.Event()
            ready.record()
            for chunk in chunks:
                if chunk is not None:
                    chunk.ready = ready

    def _chunk(
        self, sites: tuple[SiteKey, ...], planned: Sequence[Planned], token_ids: Tensor, positions: Tensor
    ) -> Chunk | None:
        """The rows of requests that asked for the same sites, None where there is no room for any."""
        row = sum(self._banks[s].size(1) * self._banks[s].element_size() for s in sites)
        fits = self._room.take([row * len(rows) for _, rows in planned])
        for (kept, rows), there in zip(planned, fits, strict=True):
            kept.dropped += 0 if there else len(rows)
        taken = [each for each, there in zip(planned, fits, strict=True) if there]
        if not taken:
            return None
        index = _to(np.concatenate([rows for _, rows in taken]), token_ids.device)
        places, ids = (_to_host(t.index_select(0, index)) for t in (positions, token_ids))
        chunk = Chunk(places, ids, self._values(sites, index), None, row * index.numel(), len(taken))
        at = 0
        for kept, rows in taken:
            kept.parts.append(Part(chunk, slice(at, at + len(rows))))
            at += len(rows)
        return chunk

    def _values(self, sites: tuple[SiteKey, ...], index: Tensor) -> dict[SiteKey, Tensor]:
        """Some rows of each site on the CPU; sites of one width and dtype cross in one copy."""
        alike: dict[tuple[int, torch.dtype], list[SiteKey]] = {}
        for site in sites:
            alike.setdefault((self._banks[site].size(1), self._banks[site].dtype), []).append(site)
        found: dict[SiteKey, Tensor] = {}
        for (width, dtype), group in alike.items():
            block = torch.empty((len(group), index.numel(), width), dtype=dtype, device=index.device)
            for i, site in enumerate(group):
                torch.index_select(self._banks[site], 0, index, out=block[i])
            found |= dict(zip(group, _to_host(block), strict=True))
        return found


def _chosen(tokens: TokenSelection, start: int, count: int, prompt: int) -> npt.NDArray[np.int64]:
    """Which of a step's tokens of a request are kept, by their place among them."""
    if start >= prompt:
        return np.arange(count if tokens.generated else 0)
    return np.flatnonzero(tokens.mask(start, count, prompt))


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
    _, last = np.unique(places.numpy()[::-1], return_index=True)
    order = torch.from_numpy(places.numel() - 1 - last)
    ids = _cat([part.chunk.token_ids[part.rows] for part in kept.parts], torch.int64)
    found = {"positions": places[order], "token_ids": ids[order]}
    whole = torch.equal(order, torch.arange(places.numel()))
    for site in kept.asked.sites:
        rows = _cat([part.chunk.values[site][part.rows] for part in kept.parts], None)
        found[f"layers.{site[1]}.{site[0]}"] = rows if whole or not kept.parts else rows[order]
    return found


def _cat(parts: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    joint = torch.cat(parts) if parts else torch.zeros(0)
    return joint if dtype is None else joint.to(dtype)
