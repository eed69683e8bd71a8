"""A steered toy, compiled by the backend, equals the toy that makes the same edit itself; or the backend refuses."""

import pytest
import torch
from torch import Tensor

from steer_compile import SteerSpec, steer_backend
from steer_compile.ir import Site
from steer_compile.passes.find_sites import find_sites
from tests._graphs import trace
from tests._toys import TOYS, Toy, make
from tests._toys_base import Key

REFUSALS = (RuntimeError, ValueError, LookupError)
KEY = ("post_block", 1)


def site_of(toy: Toy) -> tuple[Site | None, int]:
    """The site to steer, and the number of layers that it is counted among."""
    gm, _ = trace(toy, *toy.inputs())
    table = find_sites(gm)
    site = table.find(*KEY)
    return (site if isinstance(site, Site) else None), table.n_layers


def own_key(toy: Toy, n_layers: int) -> Key:
    """The toy's own number of that site: the finder may count the layers by another of the toy's schemes."""
    truth = next(truth for count, truth in toy.schemes() if count == n_layers and KEY in truth)
    return next((key for key, value in toy.truth.items() if key[0] == KEY[0] and value is truth[KEY]), KEY)


def steer_compiled(toy: Toy, vector: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits of the compiled toy, idle and steered."""
    torch._dynamo.reset()
    backend = steer_backend(SteerSpec(steer=("post_block",), layers="all", rows=2, max_tokens=64), inner="eager")
    compiled = torch.compile(toy, backend=backend, fullgraph=True)
    with torch.no_grad():
        idle = compiled(*toy.inputs())
        with backend.runtime.steer({"post_block": {1: vector}}, scale=scale):
            return idle, compiled(*toy.inputs())


@pytest.mark.parametrize("name", TOYS)
def test_compiled_steering_equals_the_toys_own_edit(name: str) -> None:
    toy = make(name)
    with torch.no_grad():
        plain = toy(*toy.inputs())
    site, n_layers = site_of(toy)
    if site is None:
        assert toy.expect != "found"
        with pytest.raises(REFUSALS):
            steer_compiled(toy, torch.ones(16), 2.0)
        return
    vector = torch.linspace(-1, 1, site.width) ** 3
    toy.edit[own_key(toy, n_layers)] = 2.0 * vector.to(site.dtype)
    with torch.no_grad():
        expected = toy(*toy.inputs())
    idle, steered = steer_compiled(toy, vector, 2.0)
    tolerance = 1e-4 if site.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(idle, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steered, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.behaviour(50)
@pytest.mark.parametrize("name", ["prenorm_layernorm", "postnorm", "inplace_method", "deferred"])
def test_after_the_steer_context_the_model_is_idle_again(name: str) -> None:
    toy = make(name)
    backend = steer_backend(SteerSpec(steer=("post_block",), layers="all", rows=2, max_tokens=64), inner="eager")
    torch._dynamo.reset()
    compiled = torch.compile(toy, backend=backend, fullgraph=True)
    with torch.no_grad():
        before = compiled(*toy.inputs())
        with backend.runtime.steer({"post_block": {1: torch.linspace(-1, 1, 16)}}, scale=2.0):
            steered = compiled(*toy.inputs())
        after = compiled(*toy.inputs())
    assert torch.equal(before, after)
    assert not torch.allclose(before, steered, atol=1e-3)
