"""Declarative gates of requests, the prefix cache under dynamic steering, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from steer_compile import SteerSpec
from steer_compile.errors import SteerError
from tests.vllm import engines
from tests.vllm.engines import at, generated, texts, vector
from tests.vllm.test_requests_in_engines import hits

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

SITE = "layers.1.post_block"
OPS = ("add", "row_monitor", "clamp")
SPEC = SteerSpec(
    steer=("post_block",), capture=({"hook": "post_block", "layers": [1]},), rows=8, overrides=6, ops=OPS, clamps=2
)
OPEN, SHUT = -1e6, 1e6
PUSH = vector(4, 3.0)


@pytest.fixture(scope="module")
def llm(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vectors") / "calm.safetensors"
    save_file({SITE: PUSH}, path)
    return engines.engine(engines.saved("llama", models), SPEC, vectors={"calm": path}, block_size=32)


def when(threshold: float, sharpness: float = 1.0) -> dict[str, Any]:
    return {"site": SITE, "probe": vector(6).tolist(), "threshold": threshold, "sharpness": sharpness}


def gate(when: Any = "always", scope: Any = "this_token", **apply: Any) -> dict[str, Any]:
    return {"when": when, "scope": scope, "apply": apply}


ADD: dict[str, Any] = {"add": {"vectors": {SITE: PUSH.tolist()}}}
NAMED: dict[str, Any] = {"add": {"named": ["calm"]}}
DECODE = at(1, PUSH, "decode")


def said(llm: Any, *steering: Any) -> list[list[int]]:
    return texts(generated(llm, list(steering)))


def numbers(llm: Any, *steering: Any) -> list[list[float]]:
    return [engines.logprobs(output) for output in generated(llm, list(steering))]


def alike(found: list[float]) -> Any:
    return pytest.approx(found, abs=engines.TOLERANCE)


def status(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.collective_rpc("steer_compile_dynamic")[0]
    return found


@pytest.mark.behaviour(70)
def test_gates_in_the_graph_are_the_same_as_the_requests_own_steering(llm: Any) -> None:
    probe = {"probe": vector(6).tolist(), "threshold": 0.1, "sharpness": 4.0}
    plain, decode, soft = numbers(llm, None, DECODE, {**DECODE, "monitors": {SITE: probe}})
    bound = {"direction": PUSH.tolist(), "value": 0.0}
    found = numbers(
        llm,
        {"gates": [gate(**ADD)]},
        {"gates": [gate(**NAMED)]},
        {"gates": [gate(when(OPEN, 10.0), **ADD)]},
        {"gates": [gate(when(SHUT, 10.0), **ADD)]},
        {"gates": [gate(when(0.1, 4.0), **ADD)]},
        {**DECODE, "gates": [gate(attenuate=0.0)]},
        {**DECODE, "gates": [gate(clamp={SITE: [bound]})]},
        {"gates": [gate(clamp={SITE: [bound]})]},
    )
    assert not any(a == alike(b) for a, b in ((plain, decode), (plain, soft), (soft, decode)))
    assert found[:6] == list(map(alike, (decode, decode, decode, plain, soft, plain)))
    assert found[6] == alike(found[7])
    assert found[6] != alike(decode)


def test_gates_of_the_host_act_from_the_next_step_on(llm: Any) -> None:
    """They see the prompt's last step, so the first decoded token is the first that they reach."""
    plain, decode = said(llm, None, DECODE)
    for scope in ("next_step", "rest_of_request"):
        found = said(
            llm,
            {"gates": [gate(when(OPEN), scope, **ADD)]},
            {"gates": [gate(when(OPEN), scope, **NAMED)]},
            {"gates": [gate(when(SHUT), scope, **ADD)]},
            {**DECODE, "gates": [gate(when(OPEN), scope, attenuate=0.0)]},
        )
        assert found == [decode, decode, plain, plain]
    said(llm, None)
    assert status(llm)["overrides"]["in_use"] == 0
    assert "rejected" not in status(llm)["actions"] or not status(llm)["actions"]["rejected"]


def test_a_gate_of_the_host_clamps(llm: Any) -> None:
    """The set point of a projection holds from the next step on, for this request alone."""
    bound = {"direction": PUSH.tolist(), "value": 5.0}
    always, later, plain = said(
        llm,
        {"gates": [gate(clamp={SITE: [bound]})]},
        {"gates": [gate(when(OPEN), "rest_of_request", clamp={SITE: [bound]})]},
        None,
    )
    assert always == later != plain


def test_a_conversation_holds_what_a_gate_began_until_the_set_changes(llm: Any) -> None:
    from steer_compile.vllm.adapters.intake import front_end_of
    from steer_compile.vllm.transport import sent_sets

    plain, decode = said(llm, None, DECODE)
    held = gate(when(OPEN), "rest_of_conversation", **NAMED)
    assert said(llm, {"gates": [held], "conversation": "a"}) == [decode]
    assert said(llm, {"conversation": "a"}, {"conversation": "b"}, None) == [decode, plain, plain]
    assert status(llm)["gates"]["conversations"] == 1
    front = front_end_of(llm.llm_engine.input_processor)
    assert front is not None
    front.register("calm", {SITE: -PUSH}, replace=True)
    llm.collective_rpc("steer_compile_rename", args=(sent_sets(front.sets(["calm"])), []))
    assert said(llm, {"conversation": "a"}) == [plain]
    assert (status(llm)["gates"]["conversations"], status(llm)["gates"]["changed_sets"]) == (0, 1)
    front.register("calm", {SITE: PUSH}, replace=True)
    llm.collective_rpc("steer_compile_rename", args=(sent_sets(front.sets(["calm"])), []))


ONES = [1.0] * engines.WIDTH
BAD: dict[str, Any] = {
    "no list": {"gates": 3},
    "no object": {"gates": [3]},
    "no effect": {"gates": [{"when": "always"}]},
    "unknown scope": {"gates": [gate(scope="forever", **ADD)]},
    "unknown name": {"gates": [gate(add={"named": ["angry"]})]},
    "nan": {"gates": [gate({"site": SITE, "probe": [float("nan")] * engines.WIDTH}, **ADD)]},
    "width": {"gates": [gate({"site": SITE, "probe": ONES[:-1]}, "next_step", **ADD)]},
    "not captured": {"gates": [gate({"site": "layers.2.post_block", "probe": ONES}, "next_step", **ADD)]},
    "not steered": {"gates": [gate(add={"vectors": {"layers.1.mlp_out": ONES}})]},
    "beyond its probe": {"gates": [gate(when(0.0), add={"vectors": {"layers.2.post_block": ONES}})]},
    "many": {"gates": [gate(**ADD)] * 17},
    "attenuates in the graph": {"gates": [gate(when(0.0), attenuate=0.5)]},
    "own vectors behind a probe": {**DECODE, "gates": [gate(when(0.0), **ADD)]},
    "own monitor": {"monitors": {SITE: {"probe": ONES}}, "gates": [gate(when(0.0), **ADD)]},
    "fades what a gate adds": {"gates": [gate(**ADD), gate(when(0.0), "next_step", attenuate=0.5)]},
    "no generated tokens": {"gates": [gate(**ADD)], "tokens": {"last_prompt": True}},
    "no conversation": {"gates": [gate(when(0.0), "rest_of_conversation", **NAMED)]},
    "vectors of a conversation": {"conversation": "a", "gates": [gate(when(0.0), "rest_of_conversation", **ADD)]},
    "long conversation": {"conversation": "a" * 1000},
    "conversation that is none": {"conversation": ["a"]},
    "clamps beyond the room": {"gates": [gate(clamp={SITE: [{"direction": ONES, "hi": 1}] * 3})]},
    "overflow": {"gates": [gate(when(0.0), "next_step", add={"vectors": {SITE: [3e38] * 64}, "strength": 2.0})]},
    "captures without a folder": {"capture": {}},
}  # fmt: skip


@pytest.mark.behaviour(71)
@pytest.mark.parametrize("name", BAD)
def test_bad_gates_are_refused_and_the_engine_lives(name: str, llm: Any) -> None:
    with pytest.raises(SteerError):
        generated(llm, [BAD[name]])
    assert len(said(llm, None)[0]) == 8


@pytest.mark.behaviour(58, 60)
def test_generated_blocks_are_the_requests_own_and_prompts_are_shared(models: Path, llm: Any) -> None:
    """A next turn does not find what was generated under an override; a prompt is found by everyone."""
    prompt = list(range(100, 140))
    steered = {"gates": [gate(when(OPEN), "rest_of_request", **ADD)]}
    (said_then,) = texts(generated(llm, [steered], tokens=40, prompts=[prompt]))
    assert hits(llm, None, [prompt]) == hits(llm, steered, [prompt]) == 32
    longer = prompt + said_then + [7]
    assert hits(llm, None, [longer]) == 32  # of 80 tokens whose blocks were all stored
    assert hits(llm, None, [longer]) == 64  # as a prompt they are shared with everyone again
    cold = engines.engine(engines.saved("llama", models), SPEC, enable_prefix_caching=False)
    expected = texts(generated(cold, [None], prompts=[longer]))
    assert texts(generated(llm, [None], prompts=[longer])) == expected


def test_gates_that_the_spec_has_no_room_for_are_refused(models: Path) -> None:
    bare = engines.engine(engines.saved("llama", models), SteerSpec(steer=("post_block",), rows=4))
    for asked, words in (
        ({"gates": [gate(when(0.0), **ADD)]}, "row_monitor"),
        ({"gates": [gate(when(0.0), "next_step", **ADD)]}, "captures nothing"),
        ({"gates": [gate(clamp={SITE: [{"direction": ONES, "hi": 1}]})]}, "clamp"),
        ({"conversation": "a"}, "overrides"),
    ):
        with pytest.raises(SteerError, match=words):
            generated(bare, [asked])
    assert said(bare, {"gates": [gate(**ADD)]}) == said(bare, DECODE) != said(bare, None)
