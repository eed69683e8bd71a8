"""Captured rows as safetensors files: a thread writes them beside the engine, and `captured` reads them.

A file holds a tensor for each site, named ``layers.3.post_block`` (n, H), or for each reduction of one, named
``layers.3.post_block.norm`` (n,), ``.project`` (n, D) or ``.mean`` (1, H), and the ``positions`` (n,), ``token_ids``
(n,) and ``steps`` (n,) of its rows; beside means the number of ``tokens`` (1,) in them. It appears whole or not at all.
Each stage of a pipeline writes a file of its own layers, ``NAME.0.safetensors`` and so on.
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
from safetensors.torch import save, save_file

from steer_compile.errors import NotSteered, SpecError
from steer_compile.vllm.capture_consumers import Consumers
from steer_compile.vllm.captures import Kept, Room, joined

MOST_NAME = 100
_QUEUE = 256
"""Files that may wait for the thread; beyond them the engine waits."""
_LAST = 30.0
"""Seconds in which a process that ends writes its last files."""
RESULT = "steer_compile_capture_result"
"""Method of the workers that says what became of rows in a consumer."""
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


def stage_files(path: Path, stages: int) -> list[Path]:
    """The files of one capture: the file itself, or one for each stage of a pipeline."""
    return [_stage_file(path, stage if stages > 1 else None) for stage in range(stages)]


def _stage_file(path: Path, stage: int | None) -> Path:
    return path if stage is None else path.with_suffix(f".{stage}.safetensors")


class Writer:
    """Writes files in a thread of its own, and hands the rows of other requests to their consumers."""

    def __init__(self, folder: str, room: Room, consumers: Consumers) -> None:
        self.consumers = consumers
        self._folder = folder
        self._stage = consumers.stage
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
        self.consumers.close()

    def _run(self) -> None:
        while (kept := self._queue.get()) is not None:
            try:
                if kept.asked.to:
                    self.consumers.put(kept)
                else:
                    _write(self._file(kept), kept)
            except (OSError, RuntimeError, ValueError, MemoryError, SafetensorError) as error:  # the reader sees it
                if kept.asked.to:
                    self.consumers.refused(kept, error)
                else:
                    _note(self._file(kept), error)
            finally:
                self._room.let_go(kept)
                self._queue.task_done()

    def _file(self, kept: Kept) -> Path:
        return _stage_file(file_at(self._folder, kept.asked.name), self._stage)


def _write(path: Path, kept: Kept) -> None:
    about = {
        "request": kept.request,
        "prompt_tokens": str(kept.prompt),
        "dropped": str(kept.dropped),
        "status": "partial" if kept.dropped else "complete",
    }
    temporary = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in joined(kept).items()}, temporary, about)
    os.replace(temporary, path)


def _note(path: Path, error: Exception) -> None:
    try:
        path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    except OSError:
        return


@dataclass(frozen=True)
class Captured:
    """Rows of one request.

    Attributes:
        positions, token_ids: of each row (n,).
        steps: number of the engine's forward that computed each row (n,).
        values: by site, ``layers.3.post_block``, (n, H), or by reduction, ``layers.3.post_block.norm``; beside means
            ``tokens``, the number of tokens in them.
        status: ``complete``, or ``partial`` where the engine had no room for some rows.
    """

    positions: torch.Tensor
    token_ids: torch.Tensor
    steps: torch.Tensor
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
    if reference["to"]:
        raise NotSteered(
            f"the rows of this output went to the consumer {reference['to']!r}, and are in no file of their own; "
            "`capture_result` says where they are"
        )
    paths = stage_files(Path(reference["file"]), reference["stages"])
    if llm is not None and not all(path.exists() for path in paths):
        go_on(llm)
    end = time.monotonic() + timeout
    for path in paths:
        while not path.exists():
            if failed := failure(path):
                raise NotSteered(f"the capture {path} was not written: {failed}")
            if time.monotonic() > end:
                raise NotSteered(f"the capture {path} did not come within {timeout} seconds")
            time.sleep(0.005)
    whole = reference["output"] == "whole"  # else the output holds the last tokens alone
    length = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 if whole else None
    return merged([read(path, length) for path in paths])


def capture_result(output: Any, llm: Any, timeout: float = 60.0) -> dict[str, str]:
    """What became of a request's rows in its consumer: ``status``, ``text`` and ``place``, as in `capture.results`.

    It is ``pending`` where the consumer has not kept them within the timeout; of several stages of a pipeline the worst
    counts, and places are given line by line.

    Raises:
        NotSteered: the request's rows went to no consumer.
    """
    reference = (output.kv_transfer_params or {}).get("steer_capture")
    if reference is None or not reference["to"]:
        raise NotSteered("the rows of this output went to no consumer; give the request {'capture': {'to': NAME}}")
    go_on(llm)
    end = time.monotonic() + timeout
    while True:
        answers = llm.collective_rpc(RESULT, args=(reference["to"], reference["name"]))
        found = worst([answer for answer in answers if answer])
        if found["status"] != "pending" or time.monotonic() > end:
            return found
        time.sleep(0.01)


def worst(stages: list[dict[str, str]]) -> dict[str, str]:
    """One result of those of all stages of a pipeline."""
    order = ("error", "pending", "partial", "ok")
    first = min(stages, key=lambda each: order.index(each["status"]))
    return {**first, "place": "\n".join(dict.fromkeys(each["place"] for each in stages if each["place"]))}


def go_on(llm: Any) -> None:
    """Let an engine in this process hear that its requests have ended; others go on by themselves."""
    from vllm.v1.engine.core_client import InprocClient

    if isinstance(llm.llm_engine.engine_core, InprocClient):
        llm.llm_engine.step()


def merged(stages: list[Captured]) -> Captured:
    """Rows of all layers from those of each stage of a pipeline; of positions that a stage dropped, none."""
    first = stages[0]
    places = [stage.positions.tolist() for stage in stages]
    if all(found == places[0] for found in places):
        values = {name: rows for stage in stages for name, rows in stage.values.items()}
    else:
        common = sorted(set.intersection(*map(set, places)))
        chosen = [torch.tensor([found.index(place) for place in common], dtype=torch.int64) for found in places]
        values = {n: r[at] for stage, at in zip(stages, chosen, strict=True) for n, r in stage.values.items()}
        at = chosen[0]
        first = Captured(first.positions[at], first.token_ids[at], first.steps[at], {}, "partial")
    status = "complete" if all(stage.status == "complete" for stage in [*stages, first]) else "partial"
    return Captured(first.positions, first.token_ids, first.steps, values, status)


def packed(paths: list[Path]) -> bytes:
    """The files of a capture as one safetensors file."""
    whole = merged([read(path) for path in paths])
    tensors = {"positions": whole.positions, "token_ids": whole.token_ids, "steps": whole.steps, **whole.values}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"status": whole.status})


def failure(path: Path) -> str:
    """Why a file was not written, "" where nothing is known of that."""
    note = path.with_suffix(".error")
    return note.read_text() if note.exists() else ""


def read(path: Path, length: int | None = None) -> Captured:
    """Rows of a file, of the first ``length`` positions where given: an engine that schedules ahead computes more."""
    with safe_open(str(path), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        status = (file.metadata() or {}).get("status", "partial")
    positions, ids, steps = (found.pop(name) for name in ("positions", "token_ids", "steps"))
    if length is None or "tokens" in found:  # a mean is one row, whatever the engine computed
        return Captured(positions, ids, steps, found, status)
    chosen = positions < length
    values = {name: rows[chosen] for name, rows in found.items()}
    return Captured(positions[chosen], ids[chosen], steps[chosen], values, status)
