"""The scheduler: a request waits until there are rows for its steering. It is never run without them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler

from steer_compile.vllm.adapters.compile_path import settings_of
from steer_compile.vllm.admission import Grants, own_blocks, row_keys
from steer_compile.vllm.settings import Settings

_QUEUES = ("skipped_waiting", "kv_holding_waiting", "waiting")
"""Queues of waiting requests in the order in which vLLM looks at them; a version has the last and one of the others."""


class _Desk:
    """What one scheduler's engine has: its rows, the live requests that may need some, the names of its queues."""

    def __init__(self, settings: Settings, scheduler: Any) -> None:
        self.grants = Grants(settings.spec.rows, settings.spec.overrides)
        self.dynamic = settings.dynamic
        self.steered: set[str] = set()
        self.queues = [name for name in _QUEUES if name in vars(scheduler)]


_DESKS: WeakKeyDictionary[Any, _Desk | None] = WeakKeyDictionary()


def missing() -> str:
    """`schedule` takes requests from `_QUEUES`, which `add_request` fills."""
    absent = [name for name in ("schedule", "add_request") if name not in vars(Scheduler)]
    if absent:
        return f"Scheduler has no method {absent[0]}"
    used = [name for name in Scheduler.schedule.__code__.co_names if name in _QUEUES]
    return "" if len(used) == 2 and "waiting" in used else f"Scheduler.schedule has the queues {', '.join(used)}"


def install() -> None:
    """Wrap the scheduler's two entries."""
    Scheduler.add_request = _add(Scheduler.add_request)
    Scheduler.schedule = _schedule(Scheduler.schedule)


def _desk(scheduler: Any) -> _Desk | None:
    if scheduler not in _DESKS:
        settings = settings_of(scheduler.vllm_config)
        _DESKS[scheduler] = None if settings is None else _Desk(settings, scheduler)
    return _DESKS[scheduler]


def _add(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: Any, request: Any) -> Any:
        desk = _desk(self)
        if desk is not None and desk.dynamic:
            own_blocks(request)
        if desk is not None and row_keys(request):
            desk.steered.add(request.request_id)
        return original(self, request)

    return add_request


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        desk = _desk(self)
        if desk is None or not desk.steered:
            return original(self, *args, **kwargs)
        if self.finished_req_ids:  # of which the runners hear in this step
            desk.grants.release(self.finished_req_ids)
            desk.steered -= self.finished_req_ids - self.requests.keys()  # an identifier may be taken again
        with _held(self, desk):
            output = original(self, *args, **kwargs)
        if output.preempted_req_ids:
            desk.grants.release(output.preempted_req_ids)
        begun = [new.req_id for new in output.scheduled_new_reqs]
        for request in (*begun, *output.scheduled_cached_reqs.resumed_req_ids):
            if request in desk.steered:
                desk.grants.grant(self.requests[request])
        return output

    return schedule


@contextmanager
def _held(scheduler: Any, desk: _Desk) -> Iterator[None]:
    """Requests without rows are out of the queues for one step, and come back in front of the others."""
    queues = [vars(scheduler)[name] for name in desk.queues]
    waiting = [request for queue in queues if queue for request in queue if request.request_id in desk.steered]
    held = desk.grants.beyond(waiting) if waiting else []
    if not held:
        yield
        return
    names = {request.request_id for request in held}
    parts = [[r for r in queue if r.request_id in names] for queue in queues]
    for queue, part in zip(queues, parts, strict=True):
        queue.remove_requests(part)
    try:
        yield
    finally:
        for name, part in zip(desk.queues, parts, strict=True):
            vars(scheduler)[name].prepend_requests(reversed(part))
