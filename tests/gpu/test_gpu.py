"""On a CUDA device: replays of CUDA graphs see every change of the tables; nothing is compiled or recorded again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import SteerBackend, Steering, SteerSpec, TokenSelection, steer_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch's own empty graph, to make a memory pool
]

LAYERS, WIDTH, VOCABULARY = 4, 256, 512
HOOKS = ("post_attn", "post_block")
Step = Callable[[Tensor], Tensor]


def vectors(seed: int) -> dict[str, dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {h: {n: 0.05 * torch.randn(WIDTH, generator=generator) for n in range(LAYERS)} for h in HOOKS}


def ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(VOCABULARY, (batch, length), generator=generator).cuda()


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def compiled(model: Any, backend: Any, **options: Any) -> Step:
    """Logits of the model as a function of ids, on CUDA graphs once it was called three times."""
    inner = torch.compile(
        lambda x: model(input_ids=x, use_cache=False).logits, backend=backend, dynamic=False, **options
    )

    def step(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = inner(x).clone()
        return logits

    return step


def warm(step: Step, x: Tensor) -> Tensor:
    for _ in range(3):
        logits = step(x)
    return logits


def expected(model: Any, x: Tensor, edits: list[dict[str, dict[int, Tensor]]], scale: float = 1.0) -> Tensor:
    """Logits of the uncompiled fp32 model with the same edits made by forward hooks; one edit for each sequence."""
    wide, handles = copy.deepcopy(model).float(), []
    table = {
        (h, n): torch.stack([e[h][n] for e in edits])[:, None].cuda() * scale for h in HOOKS for n in range(LAYERS)
    }
    for n, layer in enumerate(wide.model.layers):
        at_attn, at_block = table["post_attn", n], table["post_block", n]
        handles.append(layer.self_attn.register_forward_hook(lambda m, i, out, v=at_attn: (out[0] + v, *out[1:])))
        handles.append(layer.register_forward_hook(lambda m, i, out, v=at_block: out + v))
    logits: Tensor = wide(input_ids=x, use_cache=False).logits
    return logits


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def assert_near(out: Tensor, reference: Tensor, tolerance: float = 2e-2) -> None:
    error = relative(out, reference)
    assert error < tolerance, error


@pytest.fixture
def events() -> Iterator[Any]:
    from benchmarks.changes import watch

    with torch.no_grad(), watch() as found:
        yield found


def make(*capture: str, **options: Any) -> SteerBackend:
    return steer_backend(SteerSpec(steer=HOOKS, capture=capture, rows=16, max_tokens=128), **options)


@pytest.mark.behaviour(5)
@pytest.mark.parametrize("where", ["backend", "compile"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 16)])
def test_replays_see_the_tables(model: Any, events: Any, where: str, shape: tuple[int, int]) -> None:
    mode = {"mode": "reduce-overhead"}
    backend = make(**(mode if where == "backend" else {}))
    step, x = compiled(model, backend, **(mode if where == "compile" else {})), ids(*shape)
    idle = warm(step, x)
    assert (events.compiled, events.recorded, events.skipped) == (1, 1, 0)
    for seed in range(3):
        with backend.runtime.steer(vectors(seed), scale=0.5):
            assert_near(step(x), expected(model, x, [vectors(seed)], 0.5))
        assert torch.equal(step(x), idle)
    assert (events.compiled, events.recorded, events.without_graph, events.skipped) == (1, 1, 1, 0)


def test_idle_equals_the_plain_model(model: Any, events: Any) -> None:
    x = ids(2, 16)
    plain = warm(compiled(model, "inductor", mode="reduce-overhead"), x)
    idle = warm(compiled(model, make(mode="reduce-overhead")), x)
    wide = copy.deepcopy(model).float()(input_ids=x, use_cache=False).logits
    assert relative(idle, wide) <= 1.25 * relative(plain, wide)  # bit for bit they differ: see docs/performance.md


@pytest.mark.behaviour(83)
def test_each_sequence_has_its_own_row(model: Any, events: Any) -> None:
    backend, x = make(mode="reduce-overhead"), ids(4, 8)
    step = compiled(model, backend)
    idle = warm(step, x)
    rows = [Steering(vectors(seed)) for seed in range(4)]
    with backend.runtime.steer(rows=rows):
        assert_near(step(x), expected(model, x, [vectors(seed) for seed in range(4)]))
    with backend.runtime.steer(rows=[None, rows[1], None, None]):
        one = step(x)
    assert torch.equal(one[0], idle[0])
    assert torch.equal(one[2:], idle[2:])
    assert not torch.equal(one[1], idle[1])


@pytest.mark.behaviour(42)
def test_scales_and_globals_change_between_replays(model: Any, events: Any) -> None:
    backend, x = make(mode="reduce-overhead"), ids(2, 8)
    step, runtime = compiled(model, backend), backend.runtime
    idle = warm(step, x)
    handle = runtime.register(Steering(vectors(1)))
    runtime.assign(handle)
    for scale in (1.0, -0.5, 2.0):
        runtime.set_scale(handle, scale)
        assert_near(step(x), expected(model, x, [vectors(1)], scale))
    runtime.set_scale(handle, 0.0)
    assert torch.equal(step(x), idle)
    runtime.assign(None)
    runtime.release(handle)
    runtime.set_global(prefill=vectors(2))
    assert_near(step(x), expected(model, x, [vectors(2)]))
    runtime.clear_global()
    assert torch.equal(step(x), idle)
    assert (events.compiled, events.recorded, events.without_graph, events.skipped) == (1, 1, 1, 0)


@pytest.mark.behaviour(33)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64)])
def test_capture_is_the_value_before_the_steer(model: Any, events: Any, shape: tuple[int, int]) -> None:
    backend, x = make("pre_attn", "post_block", mode="reduce-overhead"), ids(*shape)
    step = compiled(model, backend)
    warm(step, x)
    hidden = model(input_ids=x, use_cache=False, output_hidden_states=True).hidden_states
    for _ in range(2):
        with backend.runtime.capture() as log:
            step(x)
        assert torch.equal(log["pre_attn", 0], hidden[0])
        for n in range(LAYERS - 1):
            assert_near(log["post_block", n], hidden[n + 1])
    edit = {"post_block": {LAYERS - 1: torch.full((WIDTH,), 3.0)}}
    with backend.runtime.capture() as unsteered:
        step(x)
    with backend.runtime.capture() as steered, backend.runtime.steer(edit):
        step(x)
    assert torch.equal(steered["post_block", LAYERS - 1], unsteered["post_block", LAYERS - 1])
    assert (events.compiled, events.recorded, events.without_graph, events.skipped) == (1, 1, 1, 0)


@pytest.mark.parametrize("lowering", ["compiler", "template"])
def test_replays_store_the_tokens_that_are_chosen(model: Any, events: Any, lowering: str) -> None:
    room: Any = {"rows": 16, "max_tokens": 128, "capture_rows": 32, "lowering": lowering}
    backend, x = steer_backend(SteerSpec(steer=HOOKS, capture=HOOKS, **room), mode="reduce-overhead"), ids(2, 16)
    step = compiled(model, backend)
    idle = warm(step, x)
    with backend.runtime.capture() as whole:
        step(x)
    hidden = model(input_ids=x, use_cache=False, output_hidden_states=True).hidden_states
    every = whole.rows
    assert_near(every.values["layers.0.post_block"].cuda(), hidden[1].flatten(0, 1))
    for start, at in ((3, [3, 19]), (7, [7, 23])):
        chosen = TokenSelection(spans=((start, start + 1),))
        with backend.runtime.capture([chosen, chosen], [("post_block", 1), "post_attn"]) as log:
            assert torch.equal(step(x), idle)
        rows = log.rows
        assert rows.token_ids.tolist() == x.flatten()[at].tolist()
        assert len(rows.values) == LAYERS + 1
        assert all(torch.equal(value, every.values[key][at]) for key, value in rows.values.items())
    assert (events.compiled, events.recorded, events.without_graph, events.skipped) == (1, 1, 1, 0)


def test_a_graph_recorded_by_hand_sees_vectors_and_scales(model: Any, events: Any) -> None:
    backend, x = make(), ids(2, 8)
    step, runtime = (
        torch.compile(lambda y: model(input_ids=y, use_cache=False).logits, backend=backend),
        backend.runtime,
    )
    handle = runtime.register(Steering(vectors(3)))
    runtime.assign(handle)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(x)
    for scale in (1.0, 0.0, -1.0):
        runtime.set_scale(handle, scale)
        graph.replay()
        assert_near(logits, expected(model, x, [vectors(3)], scale))
    runtime.set_global(base=vectors(4))
    runtime.set_scale(handle, 1.0)
    graph.replay()
    both = {h: {n: vectors(3)[h][n] + vectors(4)[h][n] for n in range(LAYERS)} for h in HOOKS}
    assert_near(logits, expected(model, x, [both]))
    assert events.compiled == 1
