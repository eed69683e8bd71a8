"""The V1 model runner: before each forward, the rows of its tokens are written."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from steer_compile.errors import LoweringError, NotSteered
from steer_compile.vllm.model import SteeredModel
from steer_compile.vllm.rows import RequestRows, Span
from steer_compile.vllm.settings import KEY

_MODULE = "vllm.v1.worker.gpu_model_runner"
_ROWS: WeakKeyDictionary[Any, RequestRows] = WeakKeyDictionary()
_ANNOUNCED: dict[int, SteeredModel] = {}
_patched: list[type] = []


def missing() -> str:
    """The runner is looked at when a model is there, as importing it starts the device."""
    return ""


def install() -> None:
    """Nothing yet: see `announce`."""


def announce(config: Any, steered: SteeredModel) -> None:
    """A runner is building this model; from its first step on it writes rows.

    Raises:
        LoweringError: the model is not built by the V1 runner.
    """
    if _MODULE not in sys.modules:
        raise LoweringError(f"the model is built outside of {_MODULE}, and nothing would write the rows of its tokens")
    runner: Any = sys.modules[_MODULE]
    if runner.GPUModelRunner not in _patched:
        runner.GPUModelRunner._update_states = _update(runner.GPUModelRunner._update_states)
        runner.GPUModelRunner._prepare_inputs = _prepare(runner.GPUModelRunner._prepare_inputs)
        _patched.append(runner.GPUModelRunner)
    _ANNOUNCED[id(config)] = steered


def _update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rows become free at every step, also at one without tokens, which tells an idle engine what has finished."""

    @functools.wraps(original)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        rows = _rows_of(self)
        if rows is not None:
            rows.drop(scheduler_output.finished_req_ids)
            rows.drop(scheduler_output.preempted_req_ids or ())
        return original(self, scheduler_output)

    return _update_states


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        rows = _rows_of(self)
        if rows is None and KEY in (self.vllm_config.additional_config or {}):
            raise NotSteered(
                "this engine has a spec, and its model was built without tables; no step runs unsteered: report the "
                "model and the version of vLLM"
            )
        if rows is not None:
            rows.step(list(_spans(self, rows, num_scheduled_tokens)))
        return result

    return _prepare_inputs


def _rows_of(runner: Any) -> RequestRows | None:
    if runner not in _ROWS and id(runner.vllm_config) in _ANNOUNCED:
        _ROWS[runner] = RequestRows(_ANNOUNCED.pop(id(runner.vllm_config)).registry)
    return _ROWS.get(runner)


def _spans(runner: Any, rows: RequestRows, counts: Any) -> Iterator[Span]:
    """Tokens of the step in the order of the batch; requests that are new are given their rows."""
    batch = runner.input_batch
    for i, request in enumerate(batch.req_ids):
        state = runner.requests[request]
        params = state.sampling_params
        rows.admit(request, params.extra_args if params is not None else None)
        yield Span(request, int(batch.num_computed_tokens_cpu[i]), int(counts[i]), state.num_prompt_tokens)
