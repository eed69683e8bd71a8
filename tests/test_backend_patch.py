"""Patches in compiled models equal the same replacements by forward hooks in eager mode."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Captured, Clamp, HookSelection, Monitor, Patch, Steering, SteerSpec, steer_backend
from steer_compile.backend import SteerBackend
from steer_compile.canon import canonical_plan
from steer_compile.errors import LoweringError, NotSteered
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.torch_compat import compile_count
from tests._graphs import trace
from tests._models import (
    LAYERS,
    WIDTH,
    Edit,
    compiled,
    direction,
    edited,
    gpt2,
    llama,
    logits,
    replaced,
    tokens,
    toy,
    watched,
)

HOOKS = ("pre_attn", "post_attn", "post_block", "mlp_out")
SITE = ("post_block", 1)
LENGTH = 7


def patching(ops: Iterable[str] = ("patch",), **options: Any) -> SteerSpec:
    given = {"steer": HOOKS, "capture": HOOKS, "ops": tuple(ops), "max_tokens": 64, "patches": 16, **options}
    return SteerSpec(**given)


def built(model: Any, inner: str = "eager", **options: Any) -> tuple[Any, SteerBackend]:
    torch.compiler.reset()
    backend = steer_backend(patching(**options), inner=inner)
    return compiled(model, backend), backend


def putting(values: Tensor, places: Iterable[tuple[int, int]], alpha: float = 1.0, dims: Any = slice(None)) -> Edit:
    """Put values (batch, tokens, width) in place at some elements and positions."""

    def edit(h: Tensor) -> Tensor:
        h = h.clone()
        for element, position in places:
            old, new = h[element, position, dims], values[element, position, dims]
            h[element, position, dims] = (1 - alpha) * old + alpha * new
        return h

    return edit


def close(got: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.behaviour(29)
@pytest.mark.parametrize(("make", "inner"), [(llama, "eager"), (gpt2, "eager"), (gpt2, "inductor")])
def test_every_hook_equals_forward_hooks(make: Callable[[], Any], inner: str) -> None:
    model, clean, corrupted = make(), tokens(2, LENGTH), tokens(2, LENGTH, seed=9)
    run, backend = built(model, inner)
    with watched(model, "pre_attn", "post_block", "mlp_out") as values:
        logits(model, clean)
    with backend.runtime.capture() as log:
        close(logits(run, clean), logits(model, clean))
    for hook in HOOKS:
        for layer in range(LAYERS):
            if hook != "post_attn":
                close(log[hook, layer], values[hook, layer][0])
            edit = putting(log[hook, layer], [(0, 2), (1, 4)])
            with replaced(model, {(hook, layer): edit}):
                expected = logits(model, corrupted)
            rows = [[Patch((hook, layer), at, Captured(log, b))] for b, at in ((0, 2), (1, 4))]
            with backend.runtime.patch(rows=rows):
                close(logits(run, corrupted), expected)
            assert not torch.allclose(expected, logits(model, corrupted), atol=1e-3)


def test_elements_patch_sites_and_positions_of_their_own() -> None:
    model, clean, corrupted = llama(), tokens(1, LENGTH), tokens(1, LENGTH, seed=9).repeat(3, 1)
    run, backend = built(model)
    with backend.runtime.capture() as log:
        logits(run, clean)
    cells = [("post_block", 0, 1), ("mlp_out", 1, 5)]
    rows = [[Patch((hook, layer), at, log)] for hook, layer, at in cells]
    with backend.runtime.patch(rows=[*rows, []]):
        got = logits(run, corrupted)
    for element, (hook, layer, at) in enumerate(cells):
        with replaced(model, {(hook, layer): putting(log[hook, layer], [(0, at)])}):
            close(got[element], logits(model, corrupted[:1])[0])
    close(got[2], logits(model, corrupted)[2])


@pytest.mark.behaviour(31)
def test_all_positions_of_a_layer_give_the_clean_logits() -> None:
    model, clean, corrupted = llama(), tokens(2, LENGTH), tokens(2, LENGTH, seed=9)
    run, backend = built(model)
    with backend.runtime.capture() as log:
        expected = logits(run, clean)
    for layer in range(LAYERS):
        rows = [[Patch(("post_block", layer), range(LENGTH), Captured(log, b))] for b in range(2)]
        with backend.runtime.patch(rows=rows), backend.runtime.capture() as behind:
            assert torch.equal(logits(run, corrupted), expected)
        assert not torch.equal(behind["post_block", layer], log["post_block", layer])  # captures stay pristine
        with backend.runtime.patch(rows=rows):
            assert torch.equal(logits(run, clean), expected)


@pytest.mark.behaviour(28)
def test_shares_and_dimensions() -> None:
    model, ids = llama(), tokens(2, LENGTH)
    run, backend = built(model)
    vector, dims = direction(3), (0, 5, 31)
    values = vector.expand(2, LENGTH, WIDTH)
    patch = Patch(SITE, (1, 3), vector, alpha=0.3, dims=dims)
    with replaced(model, {SITE: putting(values, [(b, t) for b in range(2) for t in (1, 3)], 0.3, list(dims))}):
        expected = logits(model, ids)
    with backend.runtime.patch([patch]):
        close(logits(run, ids), expected)
    with backend.runtime.patch([Patch(SITE, range(LENGTH), vector, alpha=0.0)]):
        assert torch.equal(logits(run, ids), logits(run, ids))
    with replaced(model, {SITE: lambda h: torch.zeros_like(h)}):
        expected = logits(model, ids)
    with backend.runtime.patch([Patch(SITE, range(LENGTH), "zeros")]):
        close(logits(run, ids), expected)


@pytest.mark.behaviour(30)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_idle_is_bit_equal_to_the_model_without_the_backend(inner: str) -> None:
    model, ids = toy(), tokens()
    plain = logits(compiled(model, inner), ids)
    torch.compiler.reset()
    backend = steer_backend(patching(steer=("post_block", "attn_out"), capture=()), inner=inner)
    run = compiled(model, backend, fullgraph=True)
    assert torch.equal(logits(run, ids), plain)
    with backend.runtime.patch([Patch(SITE, 2, direction(1))]):
        assert not torch.equal(logits(run, ids), plain)
    assert torch.equal(logits(run, ids), plain)


def test_patches_change_without_recompiling() -> None:
    model, ids = toy(), tokens()
    run, backend = built(model, "inductor", steer=("post_block",), capture=("post_block",))
    with backend.runtime.capture() as log:
        logits(run, ids)
    compiles = compile_count()
    for at in range(3):
        for rows in ([[Patch(SITE, at, log)], []], [[], [Patch(("post_block", 0), at, "zeros", 0.5, (1,))]]):
            with backend.runtime.patch(rows=rows):
                logits(run, ids)
    assert compile_count() == compiles


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_what_is_steered_builds_on_the_patch(inner: str) -> None:
    """Capture of the pristine value, then the patch, the row's vector, and the clamp of both; a probe is in front."""
    model, ids = toy(), tokens(1, LENGTH)
    ops = ("patch", "add", "clamp", "monitor", "score")
    run, backend = built(model, inner, steer=("post_block",), capture=("post_block",), ops=ops)
    row, vector, axis = direction(1), direction(2), torch.eye(WIDTH)[3]
    with watched(model, "post_block") as seen:
        logits(model, ids)
    pristine = seen[SITE][0]

    def edit(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 4] = row
        h = h + vector
        h[..., 3] = 0.25
        return h

    with edited(model, {SITE: edit}):
        expected = logits(model, ids)
    backend.runtime.set_monitor(SITE, axis)
    steering = Steering({SITE: vector}, clamps={SITE: [Clamp(axis, value=0.25)]})
    with (
        backend.runtime.steer(rows=[steering]),
        backend.runtime.patch([Patch(SITE, 4, row)]),
        backend.runtime.capture() as log,
    ):
        close(logits(run, ids), expected)
    close(log[SITE], pristine)
    close(backend.runtime.sites.scores(SITE)[..., 0], pristine[..., 3])


def test_gates_of_other_sites_read_the_patched_stream() -> None:
    """A monitor for the sites behind it: pristine at its own site, patched at those behind."""
    model, ids = toy(), tokens(1, LENGTH)
    sites = (
        HookSelection("post_block", (0,), ("patch", "monitor", "score")),
        HookSelection("pre_attn", (1,), ("monitor", "score")),
    )
    run, backend = built(model, steer=sites, capture=(), cross_layer=True)
    axis = torch.eye(WIDTH)[3]
    backend.runtime.set_monitor(("post_block", 0), Monitor(axis))
    backend.runtime.set_monitor(("pre_attn", 1), Monitor(axis))
    with backend.runtime.patch([Patch(("post_block", 0), 2, "zeros")]):
        logits(run, ids)
    own, behind = (backend.runtime.sites.scores(s)[0, 2, 0] for s in (("post_block", 0), ("pre_attn", 1)))
    assert own != 0
    assert behind == 0


@pytest.mark.behaviour(27)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_put_in_place_exactly(dtype: torch.dtype) -> None:
    model, clean, corrupted = toy(dtype), tokens(), tokens(seed=9)
    run, backend = built(model, steer=("post_block",), capture=("post_block",))
    with backend.runtime.capture() as log:
        expected = logits(run, clean)
    rows = [[Patch(SITE, range(LENGTH), Captured(log, b))] for b in range(2)]
    with backend.runtime.patch(rows=rows):
        assert torch.equal(logits(run, corrupted), expected)


def generated(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return result.sequences, torch.stack(result.logits, 1)


def test_generation_with_padding_is_patched_in_the_prompt_and_behind_it() -> None:
    """Positions count without padding: prompts of 6 and 4 tokens, patched at a prompt and a generated position."""
    eager, model, ids = llama(), llama(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    torch.compiler.reset()
    backend = steer_backend(patching(steer=("post_block",), capture=()), inner="eager")
    model.compile(backend=backend)
    vector, calls = direction(5, 3.0), 0

    def edit(h: Tensor) -> Tensor:
        nonlocal calls
        start, calls = (0 if h.size(1) > 1 else 5 + calls), calls + 1
        h = h.clone()
        for element, position, pad in ((0, 1, 0), (0, 7, 0), (1, 1, 2), (1, 5, 2)):
            if 0 <= position + pad - start < h.size(1):
                h[element, position + pad - start] = vector
        return h

    with edited(eager, {SITE: edit}):
        expected = generated(eager, ids, mask)
    rows = [[Patch(SITE, (1, 7), vector)], [Patch(SITE, (1, 5), vector)]]
    with backend.runtime.patch(rows=rows, prompt_lengths=[6, 4]):
        got = generated(model, ids, mask)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], expected[0])
    assert not torch.allclose(generated(model, ids, mask)[1], got[1], atol=1e-2)
    with (
        pytest.raises(NotSteered, match=r"position 9 of sequence 0 was never applied: .* positions 0 to 8 of it"),
        backend.runtime.patch(rows=[[Patch(SITE, 9, vector)], []], prompt_lengths=[6, 4]),
    ):
        generated(model, ids, mask)


def test_graphs_of_one_model_are_patched_together() -> None:
    model, ids = toy(layers=4, cut=2), tokens()
    run, backend = built(model, steer=("post_block",), capture=())
    vector = direction(1)
    with backend.runtime.patch([Patch(("post_block", n), 3, vector) for n in range(4)]):
        got = logits(run, ids)
    put = putting(vector.expand(2, LENGTH, WIDTH), [(0, 3), (1, 3)])
    with replaced(model, {("post_block", n): put for n in range(4)}):
        close(got, logits(model, ids))


def test_the_template_leaves_patched_sites_to_the_compiler() -> None:
    run, backend = built(toy(), steer=("post_block",), capture=())
    logits(run, tokens())
    assert {(e.lowering, e.why) for e in backend.plans[0].edits} == {
        ("compiler", "it can be patched, and the kernel has no stage for that")
    }
    run, _ = built(toy(), steer=("post_block",), capture=(), lowering="template")
    with pytest.raises(LoweringError, match=r"cannot be lowered to the template: it can be patched, .*; use lowering"):
        logits(run, tokens())


@pytest.mark.behaviour(30)
def test_the_plan_of_a_patched_site() -> None:
    gm, _ = trace(llama(), tokens())
    asked = SteerSpec(steer=HookSelection("post_block", (1,), ("add", "patch")), rows=5, max_tokens=32, patches=3)
    assert canonical_plan(plan_edits(asked, find_sites(gm)), gm.graph) == (
        "tokens: 32\n"
        "bank 0 patch: f32[1, 4, 32]\n"
        "bank 1 patch_alpha: f32[1, 4, 32]\n"
        "bank 2 patch_slot: i32[1, 32, 1]\n"
        "bank 3 table: f32[1, 8, 32]\n"
        "patch+add layers.1.post_block = add@model.layers.1 : f32[2, 7, 32] batch_first "
        "<- patch 0[0], patch_alpha 1[0], patch_slot 2[0], table 3[0]"
    )
