"""The scheduler: a request waits until there are rows for its steering. It is never run without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler

from steer_compile.vllm.adapters.compile_path import settings_of
from steer_compile.vllm.admission import beyond

_ROWS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Rows that a scheduler's engine has, 0 without a spec."""


def missing() -> str:
    """`schedule` takes requests from ``self.waiting``."""
    return "" if "schedule" in vars(Scheduler) else "Scheduler has no method schedule"


def install() -> None:
    """Wrap the scheduler's one entry."""
    Scheduler.schedule = _schedule(Scheduler.schedule)


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in _ROWS:
            settings = settings_of(self.vllm_config)
            _ROWS[self] = 0 if settings is None else settings.spec.rows
        if not _ROWS[self] or not self.waiting:
            return original(self, *args, **kwargs)
        # Requests whose KV blocks come from elsewhere wait in a queue of their own and are admitted first.
        admitted = [*self.running, *vars(self).get("kv_holding_waiting", ())]
        held = beyond(_ROWS[self], admitted, self.waiting)
        if not held:
            return original(self, *args, **kwargs)
        self.waiting.remove_requests(held)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.waiting.prepend_requests(reversed(held))  # in front of the others, in their order

    return schedule
