"""Workers: methods that vLLM's collective calls find by name, for steering that every request gets."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from steer_compile.vllm.adapters.runners import live_of
from steer_compile.vllm.transport import received

SET_EVERYONE, STATE = "steer_compile_set_everyone", "steer_compile_state"


def missing() -> str:
    """Workers derive from one class."""
    return "" if "load_model" in vars(WorkerBase) else "WorkerBase has no load_model"


def install() -> None:
    """Add the methods."""
    setattr(WorkerBase, SET_EVERYONE, set_everyone)
    setattr(WorkerBase, STATE, state)


def set_everyone(self: Any, data: dict[str, Any]) -> None:
    """Replace what every request gets, between two steps."""
    live = live_of(self.model_runner)
    if live is not None:
        live.rows.set_everyone(received(data)[0])


def state(self: Any) -> dict[str, int]:
    """Requests with rows of their own, rows in use and rows in all."""
    live = live_of(self.model_runner)
    return {} if live is None else live.rows.state()
