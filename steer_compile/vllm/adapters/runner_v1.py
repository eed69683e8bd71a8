"""The V1 model runner: before each forward, the rows of its tokens are written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from steer_compile.vllm.adapters.runners import live_of

MODULE = "vllm.v1.worker.gpu_model_runner"


def _update(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        live = live_of(self)
        if live is None:
            return original(self, scheduler_output)
        live.ended(scheduler_output)
        result = original(self, scheduler_output)
        live.begun((new.req_id, new.sampling_params) for new in scheduler_output.scheduled_new_reqs)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        live.begun((request, self.requests[request].sampling_params) for request in resumed)
        return result

    return _update_states


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        live = live_of(self)
        if live is not None:
            batch = self.input_batch
            n = batch.num_reqs
            spans = batch.num_computed_tokens_cpu[:n], num_scheduled_tokens, batch.num_prompt_tokens[:n]
            live.step(batch.req_ids, spans, (self.input_ids.gpu, self.positions))
        return result

    return _prepare_inputs


WRAPPERS = {"_update_states": _update, "_prepare_inputs": _prepare}
"""Of the methods of the runner's class."""
