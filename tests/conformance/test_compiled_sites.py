"""What is spliced into a compiled model: which values are read, what stands where, and what a spec leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from steer_compile import Clamp, HookSelection, Steering, SteerSpec, steer_backend
from steer_compile.ir import Site
from steer_compile.passes.plan_edits import reserve_banks
from steer_compile.runtime.registry import Registry
from tests._models import LAYERS, WIDTH, adding, compiled, direction, edited, logits, spec, tokens, toy, watched

AT = {("post_block", 0): direction(1)}


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.behaviour(3)
def test_data_behind_the_last_token_are_not_read() -> None:
    model, ids = toy(), tokens(2, 5)
    backend = steer_backend(spec("post_block", ops=("add", "tier")), inner="eager")
    run, runtime = compiled(model, backend, fullgraph=True), backend.runtime
    runtime.set_tier(AT, 0.5)
    runtime.assign([runtime.register(Steering(AT)), None])
    found = logits(run, ids)
    other = runtime.register(Steering({("post_block", 0): direction(2, 9.0)}))
    tables, count = runtime.tables, ids.numel()
    tables.rows[count:] = other.rows["prefill"]
    tables.gain[count:], tables.decode[count:] = float("nan"), float("nan")
    assert torch.equal(logits(run, ids), found)
    assert tables.rows[count:].tolist() == [other.rows["prefill"]] * (64 - count)  # nobody tidied up meanwhile
    with edited(model, adding(AT)):
        close(found[0], logits(model, ids)[0])
    close(found[1], logits(model, ids)[1])


@pytest.mark.behaviour(5)
def test_changes_in_place_are_seen_by_the_next_call_of_the_same_graph() -> None:
    model, ids = toy(), tokens(2, 5)
    backend = steer_backend(spec("post_block"), inner="aot_eager")
    run, runtime = compiled(model, backend, fullgraph=True), backend.runtime
    plain = logits(run, ids)
    handle = runtime.register(Steering(AT))
    runtime.assign([handle, None])
    address = runtime.tables.view("table", ("post_block", 0)).data_ptr()
    with edited(model, adding(AT)):
        close(logits(run, ids)[0], logits(model, ids)[0])
    runtime.tables.view("table", ("post_block", 0))[handle.rows["prefill"]] = direction(3)
    with edited(model, adding({("post_block", 0): direction(3)})):
        close(logits(run, ids)[0], logits(model, ids)[0])
    runtime.tables.rows.zero_()
    assert torch.equal(logits(run, ids), plain)
    assert (len(backend.plans), runtime.tables.view("table", ("post_block", 0)).data_ptr()) == (1, address)


def calls_of(given: SteerSpec | None = None) -> list[str]:
    """Calls and buffers in the graph that the inner compiler gets, with a spec or without the backend."""
    found: list[str] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Any:
        found.extend(str(node.target) for node in gm.graph.nodes if node.op != "placeholder")
        return gm.forward

    torch.compiler.reset()
    backend = inner if given is None else steer_backend(given, inner=inner)
    logits(compiled(toy(), backend, fullgraph=True), tokens())
    return found


@pytest.mark.behaviour(20, 34)
def test_what_a_spec_does_not_ask_for_is_not_in_the_graph() -> None:
    plain, captured = calls_of(), calls_of(SteerSpec(capture="post_block", max_tokens=64))
    narrow = calls_of(SteerSpec(steer=HookSelection("post_block", [0]), max_tokens=64))
    steered = calls_of(spec("post_block"))
    assert [graph.count("copy_") for graph in (plain, captured, narrow, steered)] == [0, LAYERS, 0, 0]
    assert [graph.count("steer_scale") for graph in (plain, captured, narrow, steered)] == [0, 0, 1, 1]
    added = [len(graph) - len(plain) for graph in (narrow, steered)]
    assert 0 < added[0] < added[1]


@pytest.mark.behaviour(20)
def test_gates_across_layers_are_an_edit_of_their_own_and_part_of_what_is_compiled() -> None:
    texts = []
    for cross in (False, True):
        torch.compiler.reset()
        hooks = [HookSelection("post_block", [0], ("add", "monitor")), HookSelection("post_block", [1])]
        given = spec(*hooks, cross_layer=cross)
        backend = steer_backend(given, inner="eager")
        logits(compiled(toy(), backend), tokens())
        texts.append((backend.plans[0].text(), given.to_json()))
    (fused, one), (apart, other) = texts
    assert one != other
    assert "detect" not in fused
    assert "gated" not in fused
    detecting = [line for line in apart.splitlines() if "detect" in line]
    assert len(detecting) == 1
    assert "monitor" in detecting[0]
    assert not any("monitor" in line for line in apart.splitlines() if "steer" in line and "detect" not in line)


@pytest.mark.behaviour(24, 25)
def test_clamps_hold_the_sum_that_the_block_hands_on_behind_what_is_added() -> None:
    model, ids, v = toy(), tokens(), direction(4) / direction(4).norm()
    given = spec("post_block", ops=("add", "clamp"), capture=("pre_attn", "mlp_out"), clamps=1)
    backend = steer_backend(given, inner="eager")
    run = compiled(model, backend, fullgraph=True)
    with backend.runtime.capture() as before:
        logits(run, ids)
    clamps = {("post_block", 0): [Clamp(v, value=0.75)]}
    with backend.runtime.steer(AT, clamps=clamps), backend.runtime.capture() as log:
        got = logits(run, ids)
    close(log["pre_attn", 1] @ v, torch.full(ids.shape, 0.75))
    assert torch.equal(log["mlp_out", 0], before["mlp_out", 0])  # the branch is what it was

    def edit(h: Tensor) -> Tensor:
        x = h + AT["post_block", 0]
        held: Tensor = x + (0.75 - x @ v).unsqueeze(-1) * v
        return held

    with edited(model, {("post_block", 0): edit}):
        close(got, logits(model, ids))


@pytest.mark.behaviour(32, 34)
def test_a_capture_of_a_block_is_its_whole_sum_and_the_branch_is_not_steered() -> None:
    model, ids = toy(), tokens()
    hooks = ("post_attn", "post_block", "mlp_out")
    backend = steer_backend(spec("post_block", capture=hooks), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    with watched(model, "post_block", "mlp_out") as seen:
        logits(model, ids)
    with backend.runtime.steer(AT), backend.runtime.capture() as log:
        logits(run, ids)
    close(log["post_block", 0], seen["post_block", 0][0])  # in front of its own steering
    close(log["mlp_out", 0], seen["mlp_out", 0][0])
    close(log["post_attn", 0] + log["mlp_out", 0], log["post_block", 0])
    assert not torch.allclose(log["post_attn", 0], log["post_block", 0], atol=0.1)


@pytest.mark.behaviour(83)
def test_vectors_of_prompts_and_of_decoded_tokens_differ_and_add_to_the_base() -> None:
    model, ids = toy(), tokens()
    backend = steer_backend(spec("post_block"), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    base, prefill, decode = ({("post_block", 1): direction(n)} for n in (5, 6, 7))
    found = {}
    for phase, own in (("prefill", prefill), ("decode", decode)):
        with backend.runtime.steer(base, prefill=prefill, decode=decode, phase=phase):
            found[phase] = logits(run, ids)
        both = {site: base[site] + own[site] for site in base}
        with edited(model, adding(both)):
            close(found[phase], logits(model, ids))
    assert not torch.allclose(found["prefill"], found["decode"], atol=1e-2)


@pytest.mark.behaviour(44)
def test_rows_do_not_depend_on_which_layers_are_here() -> None:
    """Two parts of one model get the same requests: each counts the same rows, and writes its own layers' vectors."""
    given, found = spec("post_block"), []
    asked = [Steering({("post_block", n): direction(n)}) for n in (0, 1, 0)]
    asked.append(Steering(prefill={("post_block", 1): direction(9)}))
    for here in (0, 1):
        made = Registry(given, elsewhere=lambda site, here=here: site[1] != here)  # type: ignore[misc]
        made.reserve(
            reserve_banks(given, [Site(here, "post_block", "", WIDTH, torch.float32, (), "flat")], LAYERS),
            torch.device("cpu"),
        )
        handles = [made.register(config) for config in asked]
        table = made.tables.view("table", ("post_block", here))
        for config, handle in zip(asked, handles, strict=True):
            own = dict(config.tier("prefill").items()) | dict(config.base.items())
            row = table[handle.rows["prefill"]]
            assert torch.equal(row, own.get(("post_block", here), torch.zeros(WIDTH)))
        found.append([handle.rows for handle in handles])
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] != found[0][1]
