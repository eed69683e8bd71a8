"""`PackedPart`: rows of many requests in one safetensors file, block by block, in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steer_compile.capture.atomic import Temporary, publish_pair
from steer_compile.capture.block import LABELS, Block, row_bytes
from steer_compile.capture.codec import ALIGNMENT, Layout, dtype_name, raw
from steer_compile.capture.parts import Part, Signature
from steer_compile.capture.rows import Rows

FORMAT, VERSION = "steer_compile.rows", 1
MOST_BLOCKS = 512
BLOCK_BYTES = 16 << 20
_ENTRY_BYTES = 192
"""Room for one tensor in a header beside its name."""


def site_info(signature: Signature) -> dict[str, Any]:
    """What a sidecar says of the values."""
    return {key: {"dtype": dtype_name(dtype, key), "row_shape": list(shape)} for key, dtype, shape in signature}


class PackedPart(Part):
    """One file. Rows are collected in a block's buffers and written when these are full.

    As long as a file has one block its header is as long as it has to be. When a second one comes, room for
    `MOST_BLOCKS` of them is left in front, and filled up with spaces in the end.

    Args:
        names: stems for the file, to try one after the other.
        info: what the sidecar holds beside what the part knows.
        most: bytes of rows after which the part is full.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], signature: Signature, policy: str, info: Mapping[str, Any], most: int
    ) -> None:
        self._folder, self._names, self._policy = folder, names, policy
        self._signature, self._info = signature, info
        row = row_bytes(signature)
        self._block = Block(signature, max(1, min(BLOCK_BYTES, most) // row))
        blocks = min(MOST_BLOCKS, -(-max(1, most // row) // self._block.size))
        self._most = min(max(1, most // row), blocks * self._block.size)
        entries = sum(len(key) + _ENTRY_BYTES for key in (*LABELS, "pad", *(key for key, _, _ in signature)))
        room = 4096 + blocks * entries
        self._room = room + -room % ALIGNMENT
        self._rows = 0
        self._blocks: list[int] = []
        self._layout = Layout()
        self._file = Temporary(folder)

    def append(self, rows: Rows, request: Tensor, first: int) -> int:
        stop = min(len(rows), first + self._most - self._rows)
        self._rows += stop - first
        while first < stop:
            if self._block.full:
                if not self._blocks:
                    self._file.skip(self._room)
                self._write()
            first = self._block.take(rows, request, first, stop)
        return stop

    def _place(self) -> list[Any]:
        """Enter the block's tensors in the layout; returns the bytes to write."""
        parts: list[Any] = []
        for name, tensor in self._block.tensors().items():
            name = f"b{len(self._blocks)}.{name}"
            self._layout.add(name, tensor.dtype, tuple(tensor.shape))
            parts.append(raw(tensor))
        parts.append(self._layout.padding(f"b{len(self._blocks)}.pad"))
        return parts

    def _write(self) -> None:
        self._file.write(*self._place())
        self._blocks.append(self._block.filled)
        self._block.clear()

    def seal(self, requests: Sequence[Mapping[str, Any]]) -> str:
        texts = {"format": FORMAT, "version": str(VERSION)}
        if self._blocks:
            self._write()
            self._file.write_at(0, self._layout.header(texts, self._room))
        else:
            parts = self._place()
            self._file.write(self._layout.header(texts), *parts)
            self._blocks.append(self._block.filled)
        info = {
            "format": FORMAT, "version": VERSION, **self._info, "rows": self._rows, "blocks": self._blocks,
            "sites": site_info(self._signature), "requests": list(requests),
        }  # fmt: skip
        try:
            return str(publish_pair(self._file, self._folder, self._names, info, self._policy, ".safetensors"))
        finally:
            self._file.discard()

    def discard(self) -> None:
        self._file.discard()
