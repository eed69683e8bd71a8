"""Gates scale what features do, also where values are decoded from all of them; the judge is a forward hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, Monitor, SAESteering, Steering, SteerSpec, sae, steer_backend
from steer_compile.errors import VectorError
from steer_compile.sae import SAE, FeatureClamp, TopK
from tests._models import WIDTH, compiled, edited, llama, logits, tokens
from tests.test_backend_sae import COUNT, close, tiny

AT, BEHIND = ("post_block", 0), ("post_block", 1)
CLAMPS = (FeatureClamp(3, 4.0), FeatureClamp(8, -1.5, "add"))
PROBE = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)) / WIDTH**0.5
GATES = {"sigmoid": Monitor(PROBE, 0.1, 2.0, clamps=True), "step": Monitor(PROBE, 0.1, kind="step", clamps=True)}
MODES = ("delta", "keep_error", "reconstruct")


def built(inner: str = "eager", **options: Any) -> tuple[Any, Any, Any]:
    torch.compiler.reset()
    ops = ("add", "monitor", "row_monitor", "sae", "sae_full")
    given: dict[str, Any] = {"cross_layer": True, "max_tokens": 64, "features": 8, "sae_features": COUNT, "saes": 2}
    backend = steer_backend(SteerSpec(steer=(HookSelection("post_block", "all", ops),), **given | options), inner=inner)
    model = llama()
    return model, compiled(model, backend), backend.runtime


def moved(h: Tensor, made: SAE, mode: str) -> Tensor:
    return sae.steered_reconstruction(h, made, CLAMPS, mode != "reconstruct")


def expected(model: Any, ids: Tensor, kind: str, made: SAE, mode: str, site: tuple[str, int]) -> Tensor:
    opened: list[Tensor] = []

    def edit(h: Tensor) -> Tensor:
        score = h @ PROBE - 0.1
        opened.append((torch.sigmoid(2 * score) if kind == "sigmoid" else (score > 0).float()).unsqueeze(-1))
        return h if site != AT else h + opened[0] * (moved(h, made, mode) - h)

    def later(h: Tensor) -> Tensor:
        return h if site == AT else h + opened[0] * (moved(h, made, mode) - h)

    with edited(model, {AT: edit, BEHIND: later}):
        found = logits(model, ids)
    assert 0 < float(opened[0].mean()) < 1
    return found


@pytest.mark.parametrize("site", [AT, BEHIND], ids=["its own site", "a site behind"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "whose"), [("sigmoid", "site"), ("step", "row")])
def test_a_gate_scales_the_move_of_decoded_values(kind: str, mode: str, site: tuple[str, int], whose: str) -> None:
    """TopK has no features of its own limits, so its clamps are served from all features in any mode."""
    made, ids = tiny(TopK(6), site=site), tokens(2, 7)
    model, run, runtime = built("inductor" if (kind, mode, whose) == ("sigmoid", "reconstruct", "site") else "eager")
    runtime.saes.attach("bridge", made, whole=True)
    if whose == "site":
        runtime.set_monitor(AT, GATES[kind])
    monitors = {AT: GATES[kind]} if whose == "row" else {}
    own = Steering(features=SAESteering("bridge", CLAMPS, mode), monitors=monitors)
    with runtime.steer(rows=[own, own], phase="decode"):
        got = logits(run, ids)
    close(got, expected(model, ids, kind, made, mode, site), 3e-4)
    with runtime.steer(rows=[own, own], phase="prefill"):  # what is computed for a prompt depends on no score
        whole = logits(run, ids)
    with edited(model, {site: lambda h: moved(h, made, mode)}):
        close(whole, logits(model, ids), 3e-4)


def test_a_gate_without_clamps_leaves_decoded_values_alone() -> None:
    made, ids = tiny(TopK(6), site=AT), tokens(2, 7)
    model, run, runtime = built()
    runtime.saes.attach("bridge", made, whole=True)
    runtime.set_monitor(AT, Monitor(PROBE, 1e6, kind="step"), gate_rows=True)
    with runtime.steer(features=SAESteering("bridge", CLAMPS, "reconstruct"), phase="decode"):
        got = logits(run, ids)
    with edited(model, {AT: lambda h: moved(h, made, "reconstruct")}):
        close(got, logits(model, ids), 3e-4)


def test_gates_that_could_not_act_are_refused() -> None:
    """Without ``cross_layer`` a gate lives in the kernel of its site, in front of the decoding."""
    _, run, runtime = built(cross_layer=False)
    logits(run, tokens(2, 7))
    runtime.saes.attach("bridge", tiny(TopK(6), site=AT), whole=True)
    own = SAESteering("bridge", CLAMPS)
    wanted = r"layers.0.post_block has a monitor with clamps=True, .* set cross_layer=True in the spec"
    with pytest.raises(VectorError, match=wanted):
        runtime.set_monitor(AT, GATES["step"])
    for features in ((own,), ()):  # everyone may be decoded later
        with pytest.raises(VectorError, match=wanted):
            runtime.register(Steering(features=features, monitors={AT: GATES["step"]}))
    runtime.set_monitor(AT, Monitor(PROBE, 0.1))
    runtime.release(runtime.register(Steering(features=own, monitors={AT: Monitor(PROBE, 0.1)})))


def test_gates_of_sites_that_do_not_decode_are_taken() -> None:
    chosen = (
        HookSelection("post_block", [0], ("add", "monitor", "sae")),
        HookSelection("post_block", [-1], ("sae_full",)),
    )
    torch.compiler.reset()
    backend = steer_backend(
        SteerSpec(steer=chosen, max_tokens=64, features=8, sae_features=COUNT, saes=1), inner="eager"
    )
    logits(compiled(llama(), backend), tokens(2, 7))
    backend.runtime.set_monitor(AT, GATES["step"])


def test_an_fp64_stream_is_decoded_behind_gates() -> None:
    torch.compiler.reset()
    made, ids = tiny(TopK(6), site=AT), tokens(2, 7)
    chosen = HookSelection("post_block", "all", ("add", "monitor", "sae_full"))
    spec = SteerSpec(steer=(chosen,), cross_layer=True, max_tokens=64, features=8, sae_features=COUNT, saes=1)
    backend, model = steer_backend(spec, inner="eager"), llama().double()
    run, runtime = compiled(model, backend), backend.runtime
    runtime.saes.attach("bridge", made, whole=True)
    runtime.set_monitor(AT, GATES["sigmoid"])
    with runtime.steer(features=SAESteering("bridge", CLAMPS, "keep_error"), phase="decode"):
        got = logits(run, ids)

    def edit(h: Tensor) -> Tensor:
        g = torch.sigmoid(2 * (h @ PROBE.double() - 0.1)).unsqueeze(-1)
        return h + g * (moved(h, made, "keep_error") - h)

    with edited(model, {AT: edit}):
        close(got, logits(model, ids), 1e-5)
