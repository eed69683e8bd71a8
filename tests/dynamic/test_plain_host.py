"""The plain host: actions take effect one step later, for their request alone, in a compiled model."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import SteerBackend, Steering, SteerSpec, steer_backend
from steer_compile.dynamic.actions import Action, ClearOverride, SetOverride, SetScale, SetTier
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.errors import NotSteered, SpecError
from tests import _models

SITE = ("post_block", 0)
PUSH = {"post_block": {0: _models.direction(1, 6.0)}}
OTHER = {"post_block": {0: _models.direction(2, 6.0)}}


class Script(Controller):
    """Does what it was told in each step, and keeps what it saw."""

    def __init__(self, actions: dict[int, list[Action]] | None = None, name: str = "script") -> None:
        self.name = name
        self.actions = actions or {}
        self.views: list[StepView] = []
        self.values: list[Tensor] = []

    def on_step(self, view: StepView) -> Iterable[Action]:
        self.views.append(view)
        self.values.append(view.tensors[SITE].clone())
        return self.actions.get(view.step, [])


def backend_of(overrides: int = 3, ops: tuple[str, ...] = ("add", "tier"), capture: str = "post_block") -> SteerBackend:
    return steer_backend(
        SteerSpec(steer=("post_block",), capture=(capture,), rows=6, max_tokens=64, overrides=overrides, ops=ops),
        inner="eager",
    )


def logits_of(
    model: Any, backend: SteerBackend, steps: int = 4, before: Callable[[int], None] | None = None, **steer: Any
) -> list[Tensor]:
    """Logits (batch, vocabulary) of a prompt and of some tokens behind it, which do not depend on the steering."""
    ids = _models.tokens(3, 5)
    more = _models.tokens(3, steps, seed=9)
    found, cache = [], None
    with torch.no_grad(), backend.runtime.steer(**steer):
        for i in range(steps + 1):
            if before is not None:
                before(i)
            out = model(ids if i == 0 else more[:, i - 1 : i], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1].clone())
    return found


def compiled(backend: SteerBackend) -> Any:
    return _models.compiled(_models.llama(), backend, dynamic=True)


def different(a: list[Tensor], b: list[Tensor]) -> list[list[int]]:
    """Batch elements that differ, step by step."""
    return [[i for i in range(len(x)) if not torch.equal(x[i], y[i])] for x, y in zip(a, b, strict=True)]


@pytest.mark.behaviour(64)
def test_an_action_acts_from_the_next_step_on_and_for_its_request_alone() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)
    first = dynamic.step + 1
    dynamic.add(Script({first + 1: [SetOverride("b", PUSH)], first + 2: [ClearOverride("b")]}))
    steered = logits_of(model, backend, names=["a", "b", "c"])
    # step 1 asks, step 2 is steered; its keys and values stay in the cache, so later logits differ as well
    assert different(plain, steered) == [[], [], [1], [1], [1]]
    assert len(dynamic.pool) == 0
    assert dynamic.status()["actions"]["applied"] == {"script": 2}


def test_what_is_asked_behind_the_prompt_acts_on_the_first_decoded_token() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)
    dynamic.add(Script({dynamic.step + 1: [SetOverride("0", PUSH)]}))
    assert different(plain, logits_of(model, backend)) == [[], [0], [0], [0], [0]]


@pytest.mark.behaviour(67)
def test_an_override_equals_the_configuration_that_it_stands_for() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    rows = [Steering(decode=PUSH), Steering(OTHER, decode=PUSH), Steering(OTHER)]
    expected = logits_of(model, backend, rows=rows)
    actions: list[Action] = [SetOverride("0", PUSH), SetOverride("1", PUSH, compose=True), SetOverride("2", OTHER)]
    dynamic.add(Script({dynamic.step + 1: actions}))
    found = logits_of(model, backend, rows=[None, Steering(OTHER), Steering(OTHER)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert dynamic.status()["actions"]["applied"] == {"script": 3}


def test_without_dynamic_steering_a_call_is_as_it_was() -> None:
    backend = backend_of()
    model = compiled(backend)
    before = logits_of(model, backend)
    assert backend.runtime._dynamic is None
    assert backend.runtime.dynamic.controllers is not None
    assert different(before, logits_of(model, backend)) == [[]] * 5


def test_views_show_what_a_capture_does_and_whose_rows_are_whose() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    script = Script()
    dynamic.add(script)
    steer: dict[str, Any] = {
        "rows": [None] * 3,
        "prompt_lengths": [5, 3, 4],
        "names": ["a", "b", "c"],
        "conversations": ["x", "", "y"],
    }
    with backend.runtime.capture() as log:
        logits_of(model, backend, steps=2, **steer)
    for view, values, step in zip(script.views, script.values, log.steps, strict=True):
        assert torch.equal(values, step[SITE].flatten(0, 1))
        assert view.tensors[SITE].data_ptr() == backend.runtime.tables.view("capture", SITE).data_ptr()
    prompt, second, third = script.views
    assert [(r.request, r.start, r.end, r.position, r.phase) for r in prompt.requests] == [
        ("a", 0, 5, 0, "prefill"), ("b", 7, 10, 0, "prefill"), ("c", 11, 15, 0, "prefill"),
    ]  # fmt: skip
    assert [r.conversation for r in prompt.requests] == ["x", "", "y"]
    assert [(r.start, r.end, r.position, r.phase) for r in third.requests] == [
        (0, 1, 6, "decode"), (1, 2, 4, "decode"), (2, 3, 5, "decode"),
    ]  # fmt: skip
    ids = _models.tokens(3, 5)
    assert [r.token_ids.tolist() for r in prompt.requests] == [
        ids[0].tolist(),
        ids[1, 2:].tolist(),
        ids[2, 1:].tolist(),
    ]
    assert [r.token_ids.tolist() for r in second.requests] == _models.tokens(3, 2, seed=9)[:, :1].tolist()
    assert all(r.decodes_next for view in script.views for r in view.requests)
    assert [view.step for view in script.views] == [1, 2, 3]


def test_new_prompts_and_the_end_of_the_block_end_overrides() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)
    dynamic.add(Script({dynamic.step + 2: [SetOverride("0", PUSH)]}))
    logits_of(model, backend)
    assert (len(dynamic.pool), backend.runtime._routes) == (0, {})
    assert different(plain, logits_of(model, backend)) == [[]] * 5
    dynamic.remove("script")
    ids = _models.tokens(3, 5)
    with torch.no_grad(), backend.runtime.steer():
        cache = model(ids, use_cache=True).past_key_values
        dynamic.submit(SetOverride("0", PUSH))
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert len(dynamic.pool) == 1
        again = model(ids).logits[:, -1]
        assert len(dynamic.pool) == 0
        dynamic.submit(SetOverride("0", PUSH))
        model(ids)
    assert torch.equal(again, plain[0])
    assert "request '0' is in prefill" in dynamic.status()["rejections"][-1]["reason"]


def test_actions_of_another_thread_during_a_step_wait_for_the_next() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)

    class Meanwhile(Controller):
        name = "meanwhile"

        def on_step(self, view: StepView) -> Iterable[Action]:
            if view.step == first + 1:
                thread = threading.Thread(target=dynamic.submit, args=(SetOverride("1", PUSH), "elsewhere"))
                thread.start()
                thread.join()
                assert len(dynamic.pool) == 0
            return ()

    first = dynamic.step + 1
    dynamic.add(Meanwhile())
    assert different(plain, logits_of(model, backend)) == [[], [], [1], [1], [1]]
    assert dynamic.status()["actions"]["applied"] == {"elsewhere": 1}


def test_the_tier_and_its_gain_change_between_steps_without_recompiling() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first = dynamic.step + 1
    actions: dict[int, list[Action]] = {first + 1: [SetTier(PUSH, 0.0)], first + 2: [SetScale(1.0, gain=True)]}
    dynamic.add(Script(actions))
    assert different(plain, logits_of(model, backend)) == [[], [], [], [0, 1, 2], [0, 1, 2]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_a_replay_gives_the_same_tokens(tmp_path: Path) -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic
    backend.runtime.register_vectors("other", OTHER)
    first = dynamic.step + 1
    actions: dict[int, list[Action]] = {
        first: [SetOverride("0", PUSH), SetOverride("2", named=[("other", 0.3)])],
        first + 1: [SetScale(0.5, "0"), SetOverride("1", OTHER, compose=True), SetTier(PUSH, 0.1)],
        first + 2: [ClearOverride("0"), SetScale(2.0)],
    }
    dynamic.add(Script(actions))
    dynamic.record(tmp_path / "run.jsonl")
    recorded = logits_of(model, backend)
    dynamic.stop_recording()
    checksum = dynamic.journal.checksum

    fresh = backend_of()
    again, replaying = compiled(fresh), fresh.runtime.dynamic
    fresh.runtime.register_vectors("other", OTHER)
    replaying.replay(tmp_path / "run.jsonl")
    replaying.add(Script({2: [SetOverride("1", PUSH)]}))  # discarded meanwhile
    assert different(recorded, logits_of(again, fresh)) == [[]] * 5
    assert replaying.journal.checksum != ""
    assert replaying.status()["actions"]["discarded"] == {"script": 1}
    assert (replaying.journal.applied, checksum != "") == (dynamic.journal.applied, True)

    changed = backend_of()
    other = compiled(changed)
    changed.runtime.register_vectors("other", PUSH)
    changed.runtime.dynamic.replay(tmp_path / "run.jsonl")
    logits_of(other, changed)
    assert "vector set 'other' had the digest" in changed.runtime.dynamic.status()["rejections"][0]["reason"]


def test_in_a_model_of_several_graphs_a_controller_sees_the_whole_step() -> None:
    spec = SteerSpec(steer=("post_block",), capture=("post_block",), rows=2, max_tokens=64, overrides=2)
    backend = steer_backend(spec, inner="eager")
    model = _models.compiled(_models.toy(layers=3, cut=1), backend)
    script = Script()
    backend.runtime.dynamic.add(script)
    with backend.runtime.capture() as log, torch.no_grad(), backend.runtime.steer():
        model(_models.tokens(2, 4))
        model(_models.tokens(2, 4))
    assert len(script.views) == 2
    assert set(script.views[0].tensors) == {("post_block", n) for n in range(3)}
    assert [r.token_ids.tolist() for r in script.views[1].requests] == _models.tokens(2, 4).tolist()
    assert [torch.equal(v, s[SITE].flatten(0, 1)) for v, s in zip(script.values, log.steps, strict=True)] == [True] * 2


def test_bad_names_are_refused() -> None:
    backend = backend_of()
    model = compiled(backend)
    backend.runtime.dynamic.add(Script())
    with pytest.raises(SpecError, match="gives a name twice; give each sequence its own"):
        logits_of(model, backend, rows=[None] * 3, names=["a", "a", "b"])
    with pytest.raises(SpecError, match="names='abc' is no list of texts"):
        logits_of(model, backend, rows=[None] * 3, names="abc")
    with pytest.raises(NotSteered, match="2 names are given but the call has 3 sequences; give one for each"):
        logits_of(model, backend, rows=[None] * 3, names=["a", "b"])


def test_a_request_that_goes_back_to_its_prompt_loses_its_override_and_gets_it_again() -> None:
    backend = backend_of()
    model, dynamic = compiled(backend), backend.runtime.dynamic

    class Always(SteeringController):
        def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
            return Decision(PUSH, latch="request")

    dynamic.add(Always("always"))
    ids, held = _models.tokens(3, 5), []
    with torch.inference_mode(), backend.runtime.steer():
        cache = model(ids, use_cache=True).past_key_values
        for told in ("decode", "decode", "prefill", "decode"):
            backend.runtime.phases.told = told
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            held.append(len(dynamic.pool))
        backend.runtime.phases.told = None
    assert held == [3, 3, 0, 3]
    assert dynamic.status()["actions"]["rejected"] == {}


@pytest.mark.behaviour(70)
def test_gates_in_a_compiled_model() -> None:
    backend = backend_of(ops=("add", "row_monitor"))
    model, dynamic = compiled(backend), backend.runtime.dynamic
    plain = logits_of(model, backend)
    vectors = {"layers.0.post_block": PUSH["post_block"][0].tolist()}
    probe = {"site": "layers.0.post_block", "probe": [1.0] * _models.WIDTH, "threshold": -1e6}
    add = {"add": {"vectors": vectors}}
    dynamic.gate("a", [{"when": "always", "apply": add}])
    dynamic.gate("b", [{"when": {**probe, "sharpness": 1.0}, "scope": "this_token", "apply": add}])
    dynamic.gate("c", [{"when": {**probe, "threshold": 1e6}, "scope": "rest_of_request", "apply": add}])
    steered = logits_of(model, backend, rows=[None, None, None], names=["a", "b", "c"])
    assert different(plain, steered) == [[], [0, 1], [0, 1], [0, 1], [0, 1]]
    expected = logits_of(model, backend, rows=[Steering(decode=PUSH)] * 2 + [None])
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
    assert (
        different(plain, logits_of(model, backend, rows=[None] * 3, names=["a", "b", "c"])) == [[]] * 5
    )  # gates ended
