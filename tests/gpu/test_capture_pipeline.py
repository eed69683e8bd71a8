"""On a CUDA device: rows cross on a stream of their own, and are those of their step although the buffers change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.pipeline import Limits, Pipeline, StepRows

pytestmark = pytest.mark.gpu

STEPS, TOKENS, WIDTH = 200, 64, 1024


def test_rows_are_those_of_their_step() -> None:
    """The same buffers are written to in each step, right behind `submit`."""
    memory = MemoryConsumer()
    values = {
        f"layers.{i}.post_block": torch.empty(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16) for i in range(4)
    }
    values["layers.0.score"] = torch.empty(TOKENS, device="cuda")
    positions, ids = (torch.empty(TOKENS, device="cuda", dtype=torch.int64) for _ in range(2))
    chosen = np.array([3, 60, 7])
    request = np.array([0, 1, 0], np.int32)
    with Pipeline({"memory": memory}, device="cuda", limits=Limits(ring_bytes=1 << 20)) as pipeline:
        for name in "ab":
            pipeline.begin(name)
        for step in range(STEPS):
            for i, value in enumerate(values.values()):
                value.copy_(
                    (torch.arange(TOKENS, device="cuda") + step + i).view(-1, *[1] * (value.dim() - 1)).expand_as(value)
                )
            torch.arange(step, step + TOKENS, out=positions)
            torch.arange(TOKENS, out=ids)
            taken = pipeline.submit(StepRows("ab", request, chosen, step), positions, values, ids)
            assert taken == 3
            for tensor in (*values.values(), positions, ids):
                tensor.fill_(-1)
        for name in "ab":
            pipeline.end(name)
            assert pipeline.wait(name)["memory"].status == "ok"
    for name, own in (("a", [3, 7]), ("b", [60])):
        rows = memory.get(name)
        steps = torch.arange(STEPS).repeat_interleave(len(own))
        tokens = torch.tensor(own).repeat(STEPS)
        assert torch.equal(rows.steps, steps)
        assert torch.equal(rows.token_ids, tokens)
        assert torch.equal(rows.positions, tokens + steps)
        for i, key in enumerate(values):
            expected = (tokens + steps + i).to(rows.values[key].dtype)
            assert torch.equal(rows.values[key].reshape(len(rows), -1)[:, 0], expected)


def test_the_ring_is_pinned_and_the_host_does_not_wait() -> None:
    """`submit` returns while the work in front of it still runs."""
    memory = MemoryConsumer()
    value = torch.zeros(TOKENS, WIDTH, device="cuda")
    positions = torch.arange(TOKENS)
    with Pipeline({"memory": memory}, device="cuda") as pipeline:
        pipeline.begin("a")
        of = StepRows(("a",), np.zeros(TOKENS, np.int32), np.arange(TOKENS), 0)
        pipeline.submit(of, positions, {"x": value})  # what is allocated and compiled at first
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        value.fill_(2)
        pipeline.submit(of, positions, {"x": value})
        assert not torch.cuda.current_stream().query()
        value.fill_(3)
        pipeline.end("a")
        assert pipeline.wait("a")["memory"].status == "ok"
    assert memory.get("a").values["x"][TOKENS:].eq(2).all()
