"""A compiled, steered model equals the eager model with forward hooks that make the same edit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, Steering, SteerSpec, TokenSelection, steer_backend
from steer_compile.errors import NotSteered, SiteNotFound, VectorError
from steer_compile.hooks import BRANCH_HOOKS, STREAM_HOOKS
from tests._models import (
    LAYERS,
    WIDTH,
    adding,
    compiled,
    direction,
    edited,
    gpt2,
    llama,
    logits,
    mamba,
    spec,
    tokens,
    toy,
)
from tests._models import watched as eager_values

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "mamba": mamba}
STREAM = ("pre_attn", "post_attn", "post_block")


def hooks_of(name: str) -> tuple[str, ...]:
    return (*STREAM, "attn_in", "attn_out") if name == "mamba" else (*STREAM_HOOKS, *BRANCH_HOOKS)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("name", MODELS)
def test_steering_equals_forward_hooks_at_every_hook(name: str) -> None:
    model, ids = MODELS[name](), tokens()
    hooks = hooks_of(name)
    backend = steer_backend(spec(*hooks), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    plain = logits(model, ids)
    close(logits(run, ids), plain)
    for i, hook in enumerate(hooks):
        for layer in range(LAYERS):
            vectors = {(hook, layer): direction(10 * i + layer)}
            with edited(model, adding(vectors)):
                expected = logits(model, ids)
            with backend.runtime.steer(vectors):
                got = logits(run, ids)
            close(got, expected)
            assert not torch.allclose(got, plain, atol=1e-2), (hook, layer)
    close(logits(run, ids), plain)
    assert len(backend.plans) == 1


@pytest.mark.parametrize("name", MODELS)
def test_edits_at_all_hooks_at_once(name: str) -> None:
    model, ids = MODELS[name](), tokens()
    hooks = hooks_of(name)
    backend = steer_backend(spec(*hooks), inner="aot_eager")
    run = compiled(model, backend, fullgraph=True)
    sites = [(hook, layer) for hook in hooks for layer in range(LAYERS)]
    vectors = {site: direction(i, 0.5) for i, site in enumerate(sites)}
    with edited(model, adding(vectors)):
        expected = logits(model, ids)
    with backend.runtime.steer(vectors):
        close(logits(run, ids), expected, 1e-4)


@pytest.mark.behaviour(32, 35)
@pytest.mark.parametrize("name", MODELS)
def test_captures_are_the_values_that_forward_hooks_see(name: str) -> None:
    model, ids = MODELS[name](), tokens()
    hooks = hooks_of(name)
    backend = steer_backend(SteerSpec(capture=hooks, max_tokens=32), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    watched = [hook for hook in hooks if hook != "post_attn" or name != "mamba"]
    with eager_values(model, *watched) as seen:
        logits(model, ids)
    with backend.runtime.capture() as log:
        logits(run, ids)
    for site, (value,) in seen.items():
        close(log[site], value)
    assert set(log) == {(hook, layer) for hook in hooks for layer in range(LAYERS)}
    if name != "mamba":  # it publishes the states behind its blocks only
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        close(log["pre_attn", 0], states[0])
        close(log["post_block", 0], states[1])


@pytest.mark.behaviour(34)
def test_a_capture_is_the_value_in_front_of_the_steer_at_its_own_hook() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(SteerSpec(steer=STREAM, capture=(*STREAM, "attn_in"), max_tokens=32), inner="aot_eager")
    run = compiled(model, backend)
    vectors = {(hook, layer): direction(layer) for hook in STREAM for layer in range(LAYERS)}
    with backend.runtime.steer(vectors), backend.runtime.capture() as log:
        logits(run, ids)
    close(log["pre_attn", 1], log["post_block", 0] + direction(0), 1e-4)
    with edited(model, adding(vectors)), eager_values(model, "attn_in") as seen:
        logits(model, ids)
    for layer in range(LAYERS):
        close(log["attn_in", layer], seen["attn_in", layer][0], 1e-4)


@pytest.mark.parametrize("hook", ["pre_attn", "post_attn"])
def test_after_the_norm_the_branch_does_not_see_the_edit(hook: str) -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec(hook, placement="after_norm", capture="attn_in"), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    vectors = {(hook, 0): direction(4)}
    with edited(model, adding(vectors), "after_norm"), eager_values(model, "attn_in") as seen:
        expected = logits(model, ids)
    with edited(model, adding(vectors)):
        visible = logits(model, ids)
    with backend.runtime.steer(vectors), backend.runtime.capture() as log:
        got = logits(run, ids)
    close(got, expected)
    assert not torch.allclose(got, visible, atol=1e-2)
    for layer in range(LAYERS):
        close(log["attn_in", layer], seen["attn_in", layer][0])


def test_after_the_norm_hooks_that_share_a_value_and_its_skip_reader_add_up() -> None:
    model, ids, options = mamba(), tokens(), {"inner": "eager"}
    both = steer_backend(spec("post_attn", "pre_attn", placement="after_norm"), **options)
    one = steer_backend(spec("pre_attn", placement="after_norm"), **options)
    run, alone = compiled(model, both), compiled(model, one)
    first, second = direction(1, width=model.config.hidden_size), direction(2, width=model.config.hidden_size)
    for vectors, total in (
        ({("pre_attn", 1): second}, second),
        ({("post_attn", 0): first}, first),
        ({("post_attn", 0): first, ("pre_attn", 1): second}, first + second),
    ):
        with one.runtime.steer({("pre_attn", 1): total}):
            expected = logits(alone, ids)
        with both.runtime.steer(vectors):
            close(logits(run, ids), expected)


@pytest.mark.parametrize("hook", STREAM)
def test_bf16_is_rounded_once(hook: str) -> None:
    model, ids = toy(torch.bfloat16), tokens()
    backend = steer_backend(spec(hook, capture="pre_attn"), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    vectors = {(hook, 0): direction(3).bfloat16().float()}
    with edited(model, adding(vectors)), eager_values(model, "pre_attn") as seen:
        logits(model, ids)
    with backend.runtime.steer(vectors), backend.runtime.capture() as log:
        logits(run, ids)
    got, expected = log["pre_attn", 1], seen["pre_attn", 1][0]
    assert got.dtype == torch.bfloat16
    if hook == "post_block":
        assert torch.equal(got, expected)
    close(got, expected, 4e-2)


def test_an_fp64_stream_keeps_its_digits() -> None:
    model, ids = toy(torch.float64), tokens()
    backend = steer_backend(spec("post_block"), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    assert torch.equal(logits(run, ids), logits(model, ids))
    vector = direction(1)
    with edited(model, {("post_block", 1): lambda h: h + vector.double()}):
        expected = logits(model, ids)
    with backend.runtime.steer({"post_block": {1: vector}}):
        close(logits(run, ids), expected, 1e-12)


@pytest.mark.behaviour(2)
def test_rows_of_a_mixed_batch() -> None:
    model, ids = toy(), tokens(5)
    backend = steer_backend(spec("post_block", "attn_out"), inner="aot_eager")
    run = compiled(model, backend)
    runtime = backend.runtime
    runtime.register_vectors("named", {"attn_out": {0: direction(8)}})
    configs = [
        None,
        Steering({"post_block": {1: direction(1)}}),
        Steering({"post_block": {0: direction(2)}}, scale=-1.5),
        Steering(prefill={"attn_out": {0: direction(3)}}, decode={"post_block": {0: direction(9)}}, named="named"),
        Steering({"post_block": {1: direction(1)}}),
    ]
    edits: list[dict[tuple[str, int], Tensor]] = [
        {},
        {("post_block", 1): direction(1)},
        {("post_block", 0): -1.5 * direction(2)},
        {("attn_out", 0): direction(3) + direction(8)},
        {("post_block", 1): direction(1)},
    ]
    expected = []
    for b, vectors in enumerate(edits):
        with edited(model, adding(vectors)):
            expected.append(logits(model, ids[b : b + 1]))
    with runtime.steer(rows=configs):
        close(logits(run, ids), torch.cat(expected))
        assert runtime.status()["rows"] == 6
        with pytest.raises(NotSteered, match="5 rows are assigned but the call has 2 sequences; assign one handle or"):
            logits(run, ids[:2])
    assert runtime.status()["rows"] == 0


SELECTIONS = [
    (TokenSelection(((0, 3),)), [0, 1, 2]),
    (TokenSelection(((-2, None), (1, 2))), [1, 5, 6]),
    (TokenSelection(last_prompt=True), [6]),
    (TokenSelection(((None, -5),), last_prompt=True, generated=True), [0, 1, 6]),
    (TokenSelection(generated=True), []),
]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_only_the_selected_tokens_are_steered(padding: str | None) -> None:
    model, ids = toy(), tokens(len(SELECTIONS))
    backend = steer_backend(spec("post_block", capture="pre_attn"), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    rows = [Steering({"post_block": {0: direction(1)}}, tokens=chosen) for chosen, _ in SELECTIONS]
    mask = torch.zeros(*ids.shape, 1)
    for b, (_, positions) in enumerate(SELECTIONS):
        mask[b, positions] = 1
    options: dict[str, Any] = {}
    if padding is not None:
        pads = torch.zeros(len(SELECTIONS), 3)
        ids = torch.cat([pads.long(), ids] if padding == "left" else [ids, pads.long()], 1)
        mask = torch.cat([pads[..., None], mask] if padding == "left" else [mask, pads[..., None]], 1)
        options = {"prompt_lengths": [7] * len(SELECTIONS), "padding": padding}
    with backend.runtime.capture() as log:
        logits(run, ids)
    with backend.runtime.steer(rows=rows, **options), backend.runtime.capture() as steered:
        logits(run, ids)
    close(steered["pre_attn", 1] - log["pre_attn", 1], mask * direction(1))


def test_layers_of_a_selection() -> None:
    backend = steer_backend(
        SteerSpec(steer=[HookSelection("post_block", [-1]), HookSelection("mlp_out", "0-1")], max_tokens=32),
        inner="eager",
    )
    run = compiled(toy(), backend, fullgraph=True)
    logits(run, tokens())
    assert backend.runtime.status()["sites"] == ["layers.1.post_block", "layers.0.mlp_out", "layers.1.mlp_out"]
    with pytest.raises(SiteNotFound, match=r"no compiled graph has layers\.0\.post_block; 3 sites can be steered"):
        backend.runtime.set_global({"post_block": {0: direction(1)}})


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (HookSelection("post_block", 7), r"no site layers\.7\.post_block: the graph has layers 0 to 1; "),
        (HookSelection("write_5"), r"no site layers\.0\.write_5: this block has no such value; it has attn_in"),
    ],
)
def test_a_site_that_the_model_lacks_is_refused_in_every_call(selection: HookSelection, text: str) -> None:
    run = compiled(toy(), steer_backend(spec(selection), inner="eager"))
    for _ in range(2):
        with pytest.raises(SiteNotFound, match=text):
            logits(run, tokens())


def test_a_vector_set_before_compiling_is_checked_when_the_model_is_compiled() -> None:
    backend = steer_backend(spec("post_block"), inner="eager")
    backend.runtime.set_global({"post_block": {1: torch.ones(WIDTH + 1)}})
    with pytest.raises(VectorError, match="has 33 numbers but the site is 32 wide"):
        logits(compiled(toy(), backend), tokens())
