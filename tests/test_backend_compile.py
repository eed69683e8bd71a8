"""The backend inside torch.compile: inner compilers, options, shapes, graph breaks, recompiles, training, copies."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from steer_compile import Steering, SteerSpec, TokenSelection, steer_backend
from steer_compile.errors import LoweringError, SiteNotFound, SteerError, TooManyTokens
from tests._models import LAYERS, WIDTH, adding, compiled, direction, edited, logits, spec, tokens, toy
from tests._models import watched as eager_values

VECTOR = direction(1)
AT = {("post_block", 1): VECTOR}


def steered_eager(model: Any, ids: Tensor) -> Tensor:
    with edited(model, adding(AT)):
        return logits(model, ids)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check(model: Any, backend: Any, run: Any, *batches: Tensor) -> None:
    for ids in batches:
        close(logits(run, ids), logits(model, ids))
        with backend.runtime.steer(AT):
            close(logits(run, ids), steered_eager(model, ids))


# -- inner compilers and options --------------------------------------------------------------------------------------


@pytest.mark.behaviour(5, 33)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_idle_is_bit_equal_to_the_model_without_the_backend(inner: str) -> None:
    model, ids = toy(), tokens()
    plain = logits(compiled(model, inner), ids)
    torch.compiler.reset()
    stored = ("post_attn", "post_block")
    backend = steer_backend(spec("post_block", "attn_out", capture=stored), inner=inner)
    run = compiled(model, backend, fullgraph=True)
    assert torch.equal(logits(run, ids), plain)
    with eager_values(model, *stored) as seen:
        logits(model, ids)
    with backend.runtime.capture() as log:
        logits(run, ids)
    for site, (value,) in seen.items():  # nothing reads what is stored, and it is stored
        close(log[site], value)
    check(model, backend, run, ids)
    with backend.runtime.steer({("post_block", 0): torch.zeros(WIDTH)}):
        assert torch.equal(logits(run, ids), plain)


def test_options_given_to_torch_compile_reach_the_inner_compiler() -> None:
    seen: list[dict[str, Any]] = []

    def inner(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(kwargs)
        return gm.forward

    given: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({}, {}, {}),
        ({}, {"mode": "max-autotune"}, {"mode": "max-autotune"}),
        ({"options": {"a": 1}}, {}, {"options": {"a": 1}}),
        ({"options": {"a": 1}}, {"options": {"b": 2}}, {"options": {"b": 2}}),
    ]
    for own, passed, expected in given:
        torch.compiler.reset()
        run = compiled(toy(), steer_backend(spec("post_block"), inner, **own), **passed)
        logits(run, tokens())
        assert seen.pop() == expected
        assert not seen


def test_inductor_takes_mode_and_options_from_both_sides() -> None:
    model, ids = toy(), tokens()
    for own, passed in (({"mode": "default"}, {}), ({}, {"options": {"max_fusion_size": 8}})):
        torch.compiler.reset()
        backend = steer_backend(spec("post_block"), **own)
        check(model, backend, compiled(model, backend, **passed), ids)
    with pytest.raises(RuntimeError, match="no_such_option"):
        logits(compiled(model, steer_backend(spec("post_block")), options={"no_such_option": 1}), ids)


def test_a_callable_inner_sees_the_spliced_graph() -> None:
    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block", capture="post_block"), inner=inner)
    check(model, backend, compiled(model, backend, fullgraph=True), ids)
    (gm,) = graphs
    buffers = {n.target for n in gm.graph.nodes if n.op == "get_attr" and str(n.target).startswith("steer_")}
    banks = {f"steer_bank_{i}" for i in range(LAYERS + 1)}  # a capture for each layer, and the vectors of all
    assert buffers == banks | {"steer_rows", "steer_scale"}
    gm.graph.lint()


def test_two_backends_in_a_chain_are_refused() -> None:
    inside = steer_backend(SteerSpec(capture="post_block", max_tokens=64), inner="eager")
    run = compiled(toy(), steer_backend(spec("mlp_out"), inner=inside))
    with pytest.raises(LoweringError, match="another steer_backend has instrumented this graph; give one spec"):
        logits(run, tokens())


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_dynamic_shapes_are_one_graph() -> None:
    model = toy()
    backend = steer_backend(spec("post_block", capture="post_block"), inner="eager")
    run = compiled(model, backend, fullgraph=True, dynamic=True)
    check(model, backend, run, tokens(2, 7), tokens(3, 5), tokens(4, 9))
    assert len(backend.plans) == 1
    rows = [Steering({"post_block": {1: VECTOR}}, tokens=TokenSelection(((0, n),))) for n in (1, 2, 3)]
    with backend.runtime.steer(rows=rows), backend.runtime.capture() as log:
        logits(run, tokens(3, 4))
    assert log["post_block", 1].shape == (3, 4, WIDTH)


def test_graphs_of_several_shapes_share_the_tables() -> None:
    model = toy()
    backend = steer_backend(spec("post_block"), inner="eager")
    run = compiled(model, backend, dynamic=False)
    check(model, backend, run, tokens(2, 7), tokens(1, 3))
    bytes_before = backend.runtime.status()["bytes"]
    check(model, backend, run, tokens(1, 1), tokens(3, 3))
    assert len(backend.plans) == 4
    assert backend.runtime.status()["bytes"] == bytes_before


def test_more_tokens_than_the_spec_has_room_for() -> None:
    model = toy()
    ran: list[int] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            return gm.forward(*args)

        return run

    backend = steer_backend(spec("post_block", max_tokens=14), inner=inner)
    run = compiled(model, backend, dynamic=True)
    check(model, backend, run, tokens(2, 7))
    done, status = len(ran), backend.runtime.status()
    with pytest.raises(TooManyTokens, match="3 x 5 = 15 tokens but the spec has max_tokens=14; raise it"):
        logits(run, tokens(3, 5))
    assert len(ran) == done
    assert backend.runtime.status() == status
    check(model, backend, run, tokens(2, 5))


class Pointwise(nn.Module):
    """A residual network that takes a batch of any size, zero included."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + layer(h)
        return h


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_call_without_tokens(shape: tuple[int, int]) -> None:
    backend = steer_backend(spec("post_block", capture="post_block"), inner="aot_eager")
    run = compiled(Pointwise(), backend, fullgraph=True)
    with torch.no_grad(), backend.runtime.steer({"post_block": {0: torch.ones(8)}}), backend.runtime.capture() as log:
        assert run(torch.zeros(*shape, 8)).shape == (*shape, 8)
        run(torch.zeros(3, 4, 8))
    assert [step["post_block", 0].shape for step in log.steps] == [(*shape, 8), (3, 4, 8)]


# -- graph breaks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2])
def test_a_break_between_blocks_keeps_the_layer_numbers(cut: int) -> None:
    model, reference, ids = toy(layers=4, cut=cut), toy(layers=4), tokens()
    backend = steer_backend(spec("post_block", "pre_attn", capture="post_block"), inner="eager")
    run = compiled(model, backend)
    with backend.runtime.capture() as log:
        logits(run, ids)
        logits(run, ids)
    with eager_values(reference, "post_block", layers=4) as seen:
        logits(reference, ids)
    assert len(log) == 2
    assert backend.sites.layers == (0, 1, 2, 3)
    assert backend.runtime.calls == 2
    for layer in range(4):
        close(log["post_block", layer], torch.cat(seen["post_block", layer] * 2, 1))
        for hook in ("post_block", "pre_attn"):
            with edited(reference, adding({(hook, layer): VECTOR})):
                expected = logits(reference, ids)
            with backend.runtime.steer({(hook, layer): VECTOR}):
                close(logits(run, ids), expected)


def test_a_break_inside_a_block_is_refused() -> None:
    model = toy(layers=3, cut=1, inside=True)
    run = compiled(model, (backend := steer_backend(spec("post_block"), inner="eager")))
    with pytest.raises(SteerError), backend.runtime.steer({("post_block", 2): VECTOR}):
        logits(run, tokens())


# -- no recompiles ----------------------------------------------------------------------------------------------------


def test_nothing_at_run_time_compiles_again() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block", "mlp_out", capture="post_block"), inner="aot_eager")
    run = compiled(model, backend, fullgraph=True)
    runtime = backend.runtime
    logits(run, ids)
    torch._dynamo.utils.counters.clear()
    runtime.set_global({"mlp_out": {0: VECTOR}}, decode=AT)
    logits(run, ids)
    handle = runtime.register(Steering(AT))
    runtime.assign(handle)
    logits(run, ids)
    runtime.set_scale(handle, 0.25)
    runtime.assign([None, handle])
    logits(run, ids)
    last = Steering({"mlp_out": {1: VECTOR}}, tokens=TokenSelection(last_prompt=True))
    with runtime.steer(rows=[last, None]), runtime.capture():
        logits(run, ids)
    runtime.register_vectors("a", AT)
    with runtime.steer(named="a", phase="decode"):
        logits(run, ids)
    runtime.clear_global()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["recompiles"]
    assert len(backend.plans) == 1


def test_a_reset_of_dynamo_keeps_vectors_and_rows() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block"), inner="eager")
    run = compiled(model, backend)
    backend.runtime.assign(backend.runtime.register(Steering(AT)))
    close(logits(run, ids), steered_eager(model, ids))
    torch.compiler.reset()
    assert (backend.tables, backend.plans, len(backend.sites)) == ([], [], 0)
    close(logits(run, ids), steered_eager(model, ids))
    assert len(backend.plans) == 1


# -- modes of torch ---------------------------------------------------------------------------------------------------


def gradients(model: Any, run: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_training_through_a_steered_graph() -> None:
    model, ids = toy().train(), tokens()
    backend = steer_backend(spec("post_block", capture="post_block"), inner="aot_eager")
    run = compiled(model, backend, fullgraph=True)
    plain = gradients(model, model, ids)
    with edited(model, adding(AT)):
        expected = gradients(model, model, ids)
    for _ in range(2):
        with backend.runtime.steer(AT), backend.runtime.capture() as log:
            got = gradients(model, run, ids)
        assert not log["post_block", 1].requires_grad
        for a, b in zip(got, expected, strict=True):
            close(a, b, 1e-4)
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got, plain, strict=True))
    assert not any(tensor.requires_grad for tensor in backend.runtime.tables.tensors)


def test_autocast() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block", "attn_out"), inner="aot_eager")
    run = compiled(model, backend, fullgraph=True)
    vectors = AT | {("attn_out", 0): VECTOR}
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(run, ids)
        close(plain, logits(model, ids), 5e-2)
        with edited(model, adding(vectors)):
            expected = logits(model, ids)
        with backend.runtime.steer(vectors):
            close(logits(run, ids), expected, 0.1)
    assert not torch.allclose(plain, expected, atol=0.3)


def test_tables_that_are_made_inside_inference_mode_can_change_outside() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block", capture="post_block"), inner="eager")
    run = compiled(model, backend)
    with torch.inference_mode():
        run(ids)
    backend.runtime.set_global(AT)
    with torch.inference_mode():
        got = run(ids).logits.clone()
    close(got, steered_eager(model, ids))
    backend.runtime.clear_global()
    check(model, backend, run, ids)


# -- several models, several threads ----------------------------------------------------------------------------------


def test_two_models_share_nothing() -> None:
    ids = tokens()
    models = [toy(), toy()]
    backends = [steer_backend(spec("post_block"), inner="eager") for _ in models]
    runs = [compiled(model, backend) for model, backend in zip(models, backends, strict=True)]
    plain = logits(models[0], ids)
    for run in runs:
        close(logits(run, ids), plain)
    backends[0].runtime.set_global(AT)
    close(logits(runs[0], ids), steered_eager(models[0], ids))
    close(logits(runs[1], ids), plain)


def test_a_copy_of_a_compiled_model_is_not_steered_with_it() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block"), inner="eager")
    run = compiled(model, backend)
    plain = logits(run, ids)
    twin = copy.deepcopy(run)
    backend.runtime.set_global(AT)
    assert torch.equal(logits(twin, ids), plain)
    close(logits(run, ids), steered_eager(model, ids))


@pytest.mark.behaviour(43)
def test_threads_register_while_the_model_runs() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block", rows=10), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    runtime = backend.runtime
    runtime.assign([None, runtime.register(Steering(AT))])
    expected = logits(run, ids)
    stop = threading.Event()

    def churn(seed: int) -> int:
        turns = 0
        while not stop.is_set():
            runtime.release(runtime.register(Steering({"post_block": {seed % 2: direction(seed)}}, scale=seed + 1)))
            turns += 1
        return turns

    with ThreadPoolExecutor(3) as pool:
        churners = [pool.submit(churn, seed) for seed in range(3)]
        try:
            results = [logits(run, ids) for _ in range(15)]
        finally:
            stop.set()
        assert all(churner.result() > 0 for churner in churners)
    assert all(torch.equal(result, expected) for result in results)
    assert runtime.status()["rows"] == 2
    close(expected[1:], steered_eager(model, ids)[1:])


def test_a_model_without_a_stream_is_refused_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    run = compiled(model, steer_backend(spec("post_block"), inner="eager"))
    with pytest.raises(SiteNotFound, match="no site in this model: .*; see `steer-compile sites`"):
        run(torch.randn(2, 3, 8))
