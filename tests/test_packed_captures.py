"""Packed captures in compiled models: the rows are the dense ones, labels are right, and nothing compiles again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steer_compile import SteerBackend, Steering, SteerSpec, TokenSelection, steer_backend
from steer_compile.dynamic.actions import Action
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.errors import CaptureError, NotSteered, SiteNotFound, SpecError, TableFull, UnknownName
from steer_compile.ir import HookSchema
from steer_compile.passes import lower_edits
from steer_compile.passes.find_sites import find_sites
from tests._graphs import trace
from tests._models import LAYERS, WIDTH, compiled, direction, llama, logits, spec, tokens, toy
from tests._toys import make
from tests.runtime.test_packed import Positions

HOOKS = ("post_attn", "post_block")
SITES = [(hook, layer) for hook in HOOKS for layer in range(LAYERS)]
LAST = TokenSelection(last_prompt=True)
BATCH, LENGTH = 2, 7


def packed(model: nn.Module, rows: int = BATCH * LENGTH, **options: Any) -> tuple[SteerBackend, Any]:
    inner = options.pop("inner", "eager")
    backend = steer_backend(
        spec("post_block", capture=options.pop("capture", HOOKS), capture_rows=rows, **options), inner
    )
    return backend, compiled(model, backend)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def name(site: tuple[str, int]) -> str:
    return f"layers.{site[1]}.{site[0]}"


CHOICES = st.one_of(st.none(), st.frozensets(st.integers(0, LENGTH - 1)).map(Positions))


@pytest.mark.parametrize("lowering", ["compiler", "template"])
def test_chosen_rows_are_the_dense_ones_bit_for_bit(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))  # where the template runs its reference
    dense = steer_backend(spec("post_block", capture=HOOKS, lowering=lowering), inner="eager")
    whole, ids = compiled(llama(), dense), tokens(BATCH, LENGTH)
    backend, run = packed(llama(), lowering=lowering)
    vectors = {("post_block", n): direction(n) for n in range(LAYERS)}
    with dense.runtime.steer(vectors), dense.runtime.capture() as log:
        expected = logits(whole, ids)
    assert same(logits(run, ids), logits(whole, ids))
    assert {edit.lowering for edit in backend.plans[0].edits} == {lowering}

    @settings(max_examples=40, deadline=None)
    @given(
        each=st.lists(CHOICES, min_size=BATCH, max_size=BATCH),
        sites=st.lists(st.lists(st.sampled_from(SITES), unique=True), min_size=BATCH, max_size=BATCH),
    )
    def holds(each: list[Positions | None], sites: list[list[tuple[str, int]]]) -> None:
        with backend.runtime.steer(vectors), backend.runtime.capture(each, sites) as found:
            assert same(logits(run, ids), expected)
        for b, (choice, own) in enumerate(zip(each, sites, strict=True)):
            at = sorted(choice.at) if choice is not None and own else []
            rows = found.of(str(b))
            assert rows.positions.tolist() == at
            assert rows.token_ids.tolist() == ids[b, at].tolist()
            assert set(rows.values) == {name(site) for site in own}
            for site in own:
                assert same(rows.values[name(site)], log[site][b, at])

    holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_hidden_states_of_hugging_face(dtype: torch.dtype) -> None:
    model, ids = llama(dtype), tokens(BATCH, LENGTH)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    backend, run = packed(model, capture=("pre_attn", "post_block"))
    with backend.runtime.capture(TokenSelection(spans=((1, 3),), last_prompt=True)) as log:
        logits(run, ids)
    rows = log.rows
    assert rows.requests == ("0", "1")
    assert rows.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.positions.tolist() == [1, 2, LENGTH - 1] * 2
    at = (rows.request.long(), rows.positions)
    assert rows.token_ids.equal(ids[at])
    for key, state in (("layers.0.pre_attn", 0), ("layers.0.post_block", 1), ("layers.1.pre_attn", 1)):
        assert same(rows.values[key], states[state][at])


def test_inductor_stores_rows_without_a_copy_of_their_bank() -> None:
    backend, run = packed(toy(), rows=11, inner="inductor")
    _, (code,) = torch._inductor.utils.run_and_get_code(logits, run, tokens(BATCH, LENGTH))
    assert code.count(f"(1, 12, {WIDTH})") > 0  # the banks, as inputs
    assert f"empty_strided_cpu((1, 12, {WIDTH})" not in code
    assert f"{12 * WIDTH}" not in code.replace(f"({12 * WIDTH}, {WIDTH}, 1)", "")  # nothing runs over a whole bank
    assert backend.plans[0].text().count("packed") == 2 * len(SITES)


@pytest.mark.behaviour(74)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_no_choice_compiles_again(inner: str) -> None:
    backend, run = packed(toy(), inner=inner)
    ids, runtime = tokens(BATCH, LENGTH), backend.runtime
    expected = logits(run, ids)
    with runtime.capture() as log:
        logits(run, ids)
    every = log.rows
    places = [tensor.data_ptr() for tensor in (*runtime.tables.tensors, runtime.tables.chosen)]
    torch._dynamo.utils.counters.clear()
    cases: list[tuple[Any, Any, list[int]]] = [
        (LAST, "post_block", [6, 13]),
        ([None, LAST], [("post_block", 1), "layers.0.post_attn"], [13]),
        ([Positions(frozenset({2})), Positions(frozenset({0, 5}))], ["post_attn"], [2, 7, 12]),
        ([None, None], None, []),
        (None, None, list(range(14))),
        (TokenSelection(generated=True), ["post_attn"], []),
    ]
    for chosen, sites, at in cases:
        with runtime.capture(chosen, sites) as log:
            assert torch.equal(logits(run, ids), expected)
        assert len(log.rows) == len(at)
        for key, values in log.rows.values.items():
            assert same(values, every.values[key][at])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["recompiles"]
    assert [tensor.data_ptr() for tensor in (*runtime.tables.tensors, runtime.tables.chosen)] == places


def test_too_many_tokens_are_refused_and_nothing_is_half_applied() -> None:
    model = toy()
    backend, run = packed(model, rows=3)
    runtime, ids = backend.runtime, tokens(BATCH, LENGTH)
    with runtime.capture(Positions(frozenset({1}))) as log:
        logits(run, ids)
        before = [t.clone() for t in (*runtime.tables.tensors, runtime.tables.chosen, runtime.tables.rows)]
        phases, calls = vars(runtime.phases).copy(), runtime.calls
        with pytest.raises(TableFull, match="4 chosen tokens of 2 x 7"), runtime.capture(Positions(frozenset({5}))):
            logits(run, ids)
        after = (*runtime.tables.tensors, runtime.tables.chosen, runtime.tables.rows)
        assert all(same(one, other) for one, other in zip(before, after, strict=True))
        assert (vars(runtime.phases), runtime.calls) == (phases, calls)
        with runtime.capture([Positions(frozenset({4})), None]) as both:  # just as many as there are rows
            logits(run, ids)
    assert len(log.rows) == 4
    assert (both.rows.positions.tolist(), both.rows.requests) == ([4], ("0", "1"))
    assert logits(run, ids).shape[0] == BATCH
    assert not bool((runtime.tables.chosen[:, 0] >= 0).any())  # nobody reads, so nothing is stored


@pytest.mark.behaviour(72)
def test_two_readers_have_their_own_tokens_and_sites() -> None:
    backend, run = packed(toy(), rows=4)
    ids = tokens(BATCH, LENGTH)
    with backend.runtime.capture(Positions(frozenset({1, 2})), ["post_attn"]) as one:
        with backend.runtime.capture([None, Positions(frozenset({2}))], ["post_block"]) as other:
            logits(run, ids)
        assert (len(one), len(other)) == (1, 1)
    assert (one.rows.positions.tolist(), set(one.rows.values)) == ([1, 2, 1, 2], {name(s) for s in SITES[:LAYERS]})
    assert (other.rows.positions.tolist(), set(other.rows.values)) == ([2], {name(s) for s in SITES[LAYERS:]})


def test_broken_values_pass_through() -> None:
    model, ids = toy(), tokens(BATCH, LENGTH)
    with torch.no_grad():
        model.model["embed"].weight[ids[0, 3]] = float("nan")
        model.model["embed"].weight[ids[1, 6]] = float("inf")
    backend, run = packed(model, capture=("pre_attn",))
    with backend.runtime.capture([Positions(frozenset({2, 3})), LAST], [("pre_attn", 0)]) as log:
        logits(run, ids)
    assert same(log.rows.values["layers.0.pre_attn"], model.model["embed"].weight.detach()[ids[[0, 0, 1], [2, 3, 6]]])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_labels_of_a_generation(cache: str) -> None:
    model = llama()
    backend, _ = packed(model, rows=4, capture=("post_block",))
    model.compile(backend=backend)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    after = TokenSelection(last_prompt=True, generated=True)
    runtime = backend.runtime
    with runtime.steer(prompt_lengths=[6, 4], names=["a", "b"]), runtime.capture([after, after]) as log:
        done = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    rows = log.rows
    assert rows.requests == ("a", "b")
    for request, prompt, pad in (("a", 6, 0), ("b", 4, 2)):
        own = rows.of(request)
        assert own.positions.tolist() == [prompt - 1 + i for i in range(4)]
        assert own.steps.tolist() == [0, 1, 2, 3]
        assert own.token_ids.tolist() == done[("a", "b").index(request)][own.positions + pad].tolist()
    with torch.no_grad():
        states = llama()(done[:1, :-1], output_hidden_states=True).hidden_states
    torch.testing.assert_close(rows.of("a").values["layers.0.post_block"], states[1][0, 5:], rtol=1e-4, atol=1e-4)


def test_padding_is_never_stored() -> None:
    ids = tokens(2, 6)
    for padding, first in (("left", 2), ("right", 0)):
        backend, run = packed(toy(), rows=10)
        with backend.runtime.steer(prompt_lengths=[6, 4], padding=padding), backend.runtime.capture() as log:
            logits(run, ids)
        assert log.of("1").positions.tolist() == [0, 1, 2, 3]
        assert log.of("1").token_ids.tolist() == ids[1, first : first + 4].tolist()
        torch._dynamo.reset()


def test_parts_of_a_model_fill_one_call() -> None:
    ids = tokens(BATCH, LENGTH)
    whole, run = packed(toy(layers=4))
    with whole.runtime.capture(LAST) as log:
        logits(run, ids)
    backend, run = packed(toy(layers=4, cut=2))
    for _ in range(2):  # the second part is compiled when the first has begun the call
        with backend.runtime.capture(LAST) as parts:
            logits(run, ids)
        assert len(backend.plans) == 2
        assert set(parts.rows.values) == set(log.rows.values)
        assert all(same(value, log.rows.values[key]) for key, value in parts.rows.values.items())
        assert parts.rows.token_ids.tolist() == ids[:, -1].tolist()
    words = r"layers\.7\.post_block is not captured"
    with pytest.raises(SiteNotFound, match=words), backend.runtime.capture(LAST, [("post_block", 7)]):
        logits(run, ids)


def test_a_training_step_captures_without_its_graph() -> None:
    model, ids = toy().train(), tokens(BATCH, LENGTH)
    backend, run = packed(model, inner="aot_eager")
    with backend.runtime.capture(LAST) as log:
        run(ids, ids).loss.backward()
    assert model.head.weight.grad is not None
    assert not any(value.requires_grad for value in log.rows.values.values())


def test_inference_mode_and_autocast() -> None:
    backend, run = packed(toy())
    ids = tokens(BATCH, LENGTH)
    with torch.inference_mode(), backend.runtime.capture(LAST) as log:
        run(ids)
    with backend.runtime.capture(LAST) as again:
        logits(run, ids)
    assert all(same(value, again.rows.values[key]) for key, value in log.rows.values.items())
    with torch.autocast("cpu", torch.bfloat16), backend.runtime.capture(LAST) as narrow:
        logits(run, ids)
    assert len(narrow.rows) == BATCH


@pytest.mark.parametrize("toy_name", ["hyper_connections", "time_first"])
def test_rows_have_the_logical_shape_of_their_hook(toy_name: str) -> None:
    model = make(toy_name)
    hook = "mhc_streams_pre_mlp" if toy_name == "hyper_connections" else "post_block"
    found = []
    for rows in (0, 20):
        torch._dynamo.reset()
        backend = steer_backend(SteerSpec(capture=(hook,), max_tokens=32, capture_rows=rows), inner="eager")
        run = torch.compile(model, backend=backend)
        chosen = (Positions(frozenset({1, 3})),) if rows else ()
        with torch.no_grad(), backend.runtime.capture(*chosen) as log:
            run(*model.inputs())
        found.append((backend.sites.where(lambda site: site.hook == hook).schemas(), log))
    (dense, whole), (schemas, log) = found
    assert dense == schemas
    for schema in schemas:
        value = log.rows.values[schema.name]
        assert value.shape == (len(log.rows), *schema.logical_shape)
        assert (torch.Size(schema.logical_shape).numel(), value.dtype) == (schema.width, schema.dtype)
        at = (log.rows.request.long(), log.rows.positions)
        assert same(value.flatten(1), whole[hook, schema.layer][at])


def test_schemas() -> None:
    gm, _ = trace(make("hyper_connections"), *make("hyper_connections").inputs())
    table = find_sites(gm)
    streams = [s for s in table.schemas() if s.hook.startswith("mhc_")]
    assert {len(s.logical_shape) for s in streams} == {2}
    plain = HookSchema("post_block", 3, 8, torch.bfloat16, (8,))
    assert (plain.name, plain.text()) == ("layers.3.post_block", "layers.3.post_block : bf16[8]")
    assert "f32[3, " in streams[0].text()


def test_the_plan_shows_what_is_packed() -> None:
    backend, run = packed(toy(), rows=5, capture=("post_block",))
    logits(run, tokens())
    text = backend.plans[0].text()
    assert f"bank 0 packed: f32[1, 6, {WIDTH}]" in text
    assert f"bank 1 choice: i32[{LAYERS}, 64, 1]" in text
    assert "<- packed 0[0], choice 1[0]" in text
    assert " capture: " not in text
    assert backend.runtime.status()["bytes"] > 64 * 2 * 4


def test_refusals() -> None:
    backend, run = packed(toy(), rows=4, capture=("post_block",))
    runtime, ids = backend.runtime, tokens(BATCH, LENGTH)
    with pytest.raises(SiteNotFound, match="mlp_out is not captured; captured are post_block"):
        runtime.capture(sites=["mlp_out"]).__enter__()
    words = r"layers\.9\.post_block is not captured; captured are layers\.0"
    with pytest.raises(SiteNotFound, match=words), runtime.capture(LAST, [("post_block", 9)]):
        logits(run, ids)
    with runtime.capture(LAST) as log:
        with pytest.raises(NotSteered, match="no compiled graph ran inside the block yet"):
            len(log.rows)
        logits(run, ids)
    with pytest.raises(CaptureError, match=r"has rows of chosen tokens alone.*; read log\.rows"):
        log["post_block", 0]
    with pytest.raises(UnknownName, match="no call was of request 'x'; there are 0, 1"):
        log.of("x")
    with runtime.capture(LAST, [["post_block"], [("post_block", 1)]]) as log:
        logits(run, ids)
    with pytest.raises(CaptureError, match=r"requests 0, 1 have rows of different sites; read log\.of"):
        len(log.rows)
    with pytest.raises(NotSteered, match="nothing was captured"), runtime.capture(LAST):
        pass
    dense = steer_backend(SteerSpec(capture=("post_block",)), inner="eager").runtime
    with pytest.raises(SpecError, match=r"captures every token at every site; give SteerSpec\(capture_rows"):
        dense.capture(LAST).__enter__()
    with pytest.raises(NotSteered), dense.capture() as log:
        pass
    with pytest.raises(CaptureError, match=r"without labels; read log\[hook, layer\]"):
        len(log.rows)


def test_steering_beside_packed_captures() -> None:
    model, ids = toy(), tokens(BATCH, LENGTH)
    backend, run = packed(model)
    steering = Steering({("post_block", 0): direction(1)}, tokens=LAST)
    with backend.runtime.steer(rows=[steering, None]), backend.runtime.capture() as log:
        logits(run, ids)
    with backend.runtime.capture() as plain:
        logits(run, ids)
    moved = (log.rows.values["layers.1.post_block"] != plain.rows.values["layers.1.post_block"]).any(1)
    assert moved.nonzero().flatten().tolist() == [LENGTH - 1]
    assert same(log.rows.values["layers.0.post_block"], plain.rows.values["layers.0.post_block"])


class Looks(Controller):
    """Keeps the sites of what it saw."""

    name = "looks"

    def __init__(self) -> None:
        self.seen: list[list[tuple[str, int]]] = []

    def on_step(self, view: StepView) -> Iterable[Action]:
        self.seen.append(list(view.tensors))
        return []


class Reads(SteeringController):
    """Decides by the score of a probe."""

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        return None


def test_controllers_read_dense_captures_alone() -> None:
    backend, run = packed(toy(), rows=4, overrides=1)
    ids, looks = tokens(BATCH, LENGTH), Looks()
    backend.runtime.dynamic.add(looks)
    backend.runtime.dynamic.add(Reads("reads", probes={"layers.0.post_block": direction(1)}))
    with backend.runtime.steer(), backend.runtime.capture(LAST) as log:
        logits(run, ids)
    assert (looks.seen, len(log.rows)) == ([[]], BATCH)
    (error,) = backend.runtime.dynamic.status()["controllers"]["reads"]["last_errors"]
    assert "layers.0.post_block is not captured, and none are" in error
    assert "leave capture_rows out" in error
