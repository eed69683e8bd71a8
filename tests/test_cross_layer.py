"""Monitors that open gates for the sites behind, in the same call, against forward hooks on the eager model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile import Clamp, HookSelection, LoweringError, Monitor, Steering, SteerSpec, steer_backend
from steer_compile.runtime.gates import Hidden
from tests import _models
from tests._models import direction

DEPTH = 4
AT = ("post_block", 1)
DETECTORS = (1, 2)
"""Layers whose blocks end in monitors; all are steered."""
EVERYWHERE = tuple(("post_block", n) for n in range(DEPTH))
KINDS = {
    "sigmoid": Monitor(direction(1), 0.2, 0.7),
    "line": Monitor(direction(1), -1.0, 0.4, kind="line", low=-0.5, high=1.5),
    "affine": Monitor(direction(1), 0.3, 0.1, kind="line", low=float("-inf"), high=float("inf")),
    "step": Monitor(direction(1), 0.1, kind="step"),
}


def spec(*ops: str, detect: tuple[str, ...] = ("monitor",), **options: Any) -> SteerSpec:
    """``ops`` behind every block, and what detects behind two of them."""
    hooks: list[Any] = [HookSelection("post_block", "all", ops)]
    hooks += [HookSelection("post_block", [n], detect) for n in DETECTORS]
    return _models.spec(*hooks, cross_layer=True, capture=("post_block",), **options)


def gate(monitor: Monitor, score: Tensor) -> Tensor:
    """The decision functions, written a second time."""
    if monitor.kind == "sigmoid":
        return torch.sigmoid(monitor.sharpness * (score - monitor.threshold))
    if monitor.kind == "line":
        return (monitor.sharpness * (score - monitor.threshold)).clamp(monitor.low, monitor.high)
    return (score > monitor.threshold).float()


@dataclass
class Oracle:
    """Hooks on the eager model: at the detecting block it opens the gate that later blocks read."""

    model: Any
    add: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    monitors: dict[tuple[str, int], Monitor] = field(default_factory=dict)
    clamps: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    open: Tensor = field(default_factory=lambda: torch.ones(()))

    def _edit(self, site: tuple[str, int], decode: bool) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            self.values[site] = h.clone()
            if site in self.monitors and decode:
                self.open = self.open * gate(self.monitors[site], h @ self.monitors[site].probe)
            x = h + self.add[site] * self.open.unsqueeze(-1) if site in self.add else h
            if site in self.clamps:
                v = self.clamps[site] / self.clamps[site].norm()
                x = x - self.open.unsqueeze(-1) * (x @ v).unsqueeze(-1) * v
            return x

        return edit

    @contextmanager
    def hooked(self, ids: Tensor, decode: bool) -> Iterator[None]:
        self.open = torch.ones(ids.shape)
        with _models.edited(self.model, {site: self._edit(site, decode) for site in EVERYWHERE}):
            yield

    def logits(self, ids: Tensor, decode: bool) -> Tensor:
        with self.hooked(ids, decode):
            return _models.logits(self.model, ids)


VECTORS = {site: direction(10 + site[1], 0.5) for site in EVERYWHERE}


def make(given: SteerSpec, inner: str = "eager") -> tuple[Any, Any, Any]:
    model = _models.toy(layers=DEPTH)
    backend = steer_backend(given, inner)
    return model, backend.runtime, _models.compiled(model, backend)


@pytest.mark.behaviour(18)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [True, False])
def test_a_monitor_gates_its_site_and_those_behind(kind: str, decode: bool) -> None:
    model, runtime, steered = make(spec("add"))
    runtime.set_monitor(AT, KINDS[kind], gate_rows=True)
    ids, oracle = _models.tokens(), Oracle(model, VECTORS, {AT: KINDS[kind]})
    with runtime.steer(VECTORS, phase="decode" if decode else "prefill"), runtime.capture() as log:
        found = _models.logits(steered, ids)
    torch.testing.assert_close(found, oracle.logits(ids, decode), atol=2e-5, rtol=2e-5)
    for site, value in oracle.values.items():  # captures are in front of any steering at their site
        torch.testing.assert_close(log[site], value, atol=2e-5, rtol=2e-5)


@pytest.mark.behaviour(70)
def test_detection_moves_later_layers_of_the_same_call_and_none_before() -> None:
    _, runtime, steered = make(spec("add"))
    seen = []
    for threshold in (1e6, -1e6):
        runtime.set_monitor(AT, Monitor(direction(1), threshold, kind="step"), gate_rows=True)
        with runtime.steer(VECTORS, phase="decode"), runtime.capture() as log:
            _models.logits(steered, _models.tokens())
        seen.append([log[site].clone() for site in EVERYWHERE])
    same = [torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert same == [True, True, False, False]  # values are pristine, so the second block's own shows behind it


@pytest.mark.behaviour(8)
def test_several_monitors_multiply_and_guard_tier_and_clamps() -> None:
    model, runtime, steered = make(spec("add", "tier", "clamp", clamps=1))
    monitors = {AT: Monitor(direction(1), 0.2, 0.7, clamps=True), ("post_block", 2): Monitor(direction(2), 0.0, 0.4,
                                                                                            clamps=True)}  # fmt: skip
    for site, monitor in monitors.items():
        runtime.set_monitor(site, monitor, gate_rows=True)
    runtime.set_tier({EVERYWHERE[3]: direction(30)}, gain=0.5)
    clamped = {EVERYWHERE[3]: direction(40)}
    oracle = Oracle(model, VECTORS | {EVERYWHERE[3]: VECTORS[EVERYWHERE[3]] + 0.5 * direction(30)}, monitors, clamped)
    ids = _models.tokens()
    clamps = {site: [Clamp(v, value=0.0)] for site, v in clamped.items()}
    with runtime.steer(VECTORS, phase="decode", clamps=clamps):
        found = _models.logits(steered, ids)
    torch.testing.assert_close(found, oracle.logits(ids, True), atol=3e-5, rtol=3e-5)


@pytest.mark.behaviour(19)
def test_monitors_of_rows_gate_their_own_requests() -> None:
    model, runtime, steered = make(spec("add", detect=("row_monitor",)))
    ids = _models.tokens(3)
    asked = [
        Steering(VECTORS, monitors={AT: KINDS["sigmoid"]}), Steering(VECTORS),
        Steering(VECTORS, monitors={AT: KINDS["step"], EVERYWHERE[2]: KINDS["line"]}),
    ]  # fmt: skip
    with runtime.steer(rows=asked, phase="decode"):
        found = _models.logits(steered, ids)
    for i, request in enumerate(asked):
        oracle = Oracle(model, VECTORS, dict(request.monitors))
        torch.testing.assert_close(found[i], oracle.logits(ids[i : i + 1], True)[0], atol=2e-5, rtol=2e-5)


def test_hidden_units_of_a_probe() -> None:
    model, runtime, steered = make(spec("add", detect=("monitor", "mlp", "score"), hidden=6))
    units = Hidden(torch.stack([direction(50 + i) for i in range(5)]), direction(60, 1.0, 5), direction(61, 1.0, 5))
    monitor = Monitor(direction(1), 0.2, 0.3, hidden=units)
    runtime.set_monitor(AT, monitor, gate_rows=True)
    ids, oracle = _models.tokens(), Oracle(model, VECTORS)
    with runtime.steer(VECTORS, phase="decode"):
        found = _models.logits(steered, ids)
        scores = runtime.sites.scores(AT)[..., 0].clone()
    oracle.logits(ids, True)
    h = oracle.values[AT]
    wanted = h @ monitor.probe + torch.relu(h @ units.weight.T + units.bias) @ units.output
    torch.testing.assert_close(scores, wanted, atol=2e-4, rtol=2e-5)
    opened = torch.sigmoid(0.3 * (wanted - 0.2))
    torch.testing.assert_close(found, opened_by(model, ids, opened), atol=5e-5, rtol=5e-5)


def opened_by(model: Any, ids: Tensor, factor: Tensor) -> Tensor:
    """Logits where vectors from the detecting block on have a factor of each token (B, T)."""

    def edit(site: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        return lambda h: h + VECTORS[site] * (factor if site[1] >= AT[1] else torch.ones_like(factor)).unsqueeze(-1)

    with _models.edited(model, {site: edit(site) for site in EVERYWHERE}):
        return _models.logits(model, ids)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_a_step_gate_remembers_each_sequence_until_its_next_prompt(calls: list[tuple[bool, int]], seed: int) -> None:
    model, runtime, steered = remembering()
    monitor = Monitor(direction(1), 2.0, kind="step", low=-2.0)
    runtime.set_monitor(AT, monitor, gate_rows=True)
    was = torch.zeros(2)
    for i, (prompt, length) in enumerate([(True, 2), *calls]):
        ids = _models.tokens(2, length if prompt else 1, 100 * seed + i)
        with runtime.steer(VECTORS, phase="prefill" if prompt else "decode"):
            found = _models.logits(steered, ids)
            score = runtime.sites.scores(AT)[:, -1, 0].clone()
        state = runtime.tables.view("state", AT)
        was = torch.zeros(2) if prompt else torch.where(score > 2.0, 1.0, torch.where(score < -2.0, 0.0, was))
        assert state[1:3, 0].tolist() == was.tolist()
        assert not state[0].any()
        assert not state[3:].any()
        opened = torch.ones(ids.shape) if prompt else was.unsqueeze(1)
        torch.testing.assert_close(found, opened_by(model, ids, opened), atol=2e-5, rtol=2e-5)


@cache
def remembering() -> tuple[Any, Any, Any]:
    return make(spec("add", detect=("monitor", "memory", "score")))


@pytest.mark.parametrize("cross", [True, False])
def test_scores_without_steering_change_nothing_and_need_no_recompile(cross: bool) -> None:
    model = _models.toy(layers=DEPTH)
    given = _models.spec(HookSelection("post_block", "all", ("monitor", "row_monitor", "score")), cross_layer=cross)
    backend = steer_backend(given, "eager")
    steered, ids = _models.compiled(model, backend), _models.tokens()
    runtime, oracle = backend.runtime, Oracle(model)
    plain = oracle.logits(ids, True)
    for seed in range(3):
        for site in EVERYWHERE:
            runtime.set_monitor(site, direction(seed), 0.1 * seed, 1.0 + seed)
        asked = Steering(monitors={AT: Monitor(direction(70 + seed))})
        for phase in ("prefill", "decode"):
            with runtime.steer(rows=[asked, None], phase=phase):
                torch.testing.assert_close(_models.logits(steered, ids), plain, atol=1e-6, rtol=1e-6)
                for site in EVERYWHERE:
                    wanted = oracle.values[site] @ direction(seed)
                    torch.testing.assert_close(runtime.sites.scores(site)[..., 0], wanted, atol=2e-5, rtol=2e-5)
                wanted = oracle.values[AT][0] @ direction(70 + seed)
                torch.testing.assert_close(runtime.sites.scores(AT)[0, :, 1], wanted, atol=2e-5, rtol=2e-5)
                assert not runtime.sites.scores(AT)[1, :, 1].any()
    assert len(backend.plans) == 1


@pytest.mark.behaviour(18)
def test_what_prompts_compute_is_not_touched_by_scores_that_are_not_finite() -> None:
    model, runtime, steered = make(spec("add"))
    runtime.set_monitor(AT, Monitor(direction(1) * 1e30, 0.0, 1e30, kind="line", low=float("-inf"),
                                    high=float("inf")), gate_rows=True)  # fmt: skip
    ids = _models.tokens()
    with runtime.steer(VECTORS, phase="prefill"):
        found = _models.logits(steered, ids)
    torch.testing.assert_close(found, Oracle(model, VECTORS).logits(ids, False), atol=2e-5, rtol=2e-5)


@pytest.mark.behaviour(20)
def test_across_hooks_and_under_inductor() -> None:
    hooks = [
        HookSelection("post_attn", [1], ("monitor",)),
        HookSelection("mlp_out", "all"),
        HookSelection("post_block"),
    ]
    model = _models.toy(layers=DEPTH)
    backend = steer_backend(_models.spec(*hooks, cross_layer=True), "inductor")
    steered, ids = _models.compiled(model, backend), _models.tokens()
    backend.runtime.set_monitor(("post_attn", 1), Monitor(direction(1), -1e6, 1e-6, kind="line", low=0.25, high=0.25),
                                gate_rows=True)  # fmt: skip
    vectors = {(hook, n): direction(5 + n, 0.3) for hook in ("mlp_out", "post_block") for n in range(DEPTH)}
    scaled = {site: v * (1.0 if site[1] == 0 else 0.25) for site, v in vectors.items()}
    with backend.runtime.steer(vectors, phase="decode"):
        found = _models.logits(steered, ids)
    with _models.edited(model, _models.adding(scaled)):
        torch.testing.assert_close(found, _models.logits(model, ids), atol=3e-5, rtol=3e-5)
    text = backend.plans[0].text()
    assert "detect monitor layers.1.post_attn" in text
    gated = [line for line in text.splitlines() if line.endswith("gated")]
    assert len(gated) == 2 * (DEPTH - 1)
    assert not any("layers.0" in line for line in gated)


def test_graph_breaks_are_refused() -> None:
    model = _models.toy(layers=DEPTH, cut=2)
    backend = steer_backend(spec("add"), "eager")
    with pytest.raises(LoweringError, match="graph breaks"):
        _models.logits(_models.compiled(model, backend), _models.tokens())
