"""On a CUDA device: what the template takes over around a site, in graphs that Inductor compiles for any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import SteerBackend, SteerSpec, steer_backend
from steer_compile.coverage import zoo
from tests._vllm_ir import WIDTH, Decoder, by_hand, define

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
]

HOOKS = ("post_attn", "post_block")
SHAPES = ((2, 32), (3, 7), (9, 40))


def ids(shape: tuple[int, int]) -> Tensor:
    return torch.arange(shape[0] * shape[1], device="cuda").view(shape) % 50


def run(model: Any, lowering: str, inner: Any) -> tuple[SteerBackend, list[dict[Any, Tensor]]]:
    """Logits and captures of each shape with a vector at every site."""
    torch._dynamo.reset()
    backend = steer_backend(
        SteerSpec(steer=HOOKS, capture=("post_block",), max_tokens=512, lowering=lowering), inner=inner
    )
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(3)
    found: list[dict[Any, Tensor]] = []
    with torch.no_grad():
        compiled(input_ids=ids(SHAPES[0]), use_cache=False)
        sites = backend.runtime.tables.steered()
        vectors = {site: torch.randn(backend.runtime.tables.width(site) or 0, generator=generator) for site in sites}
        with backend.runtime.steer(vectors):
            for shape in SHAPES:
                with backend.runtime.capture() as log:
                    logits = compiled(input_ids=ids(shape), use_cache=False).logits.clone()
                found.append({"logits": logits.cpu(), **{site: log[site].cpu() for site in log}})
    return backend, found


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("name", ["gemma2", "olmo2", "granite", "gpt2"])
def test_fused_sites_of_any_shape_are_those_of_plain_operators(name: str) -> None:
    model = zoo.tiny_model(name).cuda()
    _, expected = run(model, "compiler", "eager")
    backend, got = run(model, "template", "inductor")
    assert {edit.lowering for edit in backend.plans[0].edits} == {"template"}
    assert any("fused with" in edit.text() for edit in backend.plans[0].edits)
    assert len(backend.plans) < len(SHAPES)  # a graph served several shapes
    for values, wanted in zip(got, expected, strict=True):
        assert values.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gemma", [False, True])
def test_sums_that_the_norm_makes(gemma: bool) -> None:
    define()
    torch.manual_seed(0)
    model = Decoder(gemma=gemma).to("cuda", torch.bfloat16).requires_grad_(False)
    torch._dynamo.reset()
    backend = steer_backend(SteerSpec(steer=HOOKS, capture=HOOKS, max_tokens=512, lowering="template"))
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    first = ids(SHAPES[0])
    for dimension in range(2):
        torch._dynamo.mark_dynamic(first, dimension)  # ``dynamic=True`` makes eps an input, and the kernel a refusal
    compiled(first)
    generator = torch.Generator().manual_seed(1)
    vectors = {site: torch.randn(WIDTH, generator=generator) for site in backend.runtime.tables.steered()}
    with backend.runtime.steer(vectors):
        for shape in SHAPES:
            with backend.runtime.capture() as log:
                logits = compiled(ids(shape))
            wanted, values = by_hand(model, ids(shape), {site: v.cuda() for site, v in vectors.items()})
            assert (logits - wanted).float().norm() < 2e-2 * wanted.float().norm()
            for site, value in values.items():
                flat = value.reshape(-1, WIDTH).float()
                assert (log[site].reshape(-1, WIDTH) - flat).float().norm() < 1e-2 * flat.norm()
