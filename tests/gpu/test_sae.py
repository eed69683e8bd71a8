"""On a CUDA device: features in replays of CUDA graphs, attached, clamped and detached without a compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, Monitor, SAESteering, Steering, SteerSpec, sae, steer_backend
from steer_compile.sae import SAE, FeatureClamp, JumpReLU, LayerNorm, TopK
from steer_compile.torch_compat import compile_count
from tests.gpu.test_gpu import WIDTH, compiled, ids, model  # noqa: F401
from tests.sae._weights import parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

LAYER, COUNT = 1, 512
SITE = ("post_block", LAYER)
OPS = ("add", "sae", "sae_full", "sae_log")
CLAMPS = [FeatureClamp(3, 6.0), FeatureClamp(300, -2.0, "add"), FeatureClamp(20, 3.0, only_if_active=True)]


def made(kind: str) -> SAE:
    own = parts(5, WIDTH, COUNT)
    scale = WIDTH**-0.5
    weights = own["W_enc"] * scale, own["b_enc"], own["W_dec"] * scale, own["b_dec"] * 0.1
    if kind == "topk":
        return SAE(*weights, TopK(32), site=SITE)
    return SAE(*weights, JumpReLU(own["threshold"]), LayerNorm(), site=SITE)


def hooked(model: Any, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: F811
    def hook(module: Any, given: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        h = output[0] if whole else output
        new = edit(h.cpu()).to(h)
        return (new, *output[1:]) if whole else new

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    logits: Tensor = model(input_ids=x, use_cache=False).logits
    handle.remove()
    return logits


def warm(step: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for _ in range(3):
        step(x)


@pytest.mark.parametrize("mode", ["delta", "keep_error", "reconstruct"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_replays_see_attached_features(model: Any, kind: str, mode: str) -> None:  # noqa: F811
    one, x = made(kind), ids(4, 8)
    judge = copy.deepcopy(model)
    spec = SteerSpec(
        steer=(HookSelection("post_block", [LAYER], OPS),), max_tokens=256, features=16, sae_features=COUNT,
        sae_tokens=64, top_features=4, rows=4,
    )  # fmt: skip
    backend = steer_backend(spec, mode="reduce-overhead")
    step = compiled(model, backend)
    warm(step, x)
    idle, before = step(x), compile_count()
    for _ in range(2):
        backend.runtime.saes.attach("one", one, features=() if kind == "topk" else (300, 3, 20), whole=True)
        own = Steering(features=SAESteering("one", CLAMPS, mode=mode))
        with backend.runtime.steer(rows=[None, own, None, own]):
            got = step(x)

        def edit(h: Tensor) -> Tensor:
            new = sae.steered_reconstruction(h, one, CLAMPS, keep_error=mode != "reconstruct")
            return torch.stack([h[0], new[1], h[2], new[3]])

        expected = hooked(judge, x, edit)
        size = (expected - hooked(judge, x, lambda h: h)).norm()
        assert (got - idle)[[0, 2]].abs().max() == 0
        assert float((got - expected).norm() / size) < 0.1  # both in bf16, behind other layers
        backend.runtime.saes.detach("one")
        assert torch.equal(step(x), idle)
    assert compile_count() == before


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_gates_open_decoded_values_in_replays(model: Any, kind: str) -> None:  # noqa: F811
    one, x = made(kind), ids(4, 8)
    judge = copy.deepcopy(model)
    ops = (*OPS, "monitor", "row_monitor")
    spec = SteerSpec(
        steer=(HookSelection("post_block", [LAYER], ops),), max_tokens=256, features=16, sae_features=COUNT,
        sae_tokens=64, top_features=4, rows=4, cross_layer=True,
    )  # fmt: skip
    backend = steer_backend(spec, mode="reduce-overhead")
    step, runtime, probe = compiled(model, backend), backend.runtime, torch.randn(WIDTH)
    warm(step, x)
    idle, before = step(x), compile_count()
    runtime.saes.attach("one", one, whole=True)
    own = Steering(features=SAESteering("one", CLAMPS, mode="reconstruct"))

    def steered() -> Tensor:
        with runtime.steer(rows=[None, own, None, own], phase="decode"):
            return step(x)

    runtime.set_monitor(SITE, Monitor(probe, 1e6, kind="step", clamps=True))
    assert torch.equal(steered(), idle)
    for part, monitor in {
        1.0: Monitor(probe, -1e6, kind="step", clamps=True),
        0.25: Monitor(probe, 0.0, 0.0, kind="line", low=0.25, clamps=True),
    }.items():
        runtime.set_monitor(SITE, monitor)
        got = steered()

        def edit(h: Tensor, part: float = part) -> Tensor:
            new = h + part * (sae.steered_reconstruction(h, one, CLAMPS) - h)
            return torch.stack([h[0], new[1], h[2], new[3]])

        expected = hooked(judge, x, edit)
        size = (expected - hooked(judge, x, lambda h: h)).norm()
        assert (got - idle)[[0, 2]].abs().max() == 0
        assert float((got - expected).norm() / size) < 0.1
    assert compile_count() == before


def test_the_eager_backend_warms_up_all_kernels(model: Any) -> None:  # noqa: F811
    spec = SteerSpec(
        steer=(HookSelection("post_block", [LAYER], OPS),), max_tokens=128, features=16, sae_features=COUNT,
        sae_tokens=64, top_features=4,
    )  # fmt: skip
    from steer_compile.kernels import sae_full_warmup

    backend = steer_backend(spec, inner="eager")
    step = compiled(model, backend)
    step(ids(2, 8))
    before = sae_full_warmup._compiled()
    assert before > 0
    backend.runtime.saes.attach("one", made("topk"), whole=True)
    with backend.runtime.steer(features=SAESteering("one", CLAMPS, mode="reconstruct", log=True)):
        step(ids(2, 8))
    assert sae_full_warmup._compiled() == before


def test_many_attaches_between_replays_leak_nothing(model: Any) -> None:  # noqa: F811
    spec = SteerSpec(steer=(HookSelection("post_block", [LAYER], ("add", "sae")),), max_tokens=64, features=8)
    backend, x = steer_backend(spec, mode="reduce-overhead"), ids(2, 8)
    step, one = compiled(model, backend), made("jumprelu")
    warm(step, x)
    idle = step(x)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated()
    for number in range(20):
        backend.runtime.saes.attach("one", one, features=(number, number + 50))
        with backend.runtime.steer(features=SAESteering("one", [FeatureClamp(number, 9.0)])):
            assert not torch.equal(step(x), idle)
        backend.runtime.saes.detach("one")
    assert torch.equal(step(x), idle)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= taken + (1 << 20)
