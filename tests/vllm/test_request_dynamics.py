"""The host of dynamic steering over rows of requests, without an engine: routes, lines of the memory, what is read."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import SteerSpec
from steer_compile.dynamic.actions import Action, ClearOverride, SetOverride, SetScale
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.views import StepView
from steer_compile.errors import SpecError, SteerError, TooManyTokens
from steer_compile.ir import Site
from steer_compile.passes.plan_edits import reserve_banks
from steer_compile.runtime.registry import Registry
from steer_compile.vllm.admission import block_keys, own_blocks
from steer_compile.vllm.dynamic import RequestDynamics
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.lines import Lines
from steer_compile.vllm.model import Shape
from steer_compile.vllm.operator_code import controller_specs, loaded, to_data
from steer_compile.vllm.requests import KEY, parse
from steer_compile.vllm.rows import RequestRows
from steer_compile.vllm.settings import Settings
from steer_compile.vllm.site_data import read
from steer_compile.vllm.transport import sent

WIDTH, PROMPT = 4, 3
SITE = ("post_block", 0)
OPS = ("add", "tier", "monitor", "row_monitor", "clamp", "memory")


def registry(overrides: int = 2) -> Registry:
    spec = SteerSpec(
        steer=("post_block",), capture=("post_block",), rows=8, max_tokens=64, ops=OPS, overrides=overrides,
        sequences=3, cross_layer=True,
    )  # fmt: skip
    made = Registry(spec)
    made.reserve(
        reserve_banks(spec, [Site(0, *SITE[:1], "", WIDTH, torch.float32, (), "flat")], 1), torch.device("cpu")
    )
    return made


class Script(Controller):
    """Asks for what it was told in each step, and keeps what it saw."""

    name = "script"

    def __init__(self, actions: dict[int, list[Action]] | None = None) -> None:
        self.actions = actions or {}
        self.views: list[StepView] = []

    def on_step(self, view: StepView) -> Iterable[Action]:
        self.views.append(view)
        return self.actions.get(view.step, [])


def unit(place: int, size: float = 1.0) -> Any:
    return {"post_block": {0: size * torch.eye(WIDTH)[place]}}


class World:
    """Rows and host of one runner, driven step by step."""

    def __init__(self, actions: dict[int, list[Action]] | None = None, overrides: int = 2) -> None:
        self.registry = registry(overrides)
        self.rows = RequestRows(self.registry)
        self.script = Script(actions)
        self.host = RequestDynamics(self.registry, self.rows, [self.script])

    def begin(self, name: str, asked: dict[str, Any] | None = None, **more: Any) -> None:
        config = parse(asked or {})
        made = {phase: self.registry.contents(config, phase) for phase in ("prefill", "decode")}
        data = {**sent(made, config.tokens), **more}
        self.host.begun(name, data)
        self.rows.admit(name, {KEY: data})

    def end(self, finished: Iterable[str] = (), preempted: Iterable[str] = ()) -> None:
        self.host.ended(finished, preempted)
        self.rows.drop(finished)
        self.rows.drop(preempted)

    def step(self, *spans: tuple[str, int, int]) -> list[list[float]]:
        """A step of requests (name, start, count); what each token gets at the site."""
        names = [name for name, *_ in spans]
        starts, counts = np.array([span[1:] for span in spans], np.int32).reshape(-1, 2).T
        all_spans = starts, counts, np.full(len(names), PROMPT, np.int32)
        tokens = int(counts.sum())
        self.host.begin(names, all_spans, torch.arange(64, dtype=torch.int32))
        self.rows.step(names, *all_spans)
        tables = self.registry.tables
        rows = tables.rows[:tokens].long()
        found: list[list[float]] = (tables.view("table", SITE)[rows] * tables.scale[rows].unsqueeze(1)).tolist()
        self.host.end()
        return found


NOTHING, PUSHED, OWN = [0.0] * WIDTH, [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]
BASE = {"base": {"post_block": {"0": OWN}}}


@pytest.mark.behaviour(64)
def test_an_override_applies_in_front_of_the_next_step_and_to_decoded_tokens_of_its_request() -> None:
    world = World({2: [SetOverride("a", unit(1))], 4: [ClearOverride("a")]})
    world.begin("a", BASE)
    world.begin("b")
    assert world.step(("a", 0, 3), ("b", 0, 2)) == [OWN] * 3 + [NOTHING] * 2
    assert world.step(("a", 3, 1), ("b", 2, 1)) == [OWN, NOTHING]  # asked for behind this step
    assert world.step(("b", 3, 1), ("a", 4, 1)) == [NOTHING, PUSHED]
    assert world.step(("a", 5, 2), ("b", 4, 1)) == [PUSHED, PUSHED, NOTHING]
    assert world.step(("a", 7, 1), ("b", 5, 1)) == [OWN, NOTHING]


def test_a_request_without_steering_of_its_own_is_routed_and_let_go() -> None:
    world = World({1: [SetOverride("a", unit(1))], 3: [ClearOverride("a")]})
    world.begin("a")
    world.step(("a", 0, 3))
    assert world.step(("a", 3, 1)) == [PUSHED]
    assert world.rows.live == 0  # it holds no row of the configurations
    world.step(("a", 4, 1))
    assert world.step(("a", 5, 1)) == [NOTHING]
    world.end(["a"])
    assert world.host.status()["overrides"]["in_use"] == 0


@pytest.mark.behaviour(65)
@pytest.mark.parametrize("how", ["finished", "preempted", "begun again"])
def test_overrides_end_with_requests(how: str) -> None:
    world = World({1: [SetOverride("a", unit(1))], 3: [SetOverride("a", unit(2))]})
    world.begin("a", BASE)
    world.step(("a", 0, 3))
    assert world.step(("a", 3, 1)) == [PUSHED]
    if how == "finished":
        world.end(["a"])
    elif how == "preempted":
        world.end(preempted=["a"])
    world.begin("a", BASE)
    assert world.host.status()["overrides"]["in_use"] == 0
    assert world.step(("a", 0, 5)) == [OWN] * 5  # the prompt, and what is computed again
    found = world.step(("a", 5, 1))
    assert found == [[0.0, 0.0, 1.0, 0.0]]
    assert world.step(("a", 0, 3), ("a", 6, 1))[:3] == [OWN] * 3  # prompt tokens read their own row, whatever is routed


@pytest.mark.behaviour(53)
def test_a_request_that_is_preempted_and_ends_in_one_step_gives_its_rows_back_once() -> None:
    world = World({1: [SetOverride("a", unit(1)), SetOverride("b", unit(2))]})
    for name in "ab":
        world.begin(name, BASE)  # which share their rows
    world.step(("a", 0, 3), ("b", 0, 3))
    world.step(("a", 3, 1), ("b", 3, 1))
    world.end(finished=["a"], preempted=["a"])
    assert (world.rows.state()["rows_in_use"], world.host.status()["overrides"]["in_use"]) == (2, 1)
    assert world.step(("b", 4, 1)) == [[0.0, 0.0, 1.0, 0.0]]
    world.end(finished=["b", "a"])
    assert (world.rows.state()["rows_in_use"], world.host.status()["overrides"]["in_use"]) == (0, 0)


@pytest.mark.behaviour(65)
def test_a_request_in_prefill_or_unknown_gets_none() -> None:
    world = World({1: [SetOverride("a", unit(1)), SetOverride("z", unit(1))]})
    world.begin("a")
    world.step(("a", 0, 1))
    world.step(("a", 1, 2))
    found = world.host.status()
    assert found["actions"]["rejected"] == {"script": 2}
    reasons = [rejection["reason"] for rejection in found["rejections"]]
    assert "prefill" in reasons[0]
    assert "'z'" in reasons[1]


def test_one_that_a_step_leaves_out_is_where_it_was() -> None:
    world = World({1: [SetOverride("a", unit(1))]})
    world.begin("a")
    world.begin("b")
    world.step(("a", 0, 3), ("b", 0, 3))
    assert world.step(("b", 3, 1)) == [NOTHING]
    assert world.step(("a", 3, 1), ("b", 4, 1)) == [PUSHED, NOTHING]


@pytest.mark.behaviour(66)
def test_the_gain_of_a_row_and_of_the_tier_change_in_steady_decoding() -> None:
    world = World({2: [SetScale(0.5, "a"), SetScale(3.0, gain=True)]})
    world.begin("a", BASE)
    world.registry.sites.set_tier(unit(3))
    world.step(("a", 0, 3))
    world.step(("a", 3, 1))
    assert world.registry.tables.gain[:1].tolist() == [1.0]
    assert world.step(("a", 4, 1)) == [[0.5, 0.0, 0.0, 0.0]]
    assert world.registry.tables.gain[:1].tolist() == [3.0]


def test_what_controllers_see() -> None:
    world = World()
    world.begin("a", conversation="chat")
    world.begin("b")
    for _ in range(2):
        world.step(("a", 1, 2), ("b", 3, 1))
    (view, _), sites = world.script.views, world.script.views[0].tensors
    a, b = view.requests
    assert (a.request, a.start, a.end, a.position, a.phase, a.prompt, a.conversation) == (
        "a",
        0,
        2,
        1,
        "prefill",
        3,
        "chat",
    )
    assert (b.start, b.end, b.phase, b.conversation, a.decodes_next) == (2, 3, "decode", "", True)
    assert (a.token_ids.tolist(), b.token_ids.tolist(), a.token_ids.dtype) == ([0, 1], [2], torch.int64)
    assert sites[SITE].data_ptr() == world.registry.tables.view("capture", SITE).data_ptr()  # not copied


def test_gates_stay_over_a_preemption_and_go_with_their_request() -> None:
    world = World()
    gates = [{"when": {"site": "layers.0.post_block", "probe": OWN, "threshold": -1.0}, "scope": "rest_of_request",
              "apply": {"add": {"vectors": {"layers.0.post_block": PUSHED}}}}]  # fmt: skip
    world.begin("a", gates=gates)
    world.step(("a", 0, 3))
    assert world.step(("a", 3, 1)) == [PUSHED]
    world.end(preempted=["a"])
    world.begin("a", gates=gates)
    assert world.step(("a", 0, 4)) == [NOTHING] * 4
    assert world.step(("a", 4, 1)) == [PUSHED]
    world.end(["a"])
    assert world.host.status()["gates"]["requests"] == 0
    world.begin("a")
    world.step(("a", 0, 3))
    assert world.step(("a", 3, 1)) == [NOTHING]


SPANS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 3)), max_size=3, unique_by=lambda s: s[0]
)


@given(st.lists(st.tuples(SPANS, st.sets(st.integers(0, 2))), max_size=6))
def test_each_live_request_has_a_line_for_its_last_token(
    steps: list[tuple[list[tuple[int, int, int]], set[int]]],
) -> None:
    made = registry()
    lines, mine, live = Lines(made.tables), dict[str, int](), set[str]()
    state = made.tables.view("state", SITE)
    for spans, ended in steps:
        lines.drop([str(i) for i in ended])
        live -= {str(i) for i in ended}
        for i, *_ in spans:
            if str(i) not in live:
                lines.begin(str(i))
                live.add(str(i))
                mine.pop(str(i), None)
        state.fill_(7.0)
        names = [str(i) for i, *_ in spans]
        starts, counts = (np.array([s[k] for s in spans], np.int32) for k in (1, 2))
        found = lines.step(names, starts, counts, np.full(len(names), PROMPT, np.int32)).tolist()
        at = 0
        for name, count in zip(names, counts.tolist(), strict=True):
            part, at = found[at : at + count], at + count
            assert part[:-1] == [0] * (len(part) - 1)
            if part:
                assert part[-1] == mine.setdefault(name, part[-1]) > 0
        assert at == len(found)
        here = [line for name, line in mine.items() if name in live]
        assert len(set(here)) == len(here)


def test_a_line_that_is_taken_again_forgets() -> None:
    made = registry()
    lines, state = Lines(made.tables), made.tables.view("state", SITE)
    for start, kept in ((PROMPT, 0.0), (0, 7.0)):  # a prompt forgets in the graph
        lines.begin("a")
        state.fill_(7.0)
        (line,) = lines.step(["a"], *(np.array([n], np.int32) for n in (start, 1, PROMPT))).tolist()
        assert state[line].tolist() == [kept] * 2
    for name in "bc":
        lines.begin(name)
    with pytest.raises(TooManyTokens, match="sequences=3"):
        lines.begin("d")


@pytest.mark.behaviour(59, 60)
def test_generated_blocks_of_dynamic_engines_have_keys_of_their_own() -> None:
    one, other = (SimpleNamespace(request_id="r", num_prompt_tokens=10, sampling_params=None) for _ in range(2))
    assert block_keys(one, 8, 16) == ()
    own_blocks(one)
    own_blocks(other)
    assert block_keys(one, 0, 8) == block_keys(other, 0, 10) == ()
    for start in (8, 10):
        (mine,), (others,) = block_keys(one, start, 16), block_keys(other, start, 16)
        assert mine[0] == others[0] == "steer_dynamic"
        assert mine != others


def front(**options: Any) -> FrontEnd:
    given = {"ops": OPS, "capture": ("post_block",), "overrides": 2, "cross_layer": True, "dtype": "float16", **options}
    return FrontEnd(
        Settings(SteerSpec(steer=("post_block",), rows=4, **given)), Shape(WIDTH, torch.float16, range(4), 4)
    )


def test_settings_of_row_monitors_are_in_the_digest() -> None:
    base = {"probe": [1.0] * WIDTH, "threshold": 0.5}
    kinds: list[dict[str, Any]] = [
        {}, {"threshold": 0.6}, {"sharpness": 2.0}, {"clamps": True}, {"kind": "line"}, {"kind": "line", "low": -1.0},
        {"kind": "line", "high": 2.0}, {"kind": "step"}, {"kind": "step", "low": 0.1},
    ]  # fmt: skip
    asked = [{"monitors": {"layers.1.post_block": {**base, **kind}}} for kind in kinds]
    assert len({front().checked(each).digests["decode"] for each in asked}) == len(kinds)
    gate = {"when": {"site": "layers.1.post_block", "probe": [1.0] * WIDTH},
            "apply": {"add": {"vectors": {"layers.2.post_block": [1.0] * WIDTH}}}}  # fmt: skip
    gates = [{"gates": [gate]}, {"gates": [{**gate, "when": {**gate["when"], "threshold": 1.0}}]}]  # type: ignore[dict-item]
    assert len({front().checked(each).digests["decode"] for each in gates}) == 2
    assert front().checked(gates[0]).digests["prefill"] == ""


PIECES = st.sampled_from(
    ["gates", "conversation", "when", "scope", "apply", "add", "attenuate", "clamp", "named", "vectors", "strength",
     "site", "probe", "threshold", "sharpness", "layers.1.post_block", "direction", "hi", "always", "this_token",
     "next_step", "rest_of_conversation", "tier", "monitor", "gate_rows", "hidden", "weight", "gain", "kind"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | PIECES | st.just([1.0] * WIDTH),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PIECES, inner, max_size=3),
    max_leaves=8,
)
WHEN = st.fixed_dictionaries(
    {"site": st.just("layers.1.post_block") | JSON, "probe": st.just([1.0] * WIDTH) | JSON},
    optional={"threshold": JSON, "sharpness": JSON},
)
APPLY = st.fixed_dictionaries({}, optional={"add": JSON, "attenuate": JSON, "clamp": JSON}) | st.fixed_dictionaries(
    {"add": st.fixed_dictionaries({}, optional={"named": JSON, "vectors": JSON, "strength": JSON})}
)
GATES = st.fixed_dictionaries({"when": WHEN | JSON, "apply": APPLY | JSON}, optional={"scope": PIECES | JSON})


@given(st.lists(GATES, max_size=2) | JSON, st.none() | JSON)
def test_no_gates_raise_anything_else(gates: Any, conversation: Any) -> None:
    try:
        front().checked({"gates": gates, "conversation": conversation})
    except SteerError:
        return


@given(
    JSON
    | st.fixed_dictionaries(
        {"monitor": st.fixed_dictionaries({"site": st.just("layers.1.post_block"), "monitor": JSON})}
    )
)
def test_no_data_of_sites_raises_anything_else(data: Any) -> None:
    try:
        front().check_sites(read(data))
    except SteerError:
        return


BAD_CONTROLLERS: list[Any] = [
    3, {"a": {}}, {"a": {"class": "x"}}, {"a": {"class": "x:y:z"}}, {"a": {"class": "os;x:y"}},
    {"a": {"class": "x:Y", "args": [1]}}, {"a": {"class": "x:Y", "more": 1}},
    {"a": {"class": "x:Y", "args": {"v": {1}}}},
    {str(i): {"class": "x:Y"} for i in range(17)}, {"": {"class": "x:Y"}},
]  # fmt: skip


def test_controllers_are_read_and_made() -> None:
    path = "tests.vllm.controllers:Script"
    specs = controller_specs({"b": {"class": path, "args": {"tier": 1.0}}, "a": {"class": path}})
    assert controller_specs(to_data(specs)) == specs
    assert [controller.name for controller in loaded(specs)] == ["a", "b"]
    for bad in BAD_CONTROLLERS:
        with pytest.raises(SpecError):
            controller_specs(bad)
    with pytest.raises(SpecError, match="does not take its args"):
        loaded(controller_specs({"a": {"class": path, "args": {"nothing": 1}}}))


def test_captures_need_no_folder_where_gates_look_at_them() -> None:
    def read_settings(**more: Any) -> Settings | None:
        return Settings.read(
            {"steer_compile": {"steer": ["post_block"], "capture": ["post_block"], **more}}, 8, torch.float32
        )

    assert read_settings(overrides=1)
    with pytest.raises(SpecError, match="no capture_dir"):
        read_settings()
    found = read_settings(controllers={"a": {"class": "x:Y"}})
    assert found is not None
    assert found.dynamic
