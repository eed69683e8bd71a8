"""Captured rows as safetensors files: a thread writes them beside the engine, and `captured` reads them.

A file holds a tensor for each site, named ``layers.3.post_block`` (n, H), and the ``positions`` (n,) and ``token_ids``
(n,) of its rows. It appears whole or not at all.
"""

from __future__ import annotations

import atexit
import os
import queue
import re
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steer_compile.errors import NotSteered, SpecError
from steer_compile.vllm.captures import Kept, Room, joined

MOST_NAME = 100
_QUEUE = 256
"""Files that may wait for the thread; beyond them the engine waits."""
_LAST = 30.0
"""Seconds in which a process that ends writes its last files."""
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")


def file_name(asked: str) -> str:
    """A file's stem from what a client calls it: letters, digits, hyphens, and an ending that no other one has."""
    slug = _OTHER.sub("-", asked).strip("-")[:MOST_NAME]
    return f"{slug or 'capture'}-{uuid.uuid4().hex[:12]}"


def file_at(folder: str, name: str) -> Path:
    """Where the file of a name is.

    Raises:
        SpecError: a name that `file_name` does not make.
    """
    if not name or _OTHER.search(name):
        raise SpecError(f"{name!r} names no capture; give the name that came with the request's output")
    return Path(folder) / f"{name}.safetensors"


class Writer:
    """Writes files in a thread of its own."""

    def __init__(self, folder: str, room: Room) -> None:
        self._folder = folder
        self._room = room
        self._queue: queue.Queue[Kept | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._run, name="steer_compile captures", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def waiting(self) -> int:
        """Requests whose files are not there yet."""
        return self._queue.unfinished_tasks

    def put(self, kept: Kept) -> None:
        """Hand a finished request over."""
        self._queue.put(kept)

    def close(self) -> None:
        """Write what is there, as the process ends."""
        self._queue.put(None)
        self._thread.join(_LAST)

    def _run(self) -> None:
        while (kept := self._queue.get()) is not None:
            try:
                _write(self._folder, kept)
            except (OSError, RuntimeError, ValueError, MemoryError, SafetensorError) as error:  # the reader sees it
                _note(self._folder, kept, error)
            finally:
                self._room.let_go(kept)
                self._queue.task_done()


def _write(folder: str, kept: Kept) -> None:
    path = file_at(folder, kept.asked.name)
    about = {
        "request": kept.request,
        "prompt_tokens": str(kept.prompt),
        "dropped": str(kept.dropped),
        "status": "partial" if kept.dropped else "complete",
    }
    temporary = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in joined(kept).items()}, temporary, about)
    os.replace(temporary, path)


def _note(folder: str, kept: Kept, error: Exception) -> None:
    try:
        file_at(folder, kept.asked.name).with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    except OSError:
        return


@dataclass(frozen=True)
class Captured:
    """Rows of one request.

    Attributes:
        positions, token_ids: of each row (n,).
        values: by site, ``layers.3.post_block``, (n, H).
        status: ``complete``, or ``partial`` where the engine had no room for some rows.
    """

    positions: torch.Tensor
    token_ids: torch.Tensor
    values: dict[str, torch.Tensor]
    status: str


def captured(output: Any, llm: Any = None, timeout: float = 60.0) -> Captured:
    """What a request of vLLM captured, once its file is there.

    Args:
        output: the request's last `RequestOutput`. Where outputs are deltas, the rows of positions that an engine
            computed ahead stay in.
        llm: the `vllm.LLM` that made it, whose engine may have to hear that the request has ended.
        timeout: seconds to wait.

    Raises:
        NotSteered: the request captured nothing, or its file does not come.
    """
    reference = (output.kv_transfer_params or {}).get("steer_capture")
    if reference is None:
        raise NotSteered("this output captured nothing; give the request {'steer': {'capture': {...}}}")
    path = Path(reference["file"])
    if llm is not None and not path.exists():
        from vllm.v1.engine.core_client import InprocClient

        if isinstance(llm.llm_engine.engine_core, InprocClient):  # an engine in a process of its own goes on by itself
            llm.llm_engine.step()
    end = time.monotonic() + timeout
    while not path.exists():
        if failed := failure(path):
            raise NotSteered(f"the capture {path} was not written: {failed}")
        if time.monotonic() > end:
            raise NotSteered(f"the capture {path} did not come within {timeout} seconds")
        time.sleep(0.005)
    whole = reference["output"] == "whole"  # else the output holds the last tokens alone
    return read(path, len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 if whole else None)


def failure(path: Path) -> str:
    """Why a file was not written, "" where nothing is known of that."""
    note = path.with_suffix(".error")
    return note.read_text() if note.exists() else ""


def read(path: Path, length: int | None = None) -> Captured:
    """Rows of a file, of the first ``length`` positions where given: an engine that schedules ahead computes more."""
    with safe_open(str(path), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        status = (file.metadata() or {}).get("status", "partial")
    positions, ids = found.pop("positions"), found.pop("token_ids")
    chosen = positions < length if length is not None else torch.ones_like(positions, dtype=torch.bool)
    return Captured(positions[chosen], ids[chosen], {name: v[chosen] for name, v in found.items()}, status)
