"""The V2 model runner, vLLM's default on GPUs: before each forward, the rows of its tokens are written.

It takes a request that was preempted, and one that goes on with more input, as new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from steer_compile.vllm.adapters.runners import live_of

MODULE = "vllm.v1.worker.gpu.model_runner"


def _finish(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def finish_requests(self: Any, scheduler_output: Any) -> Any:
        live = live_of(self)
        if live is not None:
            live.ended(scheduler_output)
        return original(self, scheduler_output)

    return finish_requests


def _add(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        live = live_of(self)
        if live is not None:
            live.begun((new.req_id, new.sampling_params) for new in scheduler_output.scheduled_new_reqs)
        return original(self, scheduler_output)

    return add_requests


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        live = live_of(self)
        if live is not None:
            # Positions are an upper bound where drafts are in flight; it never crosses the end of a prompt.
            prompts = self.req_states.prompt_len.np[batch.idx_mapping_np]
            spans = batch.num_computed_tokens_np, batch.num_scheduled_tokens, prompts
            live.step(batch.req_ids, spans, (batch.input_ids, batch.positions))
        return batch

    return prepare_inputs


WRAPPERS = {"finish_requests": _finish, "add_requests": _add, "prepare_inputs": _prepare}
"""Of the methods of the runner's class."""
