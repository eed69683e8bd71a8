"""`Registry` and `Runtime` without a model: what lies in the rows of the tables, and that a refusal changes nothing."""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Handle, Runtime, Steering, SteerSpec, TokenSelection
from steer_compile.errors import (
    NotSteered,
    SiteNotFound,
    SpecError,
    SteerError,
    TableFull,
    TooManyTokens,
    UnknownName,
    VectorError,
)
from steer_compile.ir import Plan, Site, SiteTable
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.runtime.vectors import PHASES

WIDTH, LAYERS = 4, 3


def table(dtype: torch.dtype = torch.float32, partial: bool = False) -> SiteTable:
    sites = [Site(n, "post_block", f"v{n}", WIDTH, dtype, (2, 8), "batch_first") for n in range(LAYERS)]
    return SiteTable(tuple(sites), layers=tuple(range(LAYERS)), partial=partial)


def bind(runtime: Runtime, spec: SteerSpec, dtype: torch.dtype = torch.float32) -> Plan:
    plan = plan_edits(spec, table(dtype), runtime.tables.banks)
    runtime.bind(plan, table(dtype), torch.device("cpu"))
    return plan


def make(bound: bool = True, rows: int = 4, **options: Any) -> Runtime:
    spec = SteerSpec(steer="post_block", rows=rows, max_tokens=16, **options)
    runtime = Runtime(spec)
    if bound:
        bind(runtime, spec)
    return runtime


def unit(layer: int, place: int, size: float = 1.0) -> dict[str, dict[int, Tensor]]:
    return {"post_block": {layer: size * torch.eye(WIDTH)[place]}}


def row(runtime: Runtime, index: int) -> Tensor:
    """What a token of this row gets at each layer."""
    return runtime.tables.tensors[0][:, index] * runtime.tables.scale[index]


def state(runtime: Runtime) -> tuple[Any, ...]:
    live = runtime._rows.live()
    rows = {key: (index, row(runtime, index).tolist()) for key, index in live.items()}
    return runtime.status(), runtime.names, rows, [row(runtime, index).tolist() for index in (0, 1, 2)]


@pytest.mark.behaviour(40, 41)
@pytest.mark.parametrize("late", [False, True], ids=["set after compiling", "set before compiling"])
def test_a_row_is_the_sum_of_the_global_and_the_request_tiers(late: bool) -> None:
    runtime = make(bound=not late)
    runtime.register_vectors("set", unit(2, 3, 5.0))
    handle = runtime.register(Steering(unit(0, 0), unit(0, 1), unit(0, 2), named=[("set", 2.0)], scale=10.0))
    runtime.set_scale(handle, 0.5)
    runtime.set_global(unit(0, 3, 0.25), prefill=unit(1, 0, 3.0), decode=unit(1, 1, 4.0))
    if late:
        bind(runtime, runtime._spec)
    base, request = torch.tensor([0, 0, 0, 0.25]), torch.tensor([[10.0, 10, 0, 0], [10.0, 0, 10, 0]])
    for phase, tier, number, place in zip(PHASES, (1, 2), (3.0, 4.0), (0, 1), strict=True):
        everyone = torch.stack([base, number * torch.eye(WIDTH)[place], torch.zeros(WIDTH)])
        own = everyone + torch.stack([request[place], torch.zeros(WIDTH), 100.0 * torch.eye(WIDTH)[3]])
        torch.testing.assert_close(row(runtime, tier), everyone)
        torch.testing.assert_close(row(runtime, handle.rows[phase]), 0.5 * own)
    assert not row(runtime, 0).any()
    runtime.clear_global()
    assert not any(row(runtime, tier).any() for tier in (1, 2))
    assert row(runtime, handle.rows["prefill"])[0].tolist() == [5, 5, 0, 0]


@pytest.mark.behaviour(36, 37, 47, 48)
def test_equal_content_shares_rows() -> None:
    runtime = make()
    runtime.register_vectors("set", unit(0, 0))
    same = [Steering(unit(0, 0)), Steering(named="set"), Steering(unit(0, 0), tokens=TokenSelection(last_prompt=True))]
    handles = [runtime.register(config) for config in same]
    assert len({tuple(h.rows.values()) for h in handles}) == 1
    assert runtime.status()["rows"] == 2
    other = runtime.register(Steering(prefill=unit(0, 0), scale=2.0))
    assert other.rows["decode"] == 0
    assert runtime.status()["rows"] == 3
    for handle in handles:
        assert runtime.status()["rows"] == 3
        runtime.release(handle)
    assert runtime.status()["rows"] == 1
    assert runtime.status()["handles"] == 1


@pytest.mark.behaviour(37, 45, 46)
def test_a_released_row_begins_anew() -> None:
    runtime = make(rows=1)
    first = runtime.register(Steering(prefill=unit(0, 0)))
    runtime.set_scale(first, 9.0)
    runtime.release(first)
    again = runtime.register(Steering(prefill=unit(1, 1)))
    assert again.rows == first.rows
    assert row(runtime, again.rows["prefill"])[1].tolist() == [0, 1, 0, 0]


@pytest.mark.behaviour(47, 48)
def test_named_sets() -> None:
    runtime = make()
    digest = runtime.register_vectors("a", unit(0, 0))
    assert runtime.register_vectors("a", unit(0, 0)) == digest == runtime.names["a"]
    with pytest.raises(VectorError, match="'a' exists with other content; pass replace=True"):
        runtime.register_vectors("a", unit(0, 1))
    handle = runtime.register(Steering(named="a"))
    with pytest.raises(VectorError, match="'a' is used by 1 live handles; release them first"):
        runtime.register_vectors("a", unit(0, 1), replace=True)
    assert runtime.names["a"] == digest
    runtime.release(handle)
    assert runtime.register_vectors("a", unit(0, 1), replace=True) != digest
    assert row(runtime, runtime.register(Steering(named="a")).rows["decode"])[0].tolist() == [0, 1, 0, 0]


def fill(runtime: Runtime) -> Handle:
    handle = runtime.register(Steering(unit(0, 0)))
    runtime.set_global(unit(1, 1))
    runtime.register_vectors("a", unit(2, 2))
    return handle


OVERFLOW = {"post_block": {0: [3e38] * WIDTH}}
REFUSED: list[tuple[Callable[[Runtime, Handle], object], type[SteerError], str]] = [
    (lambda r, h: r.register(Steering(unit(0, 1), unit(0, 2), unit(0, 3))), TableFull, "2 of 3 rows are in use and 2"),
    (lambda r, h: r.register(Steering(unit(0, 0), named="b")), UnknownName, "'b'; registered are: a"),
    (
        lambda r, h: r.register(Steering({"post_block": {0: [1.0]}})),
        VectorError,
        "has 1 numbers but the site is 4 wide",
    ),
    (lambda r, h: r.register(Steering(unit(7, 0))), SiteNotFound, "layers.7.post_block; 3 sites can be steered"),
    (lambda r, h: r.register(Steering({"mlp_out": {0: [1.0] * 4}})), SiteNotFound, "it steers post_block at all; add"),
    (lambda r, h: r.register(Steering(prefill=OVERFLOW, scale=10.0)), VectorError, "overflows the table's dtype"),
    (lambda r, h: r.register_vectors("c", unit(3, 0)), SiteNotFound, "layers.3.post_block"),
    (lambda r, h: r.register_vectors("c", {"post_block": {0: [math.nan] * 4}}), VectorError, "NaN"),
    (lambda r, h: r.set_global(unit(0, 0), prefill=unit(5, 0)), SiteNotFound, "layers.5.post_block"),
    (lambda r, h: r.set_global(OVERFLOW, prefill=OVERFLOW), VectorError, "overflows"),
    (lambda r, h: r.set_scale(h, math.nan), VectorError, "scale nan is not finite"),
    (lambda r, h: r.set_scale(make().register(Steering()), 1.0), UnknownName, "is not live here"),
    (lambda r, h: r.release(make().register(Steering())), UnknownName, "is not live here"),
    (lambda r, h: r.assign([h, make().register(Steering())]), UnknownName, "is not live here"),
    (lambda r, h: r.steer(rows=[Steering(unit(0, 1)), Steering(unit(0, 2))]).__enter__(), TableFull, "rows"),
    (lambda r, h: r.steer(rows=[h], scale=2.0).__enter__(), SpecError, "give one of them"),
    (lambda r, h: r.steer(rows=[{"post_block": {}}]).__enter__(), SpecError, "give a Steering"),  # type: ignore[list-item]
    (lambda r, h: r.steer(phase="both").__enter__(), SpecError, "phase='both' is unknown; choose prefill, decode"),
    (lambda r, h: r.steer(padding="up").__enter__(), SpecError, "padding='up' is unknown; choose left or right"),
    (lambda r, h: r.steer(prompt_lengths=[-1]).__enter__(), SpecError, "holds a negative number"),
    (lambda r, h: r.before_call(0, 2, 9), TooManyTokens, "2 x 9 = 18 tokens but the spec has max_tokens=16; raise it"),
    (lambda r, h: r.capture().__enter__(), SpecError, "captures nothing; give SteerSpec"),
]


@pytest.mark.behaviour(38, 41, 48)
@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_a_refused_change_changes_nothing(
    call: Callable[[Runtime, Handle], object], kind: type[SteerError], text: str
) -> None:
    runtime = make(rows=3)
    handle = fill(runtime)
    before = state(runtime)
    with pytest.raises(kind) as error:
        call(runtime, handle)
    assert text in str(error.value).splitlines()[0]
    assert state(runtime) == before
    assert [runtime._batches[-1].holds(h) for h in (handle,)] == [False]
    runtime.release(handle)


@pytest.mark.behaviour(38)
def test_a_refused_registration_leaves_the_rows_that_it_would_have_shared() -> None:
    runtime = make(rows=3)
    first = runtime.register(Steering(prefill=unit(0, 0)))
    runtime.set_global(decode=OVERFLOW)
    with pytest.raises(VectorError, match="overflows"):
        runtime.register(Steering(prefill=unit(0, 0), decode=OVERFLOW))
    assert runtime.status()["rows"] == 1
    assert row(runtime, first.rows["prefill"])[0].tolist() == [1, 0, 0, 0]


def test_a_sum_that_overflows_is_refused_in_the_dtype_of_the_table() -> None:
    runtime = make(dtype="float16")
    with pytest.raises(VectorError, match=r"overflows the table's dtype torch\.float16; scale them down or set dtype"):
        runtime.set_global(unit(0, 0, 1e5))
    runtime.set_global(unit(0, 0, 1e3))


@pytest.mark.behaviour(37)
def test_release_and_assign() -> None:
    runtime = make()
    handle = runtime.register(Steering(unit(0, 0)))
    forms: list[list[Handle | None] | Handle] = [[None, handle], handle]
    for form in forms:
        runtime.assign(form)
        with pytest.raises(NotSteered, match="is assigned to the next calls; assign other rows first"):
            runtime.release(handle)
        with runtime.steer():
            with pytest.raises(NotSteered, match="is assigned to the next calls"):
                runtime.release(handle)  # the block around it goes on with this handle
            runtime.before_call(0, 2, 4)
    runtime.assign(None)
    runtime.release(handle)
    for call in (runtime.release, runtime.assign):
        with pytest.raises(UnknownName, match="register its configuration again"):
            call(handle)


def test_a_steer_block_gives_its_rows_back() -> None:
    runtime = make()
    outer = runtime.register(Steering(unit(0, 0)))
    runtime.assign(outer)
    before = state(runtime)
    block = runtime.steer(unit(0, 1))
    handles = block.__enter__()
    assert handles[0] is not None
    assert runtime.status()["rows"] == 4
    with pytest.raises(NotSteered, match="no compiled graph ran inside the block"):
        block.__exit__(None, None, None)
    assert state(runtime) == before
    with pytest.raises(ZeroDivisionError), runtime.steer(rows=[Steering(unit(0, 2)), outer, None]):
        raise ZeroDivisionError
    assert state(runtime) == before
    assert runtime._batches[-1].holds(outer)


def rows_of(runtime: Runtime, batch: int, length: int) -> Any:
    runtime.before_call(0, batch, length)
    return runtime.tables.rows[: batch * length].view(batch, length).tolist()


@pytest.mark.behaviour(39)
def test_the_index_follows_every_change() -> None:
    runtime = make(rows=8)
    a, b = (
        runtime.register(Steering(unit(0, 0))),
        runtime.register(Steering(unit(0, 1), tokens=TokenSelection(((0, 1),)))),
    )
    p, d = a.rows["prefill"], a.rows["decode"]
    assert rows_of(runtime, 2, 3) == [[1, 1, 1]] * 2
    runtime.assign([a, b])
    assert rows_of(runtime, 2, 3) == [[p] * 3, [b.rows["prefill"], 1, 1]]
    assert rows_of(runtime, 2, 1) == [[d], [2]]
    with runtime.steer(rows=[None, a], prompt_lengths=[1, 2]):
        assert rows_of(runtime, 2, 2) == [[0, 1], [p, p]]
        assert rows_of(runtime, 2, 1) == [[2], [d]]
        assert rows_of(runtime, 2, 1) == [[2], [d]]
    with runtime.steer(rows=[a, a], prompt_lengths=[3, 6], padding="right", phase="prefill"):
        assert rows_of(runtime, 2, 3) == [[p] * 3, [p] * 3]
        assert rows_of(runtime, 2, 3) == [[0] * 3, [p] * 3]
    with pytest.raises(NotSteered, match="2 rows are assigned but the call has 3 sequences"):
        rows_of(runtime, 3, 2)
    runtime.assign(b)
    assert rows_of(runtime, 1, 2) == [[b.rows["prefill"], 1]]


def test_a_call_without_tokens_is_no_step() -> None:
    runtime = make()
    handle = runtime.register(Steering(unit(0, 0)))
    runtime.assign(handle)
    assert rows_of(runtime, 1, 2) == [[handle.rows["prefill"]] * 2]
    assert rows_of(runtime, 0, 5) == []
    assert rows_of(runtime, 1, 0) == [[]]
    assert rows_of(runtime, 1, 1) == [[handle.rows["decode"]]]


@pytest.mark.behaviour(43)
def test_threads_register_and_release_while_calls_go_on() -> None:
    runtime = make(rows=6)
    stop = threading.Event()

    def churn(seed: int) -> int:
        done = 0
        for i in range(60):
            try:
                handle = runtime.register(Steering(unit(seed % LAYERS, i % WIDTH, 1.0 + seed)))
            except TableFull:
                continue
            for phase in PHASES:
                mine = row(runtime, handle.rows[phase])
                assert mine[seed % LAYERS, i % WIDTH] == 1.0 + seed
                assert mine.count_nonzero() == 1
            runtime.register_vectors(f"{seed}.{i}", unit(0, 0))
            runtime.release(handle)
            done += 1
        return done

    def call() -> None:
        while not stop.is_set():
            runtime.before_call(0, 2, 4)
            runtime.after_call(())
            assert runtime.status()["rows"] <= 6

    with ThreadPoolExecutor(5) as pool:
        caller = pool.submit(call)
        done = [future.result() for future in [pool.submit(churn, seed) for seed in range(4)]]
        stop.set()
        caller.result()
    assert sum(done) > 0
    status = runtime.status()
    assert (status["rows"], status["handles"]) == (0, 0)


@pytest.mark.behaviour(36)
def test_status_is_plain_data() -> None:
    runtime = make(bound=False)
    assert runtime.status()["sites"] == []
    assert runtime.status()["bytes"] == 0
    bind(runtime, runtime._spec)
    handle = fill(runtime)
    assert json.loads(json.dumps(runtime.status())) == {
        "rows": 2,
        "rows_capacity": 4,
        "handles": 1,
        "named": {"a": runtime.names["a"]},
        "calls": 0,
        "sites": [f"layers.{n}.post_block" for n in range(LAYERS)],
        "bytes": 4 * (LAYERS * (4 + 3) * WIDTH + 3 * 16 + (4 + 3)),
    }
    assert handle.rows == {"prefill": 3, "decode": 4}
