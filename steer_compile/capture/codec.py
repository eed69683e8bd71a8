"""The safetensors format, byte by byte: headers that are written behind their data, and files that stay mapped."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer_compile.errors import CaptureError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes, with ``pad`` tensors between them."""
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where its bytes are, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def to_json(self) -> dict[str, Any]:
        return {"dtype": NAMES[self.dtype], "shape": list(self.shape), "data_offsets": [self.start, self.stop]}


def dtype_name(dtype: torch.dtype, key: str) -> str:
    """How the format calls a dtype.

    Raises:
        CaptureError: it has no name for it.
    """
    if dtype not in NAMES:
        known = ", ".join(str(d).removeprefix("torch.") for d in NAMES)
        raise CaptureError(f"{key} has dtype {dtype}, which no file holds; cast it to one of {known}")
    return NAMES[dtype]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")  # numpy casts no view without bytes
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B")


class Layout:
    """Places of the tensors that follow one another in a file."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.size = 0

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """Place a tensor behind the ones before it."""
        dtype_name(dtype, name)
        entry = Entry(dtype, shape, self.size, self.size + math.prod(shape) * dtype.itemsize)
        self.entries[name], self.size = entry, entry.stop
        return entry

    def padding(self, name: str) -> bytes:
        """What fills the file up to the next aligned place, entered as a tensor: the format allows no gaps."""
        missing = -self.size % ALIGNMENT
        if missing:
            self.add(name, torch.uint8, (missing,))
        return bytes(missing)

    def header(self, metadata: Mapping[str, str], room: int | None = None) -> bytes:
        """The bytes in front of the data: length (8 bytes, little-endian) and JSON, filled up with spaces.

        Args:
            room: length of all of it, where the data are in place already; else the next aligned one.
        """
        content: dict[str, Any] = {"__metadata__": dict(metadata)}
        content |= {name: entry.to_json() for name, entry in self.entries.items()}
        text = json.dumps(content, separators=(",", ":")).encode()
        length = room if room is not None else len(text) + 8 + -(len(text) + 8) % ALIGNMENT
        if len(text) + 8 > length or length > _MOST_HEADER:
            raise CaptureError(f"a header of {len(text)} bytes finds no room; write fewer sites or blocks to a file")
        return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)


class Mapped:
    """A safetensors file that is mapped into memory: its tensors are views, and are read from the disk when used.

    Attributes:
        entries: its tensors by name.
        metadata: texts of the header.

    Raises:
        CaptureError: the file is missing, damaged or none of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CaptureError(f"{path} cannot be read: {error.strerror}; give a file that a consumer wrote") from error
        try:
            size = os.fstat(fd).st_size
            if size < 8:
                raise CaptureError(f"{path} is no safetensors file: it has {size} bytes; capture again")
            # copy-on-write, as torch takes no memory that cannot be written to; nothing reaches the file
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        self.entries, self.metadata, self._base = _parsed(path, self._map, size)

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, a view of the map.

        Raises:
            CaptureError: there is none of the name.
        """
        if name not in self.entries:
            raise CaptureError(f"{self.path} has no tensor {name!r}; it has {', '.join(self.entries)}")
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=self._base + entry.start)
        return flat.view(entry.shape)


def _parsed(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, metadata and the place where the data begin, all checked."""
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, _MOST_HEADER):
        raise CaptureError(f"{path} is damaged: its header of {length} bytes is longer than the file; capture again")
    try:
        content = json.loads(data[8 : 8 + length])
        metadata = {str(k): str(v) for k, v in content.pop("__metadata__", {}).items()}
        entries = {
            name: Entry(DTYPES[e["dtype"]], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for name, e in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaptureError(f"{path} is damaged: its header cannot be read ({error}); capture again") from error
    for name, entry in entries.items():
        wanted = math.prod(entry.shape) * entry.dtype.itemsize
        if min(entry.shape, default=0) < 0 or entry.start < 0 or entry.stop > size - 8 - length:
            raise CaptureError(f"{path} is damaged: {name} lies outside of the file; capture again")
        if entry.stop - entry.start != wanted:
            raise CaptureError(f"{path} is damaged: {name} has {entry.stop - entry.start} bytes, not {wanted}")
    return entries, metadata, 8 + length
