"""`Spill`: rows that wait on the disk, in files of their own that are read back once and removed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from steer_compile.capture.atomic import made_folder
from steer_compile.capture.codec import Layout, Mapped, raw
from steer_compile.capture.rows import Rows

_OWN = re.compile(r"\.steer-compile-spill-[0-9a-f]{32}")
_LEAST = 4096
_LABELS = ("request", "positions", "token_ids", "steps")


class Spilled(NamedTuple):
    """Rows in a file: of whom they are, how many, and the bytes that they count for."""

    path: Path
    requests: tuple[str, ...]
    counts: tuple[int, ...]
    nbytes: int

    @property
    def rows(self) -> int:
        return sum(self.counts)


class Spill:
    """A folder for the files of this process, below one that processes share. Thread-safe.

    Folders that killed processes left are removed: a running process holds a lock on its own.

    Args:
        most: most bytes of all files.

    Raises:
        CaptureError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._most, self._used, self._number = most, 0, 0
        self._lock = threading.Lock()
        self._folder = made_folder(folder) / f".steer-compile-spill-{uuid.uuid4().hex}"
        for other in folder.iterdir():
            if _OWN.fullmatch(other.name):
                _remove_stale(other)
        self._folder.mkdir()
        self._held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def used(self) -> int:
        """Bytes of files."""
        return self._used

    def write(self, rows: Rows) -> Spilled | None:
        """Put rows into a file; None where they find no room within the cap.

        Raises:
            OSError: the disk is full or fails; nothing of the file stays.
        """
        size = max(rows.nbytes, _LEAST)
        with self._lock:
            if self._used + size > self._most:
                return None
            self._used += size
            self._number += 1
            path = self._folder / f"{self._number}.safetensors"
        layout = Layout()
        parts: list[Any] = []
        labels = dict(zip(_LABELS, (rows.request, rows.positions, rows.token_ids, rows.steps), strict=True))
        named = [*labels.items(), *((f"values.{key}", value) for key, value in rows.values.items())]
        for name, tensor in named:
            layout.add(name, tensor.dtype, tuple(tensor.shape))
            parts += [raw(tensor), layout.padding(f"pad.{name}")]
        try:
            with path.open("xb", buffering=0) as file:
                for part in (layout.header({"requests": json.dumps(rows.requests)}), *parts):
                    view = memoryview(part).cast("B")
                    while view.nbytes:
                        view = view[os.write(file.fileno(), view) :]
        except OSError:
            path.unlink(missing_ok=True)
            with self._lock:
                self._used -= size
            raise
        counts = tuple(rows.request.bincount(minlength=len(rows.requests)).tolist())
        return Spilled(path, rows.requests, counts, size)

    def read(self, spilled: Spilled) -> Rows:
        """The rows again; the file is removed.

        Raises:
            CaptureError: the file is gone or damaged.
        """
        try:
            file = Mapped(spilled.path)
            request, positions, token_ids, steps = (file.tensor(name).clone() for name in _LABELS)
            names = [name for name in file.entries if name.startswith("values.")]
            values = {name.removeprefix("values."): file.tensor(name).clone() for name in names}
            return Rows(spilled.requests, request, positions, token_ids, steps, values)
        finally:
            self.forget(spilled)

    def forget(self, spilled: Spilled) -> None:
        """Remove rows that nobody wants any more."""
        spilled.path.unlink(missing_ok=True)
        with self._lock:
            self._used -= spilled.nbytes

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._held)


def _remove_stale(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # another process was faster, or it is no folder
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # its process runs
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
