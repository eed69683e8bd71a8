"""Dynamic tier, monitors and clamps without a model: what lies in the banks, and that a refusal changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile import Clamp, Handle, HookSelection, Monitor, Patch, Runtime, Steering, SteerSpec
from steer_compile.errors import SiteNotFound, SpecError, SteerError, VectorError
from steer_compile.ir import DECODE, GAIN, Bank, Plan, SiteTable
from steer_compile.kernels.sae_delta import NO_FEATURE
from steer_compile.runtime.vectors import PHASES
from steer_compile.spec import NEEDS, OP_FAMILIES
from tests.runtime.bank_shapes import (
    CLAMPS,
    FEATURES,
    FREE,
    LAYERS,
    PATCHES,
    ROWS,
    SEQUENCES,
    SHAPES,
    SITE,
    SITES,
    TOKENS,
    UNITS,
    WHOLE,
    WIDTH,
    tiny,
)  # fmt: skip


def bind(
    runtime: Runtime, ops: tuple[str, ...] = OP_FAMILIES, sites: Any = SITES, more: tuple[str, ...] = ()
) -> Runtime:
    """Bind banks of ``ops`` at ``sites``, in a graph that is a part of a model if sites are missing."""
    shapes = [shape for op in (*ops, *more) for shape in SHAPES[op]]
    banks = (
        *runtime.tables.banks,
        *(Bank(kind, width, torch.float32, tuple(sites), length) for kind, width, length in shapes),
    )
    table = SiteTable(partial=tuple(sites) != SITES)
    runtime.bind(Plan((), banks, TOKENS, CLAMPS), table, torch.device("cpu"))
    return runtime


def make(ops: tuple[str, ...] = OP_FAMILIES, bound: bool = True) -> Runtime:
    runtime = Runtime(
        SteerSpec(
            steer="post_block", ops=ops, rows=ROWS, max_tokens=TOKENS, clamps=CLAMPS, cross_layer=True,
            sequences=SEQUENCES, hidden=UNITS, patches=PATCHES, features=FEATURES, sae_features=WHOLE, top_features=4,
        )
    )  # fmt: skip
    return bind(runtime, ops) if bound else runtime


def axis(place: int) -> Tensor:
    return torch.eye(WIDTH)[place]


def clamp(place: int, value: float = 0.0) -> Clamp:
    return Clamp(3.0 * axis(place), value=value)


def clamps_of(runtime: Runtime, row: int, layer: int = 0) -> list[tuple[int, float]]:
    """Axis and value of each clamp that a token of this row gets."""
    span, site = slice(row * CLAMPS, (row + 1) * CLAMPS), ("post_block", layer)
    settings, directions = (runtime.tables.view(kind, site)[span] for kind in ("clamp_set", "clamp"))
    for unused in range(int((settings[:, 2] != 0).sum()), CLAMPS):
        assert settings[unused].tolist() == FREE
        assert not directions[unused].any()
    return [(int(v.argmax()), float(s[0])) for v, s in zip(directions, settings, strict=True) if s[2]]


def state(runtime: Runtime) -> Any:
    tensors = [*runtime.tables.tensors, runtime.tables.scale, runtime.tables.gain, runtime.tables.decode]
    return runtime.status(), [tensor.tolist() for tensor in tensors]


def test_banks_begin_neutral() -> None:
    tables = make().tables
    neutral = {"clamp_set": FREE, "sae_set": NO_FEATURE, "full_set": NO_FEATURE}
    for bank, tensor in zip(tables.banks, tables.tensors, strict=True):
        assert tensor.shape == (LAYERS, bank.length, bank.width)
        line = torch.tensor(neutral.get(bank.kind, [0.0] * bank.width))
        assert torch.equal(tensor, line.expand_as(tensor))
        for i, site in enumerate(SITES):
            assert tables.view(bank.kind, site).data_ptr() == tensor[i].data_ptr()
    named = tables.named((GAIN, DECODE))
    assert [(t.shape, t.dtype, t.any().item()) for t in named.values()] == [((TOKENS,), torch.float32, False)] * 2


@pytest.mark.parametrize("late", [False, True], ids=["set after compiling", "set before compiling"])
def test_tier_and_site_monitors(late: bool) -> None:
    runtime = make(bound=not late)
    runtime.set_tier({SITE: axis(1)}, gain=3.0)
    runtime.set_monitor("layers.1.post_block", 2 * axis(2), 0.5, 4.0, gate_rows=True)
    if late:
        bind(runtime)
    tables = runtime.tables
    assert [tables.view("tier", s).tolist() for s in SITES] == [[[0, 1, 0, 0]], [[0, 0, 0, 0]]]
    assert [tables.view("probe", s).tolist() for s in SITES] == [[[0, 0, 0, 0]], [[0, 0, 2, 0]]]
    assert [tables.view("probe_set", s).tolist() for s in SITES] == [[[0.0] * 8], [[0.5, 4, 0, 0, 1, 1, 1, 0]]]
    runtime.set_tier({SITES[1]: axis(0)})
    runtime.set_monitor(SITES[1], axis(3))
    assert [tables.view("tier", s).tolist() for s in SITES] == [[[0, 0, 0, 0]], [[1, 0, 0, 0]]]
    assert tables.view("probe_set", SITES[1]).tolist() == [[0, 1, 0, 0, 1, 1, 0, 0]]
    runtime.set_tier()
    runtime.set_monitor(("resid_post", 1))
    runtime.set_monitor(SITES[1], None)
    assert not any(tables.view(kind, s).any() for kind in ("tier", "probe") for s in SITES)
    assert not tables.view("probe_set", SITES[1]).any()


def tokens(runtime: Runtime, batch: int, length: int) -> tuple[list[float], list[float]]:
    runtime.before_call(0, batch, length)
    count = batch * length
    return runtime.tables.gain[:count].tolist(), runtime.tables.decode[:count].tolist()


@pytest.mark.behaviour(66)
def test_gain_and_decode_mask_follow_the_calls() -> None:
    runtime = make()
    runtime.set_tier({SITE: axis(0)}, gain=2.5)
    assert tokens(runtime, 2, 3) == ([0] * 6, [0] * 6)
    assert tokens(runtime, 2, 1) == ([2.5] * 2, [1] * 2)
    runtime.set_tier({SITE: axis(0)}, gain=-1.0)
    assert tokens(runtime, 2, 1) == ([-1] * 2, [1] * 2)
    assert tokens(runtime, 1, 5) == ([0] * 5, [0] * 5)
    with runtime.steer(phase="decode"):
        assert tokens(runtime, 2, 4) == ([-1] * 8, [1] * 8)
    with runtime.steer(phase="prefill"):
        assert tokens(runtime, 1, 1) == ([0], [0])


def test_gain_and_decode_mask_are_written_only_when_they_change() -> None:
    runtime, idle = make(), make(("add", "clamp"))
    for each in (runtime, idle):
        tokens(each, 2, 2)
        tokens(each, 2, 1)
        each.tables.decode.fill_(7)
    assert tokens(runtime, 2, 1)[1] == [7, 7]
    assert tokens(idle, 2, 2)[1] == [7] * 4
    assert tokens(runtime, 2, 2)[1] == [0] * 4
    assert tokens(runtime, 2, 1)[1] == [1] * 2


def test_a_bank_that_comes_later_finds_its_tokens() -> None:
    runtime = make(bound=False)
    bind(runtime, ("add",), SITES[:1])
    tokens(runtime, 2, 2)
    assert tokens(runtime, 2, 1) == ([0] * 2, [0] * 2)
    bind(runtime, OP_FAMILIES, SITES[1:])  # Dynamo compiles a later part of the model inside of the call
    runtime.before_call(1, 2, 1)
    assert runtime.tables.gain[:3].tolist() == [1, 1, 0]
    assert runtime.tables.decode[:3].tolist() == [1, 1, 0]


@pytest.mark.behaviour(23)
@pytest.mark.parametrize("late", [False, True], ids=["set after compiling", "set before compiling"])
def test_monitors_and_clamps_lie_in_both_rows_of_a_configuration(late: bool) -> None:
    runtime = make(bound=not late)
    config = Steering(
        monitors={SITE: Monitor(2 * axis(1), 0.5, 3.0)}, clamps={SITES[1]: [clamp(2, 5.0), Clamp(axis(0), -1, 2, 0.5)]}
    )
    handle = runtime.register(config)
    if late:
        bind(runtime)
    assert sorted(handle.rows.values()) == [3, 4]
    tables = runtime.tables
    for row in handle.rows.values():
        assert tables.view("rowprobe", SITE)[row].tolist() == [0, 2, 0, 0]
        assert tables.view("rowprobe_set", SITE)[row].tolist() == [0.5, 3, 0, 0, 1, 1, 1, 0]
        assert tables.view("rowprobe_set", SITES[1])[row].tolist() == [0.0] * 8
        assert clamps_of(runtime, row, 0) == []
        assert clamps_of(runtime, row, 1) == [(2, 5), (0, -1)]
        assert tables.view("clamp_set", SITES[1])[row * CLAMPS + 1].tolist() == [-1, 2, 0.5]
    assert not any(clamps_of(runtime, row, 1) for row in (0, 1, 2, 5, 6))


@pytest.mark.parametrize("config", [{"monitors": {SITE: Monitor(axis(0))}}, {"clamps": {SITE: [clamp(0)]}}])
def test_a_configuration_without_vectors_takes_rows(config: dict[str, Any]) -> None:
    runtime = make()
    handle = runtime.register(Steering(**config))
    assert runtime.status()["rows"] == 2
    runtime.before_call(0, 1, 1)
    with runtime.steer(rows=[handle]):
        runtime.before_call(0, 1, 2)
        assert runtime.tables.rows[:2].tolist() == [handle.rows["prefill"]] * 2


PARTS: list[dict[str, Any]] = [
    {},
    {"base": {SITE: axis(0)}},
    {"monitors": {SITE: Monitor(axis(0))}},
    {"monitors": {SITE: Monitor(axis(0), 1.0)}},
    {"monitors": {SITES[1]: Monitor(axis(0))}},
    {"clamps": {SITE: [clamp(0)]}},
    {"clamps": {SITE: [clamp(1)]}},
    {"clamps": {SITE: [clamp(0, 1.0)]}},
    {"clamps": {SITE: [clamp(0), clamp(1)]}},
    {"clamps": {SITE: [clamp(0)], SITES[1]: [clamp(1)]}},
]


@pytest.mark.behaviour(36)
@given(st.sampled_from(PARTS), st.sampled_from(PARTS), st.sampled_from(PARTS), st.sampled_from(PARTS))
def test_rows_are_shared_by_equal_content_alone(a: Any, b: Any, c: Any, d: Any) -> None:
    runtime = make()
    one, other = Steering(**{**a, **b}), Steering(**{**c, **d})
    rows = [runtime.register(config).rows for config in (one, other)]
    assert (rows[0] == rows[1]) == (one == other)


@pytest.mark.behaviour(41)
def test_global_clamps_lie_in_every_row_in_front_of_its_own() -> None:
    runtime = make()
    handle = runtime.register(Steering(clamps={SITE: [clamp(0, 1.0)]}))
    prefill = runtime.register(Steering(prefill={SITE: axis(0)}))
    runtime.set_global(clamps={SITE: [clamp(1, 2.0)], SITES[1]: [clamp(2)]})
    after = runtime.register(Steering(clamps={SITE: [clamp(3), clamp(2)]}, decode={SITE: axis(0)}))
    assert [clamps_of(runtime, row) for row in (0, 1, 2)] == [[], [(1, 2)], [(1, 2)]]
    assert clamps_of(runtime, prefill.rows["prefill"]) == [(1, 2)]
    for phase in PHASES:
        assert clamps_of(runtime, handle.rows[phase]) == [(1, 2), (0, 1)]
        assert clamps_of(runtime, handle.rows[phase], 1) == [(2, 0)]
    assert clamps_of(runtime, after.rows["decode"]) == [(1, 2), (3, 0), (2, 0)]
    runtime.clear_global()
    assert [clamps_of(runtime, row) for row in (1, 2, handle.rows["decode"])] == [[], [], [(0, 1)]]


@pytest.mark.behaviour(46)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(PARTS) - 1), min_size=2, max_size=8))
def test_a_row_in_use_again_holds_nothing_of_its_last_owner(chosen: list[int]) -> None:
    used = make()
    for number in chosen:
        fresh = make()
        config = Steering(base={SITES[1]: axis(3)}, **{k: v for k, v in PARTS[number].items() if k != "base"})
        a, b = used.register(config), fresh.register(config)
        assert set(a.rows.values()) == set(b.rows.values())
        for kind, lines in (("rowprobe", 1), ("rowprobe_set", 1), ("clamp", CLAMPS), ("clamp_set", CLAMPS)):
            for site in SITES:
                for phase in PHASES:
                    mine, other = a.rows[phase] * lines, b.rows[phase] * lines
                    got = used.tables.view(kind, site)[mine : mine + lines]
                    assert torch.equal(got, fresh.tables.view(kind, site)[other : other + lines])
        used.release(a)


TOO_MANY = {SITE: [clamp(i % WIDTH) for i in range(CLAMPS)]}
REFUSED: list[tuple[Callable[[Runtime, Handle], object], type[SteerError], str]] = [
    (
        lambda r, h: r.register(Steering(clamps=TOO_MANY)),
        VectorError,
        "layers.0.post_block gets 4 clamps, global ones included, but the spec has clamps=3; raise it",
    ),
    (lambda r, h: r.set_global(clamps={SITE: [clamp(0), clamp(1), clamp(2)]}), VectorError, "gets 4 clamps"),
    (lambda r, h: r.set_global(clamps={SITES[1]: TOO_MANY[SITE] * 2}), VectorError, "layers.1.post_block gets 6"),
    (
        lambda r, h: r.set_global(clamps={SITE: [Clamp([1.0], 0)]}),
        VectorError,
        "direction of layers.0.post_block has 1",
    ),
    (lambda r, h: r.set_global({SITE: [3e38] * WIDTH}, {SITE: [3e38] * WIDTH}, clamps={}), VectorError, "overflows"),
    (lambda r, h: r.set_global(clamps={"layers.0.mlp_in": [clamp(0)]}), SiteNotFound, "does not steer layers.0.mlp_in"),
    (
        lambda r, h: r.register(Steering(monitors={SITE: Monitor([1.0] * 5)})),
        VectorError,
        "probe of layers.0.post_block has 5 numbers but the site is 4 wide; give",
    ),
    (
        lambda r, h: r.register(Steering(clamps={SITE: [clamp(0)], SITES[1]: [Clamp([1.0], 0)]})),
        VectorError,
        "1 numbers",
    ),
    (
        lambda r, h: r.register(Steering(clamps={("post_block", 7): [clamp(0)]})),
        SiteNotFound,
        "; 2 sites can be steered",
    ),
    (
        lambda r, h: r.set_tier({SITE: axis(0), SITES[1]: [1.0]}),
        VectorError,
        "tier vector of layers.1.post_block has 1",
    ),
    (lambda r, h: r.set_tier({SITE: [math.nan] * 4}), VectorError, "NaN"),
    (lambda r, h: r.set_tier({SITE: axis(0)}, math.inf), VectorError, "gain of the dynamic tier inf is not finite"),
    (lambda r, h: r.set_tier({("post_block", 9): axis(0)}), SiteNotFound, "no compiled graph has layers.9.post_block"),
    (lambda r, h: r.set_monitor(SITE, [1.0]), VectorError, "probe of layers.0.post_block has 1 numbers"),
    (lambda r, h: r.set_monitor(SITE, axis(0), math.nan), VectorError, "threshold of a monitor nan"),
    (lambda r, h: r.set_monitor(SITE, axis(0), 0, -1), VectorError, "sharpness of a monitor is -1, below 0"),
    (lambda r, h: r.set_monitor(SITE, axis(0), 0, math.inf), VectorError, "sharpness of a monitor inf"),
    (lambda r, h: r.set_monitor(("post_block", 9)), SiteNotFound, "no compiled graph has layers.9.post_block"),
    (lambda r, h: r.set_monitor("post_block", axis(0)), SpecError, "'post_block' names no site; write it as"),
    (lambda r, h: r.set_monitor(("post_block", "x"), axis(0)), SpecError, "'x'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_a_refused_change_changes_nothing(
    call: Callable[[Runtime, Handle], object], kind: type[SteerError], text: str
) -> None:
    runtime = make()
    runtime.set_global(clamps={SITE: [clamp(0)]})
    runtime.set_tier({SITE: axis(2)}, 2.0)
    runtime.set_monitor(SITE, axis(1), 1.0, 2.0, gate_rows=True)
    handle = runtime.register(Steering(clamps={SITE: [clamp(1)]}))
    before = state(runtime)
    with pytest.raises(kind) as error:
        call(runtime, handle)
    assert text in str(error.value).splitlines()[0]
    assert state(runtime) == before
    assert tokens(runtime, 1, 1)[0] == [0]
    assert tokens(runtime, 1, 1)[0] == [2]
    runtime.release(handle)


USES: dict[str, Callable[[Runtime], object]] = {
    "patch": lambda r: r.patches.begin([Patch(SITE, 0, axis(0))], None),
    "add": lambda r: r.set_global({SITE: axis(0)}),
    "tier": lambda r: r.set_tier({SITE: axis(0)}),
    "monitor": lambda r: r.set_monitor(SITE, axis(0)),
    "row_monitor": lambda r: r.register(Steering(monitors={SITE: Monitor(axis(0))})),
    "clamp": lambda r: r.register(Steering(clamps={SITE: [clamp(0)]})),
    "sae": lambda r: r.saes.attach("tiny", tiny(), features=[1]),
    "sae_full": lambda r: r.saes.attach("tiny", tiny(), whole=True),
}
ALONE = [op for op in OP_FAMILIES if op not in NEEDS]


@pytest.mark.parametrize("bound", [False, True], ids=["before compiling", "after compiling"])
@pytest.mark.parametrize("family", ALONE)
def test_each_family_is_asked_for_in_the_spec(family: str, bound: bool) -> None:
    alone = make((family,), bound)
    USES[family](alone)
    assert len(alone.tables.banks) == (len(SHAPES[family]) if bound else 0)
    assert alone.tables.steered() == (list(SITES) if bound else [])
    rest = tuple(op for op in ALONE if op != family)
    runtime = make(rest, bound)
    with pytest.raises(SiteNotFound) as error:
        USES[family](runtime)
    first = str(error.value).splitlines()[0]
    for words in (
        f"layers.0.post_block no op family {family!r}",
        f"it has {', '.join(rest)}; add {family!r} to its ops",
    ):
        assert words in first
    assert runtime.status()["rows"] == 0


def test_a_graph_that_lacks_a_family_names_those_that_it_has() -> None:
    runtime = bind(make(bound=False), ("add", "tier"))
    with pytest.raises(
        SiteNotFound, match=r"layers\.0\.post_block was compiled without 'clamp'; it has add, tier; add"
    ):
        USES["clamp"](runtime)
    with pytest.raises(SiteNotFound, match=r"compiled without 'probe'; it has add, tier"):
        runtime.tables.view("probe", SITE)
    assert runtime.tables.families(SITE) == ("add", "tier")


def test_what_was_set_too_early_is_refused_on_binding() -> None:
    early: list[Callable[[Runtime], object]] = [
        lambda r: r.set_monitor(SITE, [1.0]),
        lambda r: r.set_tier({("post_block", 9): axis(0)}),
    ]
    for use in early:
        runtime = make(bound=False)
        use(runtime)
        with pytest.raises(SteerError, match=r"layers\.[09]\.post_block"):
            bind(runtime)


def test_the_parts_of_a_model_may_come_one_by_one() -> None:
    runtime = bind(make(bound=False), sites=SITES[:1])
    runtime.set_tier({SITES[1]: axis(1)})
    runtime.set_monitor(SITES[1], axis(2))
    runtime.register(Steering(clamps={SITES[1]: [clamp(3)]}, monitors={SITES[1]: Monitor(axis(0))}))
    with pytest.raises(SiteNotFound, match=r"no compiled graph has layers\.1\.post_block"):
        runtime.check_complete()
    bind(runtime, sites=SITES[1:])
    runtime.check_complete()
    assert runtime.tables.view("tier", SITES[1]).tolist() == [[0, 1, 0, 0]]
    assert runtime.tables.view("probe", SITES[1]).tolist() == [[0, 0, 1, 0]]
    assert clamps_of(runtime, 3, 1) == [(3, 0)]


def test_every_family_that_the_spec_names_by_layer_must_be_compiled() -> None:
    chosen = HookSelection("post_block", [0, 1], ("tier", "clamp"))
    runtime = bind(Runtime(SteerSpec(steer=chosen, rows=ROWS, max_tokens=TOKENS, clamps=CLAMPS)), ("tier", "clamp"))
    runtime.check_complete()
    runtime = bind(Runtime(SteerSpec(steer=chosen, rows=ROWS, max_tokens=TOKENS, clamps=CLAMPS)), ("tier",))
    with pytest.raises(SiteNotFound, match=r"layers\.0\.post_block was in none of the compiled graphs"):
        runtime.check_complete()
