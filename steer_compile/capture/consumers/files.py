"""``files``: safetensors files with JSON sidecars, one for each request, or for the requests of a tag together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_compile.capture.atomic import Temporary, made_folder, publish_pair, sweep
from steer_compile.capture.codec import Layout, raw
from steer_compile.capture.consumer import Began, Consumer, Ended
from steer_compile.capture.names import Numbers, Stems, checked_policy, in_order, slug
from steer_compile.capture.packed import FORMAT, VERSION, PackedPart, site_info
from steer_compile.capture.parting import parted
from steer_compile.capture.parts import Part, Parts, Signature, signature_of
from steer_compile.capture.rows import Rows, joined
from steer_compile.errors import CaptureError

LAYOUTS = ("per_file", "packed", "sharded")
_ENDLESS = 1 << 62


def files(
    root: str | Path,
    layout: str = "per_file",
    collisions: str = "suffix",
    shard_bytes: int = 256 << 20,
    max_bytes: int = 1 << 30,
    rank: int = 0,
) -> Consumer:
    """A consumer that writes below a folder.

    Args:
        root: the folder; made where it is missing. Temporary files that killed processes left there are removed.
        layout: ``per_file``: ``<tag>/<request>.safetensors`` for each request. ``packed``: ``<tag>.safetensors`` with
            the requests of a tag until `flush` or `close`. ``sharded``: ``<tag>-00000.safetensors`` and so on, each
            sealed at ``shard_bytes``.
        collisions: where a name is taken: ``error``, ``suffix`` (another name) or ``replace``.
        shard_bytes: bytes of rows of a shard.
        max_bytes: with ``per_file``, bytes of rows of requests that have not ended; the request that goes beyond fails.
        rank: of the process, where several write the same requests; it is part of the names unless it is 0.

    Raises:
        CaptureError: an unknown layout or policy, sizes below one, or a root that cannot be written.
    """
    if layout not in LAYOUTS:
        raise CaptureError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if min(shard_bytes, max_bytes) < 1:
        raise CaptureError(f"shard_bytes={shard_bytes} and max_bytes={max_bytes} are sizes; give numbers above 0")
    checked_policy(collisions)
    folder = made_folder(Path(root))
    sweep(folder)
    if layout == "per_file":
        return PerFile(folder, collisions, max_bytes, rank)
    return PackedFiles(folder, collisions, shard_bytes if layout == "sharded" else None, rank)


def _ranked(stem: str, rank: int) -> str:
    return f"{stem}-r{rank}" if rank else stem


class PackedFiles(Parts):
    """Files of the requests of a tag; ``shard_bytes`` is None for one file, else for shards of that size."""

    def __init__(self, root: Path, collisions: str, shard_bytes: int | None, rank: int) -> None:
        super().__init__(self._part)
        self._root, self._collisions, self._shard_bytes, self._rank = root, collisions, shard_bytes, rank
        self._stems, self._numbers = Stems(collisions), Numbers(collisions)

    def _part(self, tag: str, signature: Signature) -> Part:
        stem = _ranked(slug(tag) if tag else "rows", self._rank)
        sharded = self._shard_bytes is not None
        info = {"layout": "sharded" if sharded else "packed", "rank": self._rank, "tag": tag}
        names = self._numbers.of(stem, lambda: self._behind(stem)) if sharded else self._stems.of(stem)
        most = self._shard_bytes if self._shard_bytes is not None else _ENDLESS
        return PackedPart(self._root, names, signature, self._collisions, info, most)

    def _behind(self, stem: str) -> int:
        """Number of the first shard: with ``suffix`` the one behind those on the disk."""
        there = self._root.glob(f"{stem}-*.json") if self._collisions == "suffix" else ()
        return max((in_order(path)[2] for path in there if in_order(path)[1] == stem), default=-1) + 1


class PerFile(Consumer):
    """A file for each request, written when it has ended; until then its rows are in memory."""

    def __init__(self, root: Path, collisions: str, max_bytes: int, rank: int) -> None:
        self._root, self._collisions, self._most, self._rank = root, collisions, max_bytes, rank
        self._stems = Stems(collisions)
        self._live: dict[str, list[Rows]] = {}
        self._failed: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._used = 0

    def began(self, begun: Began) -> None:
        self._live[begun.request], self._sizes[begun.request] = [], 0

    def rows(self, rows: Rows) -> None:
        for part in parted(rows):
            (name,) = part.requests
            if name in self._failed:
                continue
            if self._used + part.nbytes > self._most:
                self.forget(name)
                text = f"the rows of open requests are more than max_bytes={self._most}"
                self._failed[name] = f"{text}; raise it, or use layout='sharded', which holds none"
            else:
                self._live[name].append(part)
                self._sizes[name] += part.nbytes
                self._used += part.nbytes

    def ended(self, end: Ended) -> str:
        parts = self._live.get(end.request, [])
        failed = self._failed.get(end.request)
        self.forget(end.request)
        if failed is not None:
            raise CaptureError(failed)
        return str(self._write(end, joined(parts))) if parts else ""

    def forget(self, request: str) -> None:
        self._live.pop(request, None)
        self._used -= self._sizes.pop(request, 0)
        self._failed.pop(request, None)

    def _write(self, end: Ended, rows: Rows) -> Path:
        folder = made_folder(self._root / slug(end.tag)) if end.tag else self._root
        layout = Layout()
        labels = {"positions": rows.positions, "token_ids": rows.token_ids, "steps": rows.steps}
        parts: list[Any] = []
        for name, tensor in (*labels.items(), *sorted(rows.values.items())):
            layout.add(name, tensor.dtype, tuple(tensor.shape))
            parts += [raw(tensor), layout.padding(f"{name}.pad")]
        request = {
            "request": end.request, "tag": end.tag, "model": end.meta.model, "spec": end.meta.spec,
            "prompt_length": end.meta.prompt_length, "rows": len(rows), "ended": True, "dropped": end.dropped,
        }  # fmt: skip
        info = {
            "format": FORMAT, "version": VERSION, "layout": "per_file", "rank": self._rank, "tag": end.tag,
            "rows": len(rows), "sites": site_info(signature_of(rows)), "requests": [request],
            **{name: tensor.tolist() for name, tensor in labels.items()},
        }  # fmt: skip
        file = Temporary(folder)
        try:
            file.write(layout.header({"format": FORMAT, "version": str(VERSION)}), *parts)
            names = self._stems.of(_ranked(slug(end.request), self._rank), folder.name)
            return publish_pair(file, folder, names, info, self._collisions, ".safetensors")
        finally:
            file.discard()
