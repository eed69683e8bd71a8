"""Parallel streams on a CUDA device: replays of CUDA graphs are steered and captured, by either lowering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Clamp, Monitor, SteerSpec, one_stream, steer_backend
from tests import _streams
from tests._models import compiled
from tests._streams import HOOKS, LAYERS, STREAMS, WEIGHTS, WIDTH, Site, direction, hooked, logits, tokens, watched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]
STREAM_HOOKS = HOOKS[:3]


def sites() -> list[Site]:
    return [(hook, n) for hook in STREAM_HOOKS[:2] for n in range(LAYERS)] + [(STREAM_HOOKS[2], LAYERS - 1)]


def on_a_card(name: str) -> Any:
    """The model with experts that a CUDA graph can hold in fp32: torch has grouped products of bf16 alone."""
    model = _streams.MODELS[name]().cuda()
    model.set_experts_implementation("batched_mm")
    return model


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", _streams.MODELS)
@pytest.mark.parametrize("lowering", ["compiler", "template"])
def test_replays_are_steered_and_captured(name: str, lowering: str) -> None:
    model = on_a_card(name)
    ids = tokens().cuda()
    weights = tuple(hook for hook in WEIGHTS if name == "deepseek_v4" or "res_mix" not in hook)
    spec = SteerSpec(steer=STREAM_HOOKS, capture=(*STREAM_HOOKS, *weights), max_tokens=32, lowering=lowering)
    backend = steer_backend(spec, mode="reduce-overhead")
    run = compiled(model, backend, fullgraph=True)
    plain, seen = watched(name, model, ids)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        with backend.runtime.capture() as log:
            close(logits(run, ids), plain, 2e-3)
    for site, value in seen.items():
        if site[0] in (*STREAM_HOOKS, *weights):
            close(log[site], value, 2e-3)
    assert {edit.lowering for edit in backend.plans[0].edits if edit.ops != ("capture",)} == {lowering}
    for stream, site in enumerate(sites()):
        vector = one_stream(direction(stream, WIDTH), stream % STREAMS, STREAMS)
        on_card = vector.cuda()
        with hooked(name, model, lambda at, value: value + on_card if at == site else value):  # noqa: B023
            expected = logits(model, ids)
        with backend.runtime.steer({site: vector}):
            torch.compiler.cudagraph_mark_step_begin()
            got = logits(run, ids).clone()
        close(got, expected, 5e-3)
        assert not torch.allclose(got, plain, atol=1e-2), site
    torch.compiler.cudagraph_mark_step_begin()
    close(logits(run, ids), plain, 2e-3)
    assert len(backend.plans) == 1


def test_monitors_and_clamps_of_one_stream() -> None:
    name, site = "deepseek_v4", ("mhc_streams_pre_mlp", 1)
    model = on_a_card(name)
    ids = tokens(1, 6).cuda()
    spec = SteerSpec(
        steer=(site[0],), ops=("add", "row_monitor", "clamp"), max_tokens=32, clamps=1, lowering="template"
    )
    backend = steer_backend(spec, mode="reduce-overhead")
    run = compiled(model, backend)
    _, seen = watched(name, model, ids)
    probe, vector = one_stream(direction(1, WIDTH), 2, STREAMS), direction(2, STREAMS * WIDTH)
    unit = probe / probe.norm()
    score = seen[site] @ probe.cuda()
    low, high = score.flatten().sort().values[2:4].tolist()
    middle, bound = (low + high) / 2, float((seen[site] @ unit.cuda()).median())

    def edit(at: Site, value: Tensor) -> Tensor:
        if at != site:
            return value
        value = value + vector.cuda() * ((value @ probe.cuda()) > middle).unsqueeze(-1)
        dot = value @ unit.cuda()
        pull: Tensor = (dot.clamp(max=bound) - dot).unsqueeze(-1) * unit.cuda()
        return value + pull

    with hooked(name, model, edit):
        expected = logits(model, ids)
    given: Any = {
        "monitors": {site: Monitor(probe, threshold=middle, kind="step")},
        "clamps": {site: Clamp(probe, hi=bound)},
    }
    with backend.runtime.steer({site: vector}, phase="decode", **given):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = logits(run, ids).clone()
    close(got, expected, 5e-3)
