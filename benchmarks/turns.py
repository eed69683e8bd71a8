"""Processes that build side by side and measure one at a time.

Building a model's variants keeps one core busy for minutes, and measuring wants the card alone. Each process says when
it is built, waits until all are, and then holds a lock while it measures.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, processes: int, patience: float) -> Iterator[None]:
    """Hold the card for this process.

    Args:
        folder: one for all processes.
        processes: how many share the card.
        patience: seconds after which those that are not built yet are not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"built-{os.getpid()}").touch()
    start = time.monotonic()
    while len(list(folder.glob("built-*"))) < processes and time.monotonic() - start < patience:
        time.sleep(0.5)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that takes turns."""
    parser.add_argument("--turns", type=Path, default=Path(tempfile.gettempdir()) / "steer-compile-turns")
    parser.add_argument("--processes", type=int, default=1, help="how many build side by side")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds to wait for the others")
