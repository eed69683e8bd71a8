"""Patches without a model: what lies in the slots, what each token reads, and that a refusal changes nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_compile import Captured, Patch, Runtime, SteerSpec
from steer_compile.capture.rows import Rows
from steer_compile.errors import (
    CaptureError,
    NotSteered,
    SiteNotFound,
    SpecError,
    SteerError,
    TableFull,
    UnknownName,
    VectorError,
)  # fmt: skip
from steer_compile.ir import Bank, Plan, SiteTable
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.rows import Step

WIDTH, PATCHES, TOKENS = 4, 3, 24
SITES = (("post_block", 0), ("post_block", 1))
SITE = SITES[0]
ONE, TWO = torch.arange(1.0, 5.0), torch.arange(5.0, 9.0)


def bind(runtime: Runtime, sites: Any = SITES, dtype: torch.dtype = torch.float32) -> Runtime:
    kinds = (
        ("patch", WIDTH, dtype, PATCHES + 1),
        ("patch_alpha", WIDTH, torch.float32, PATCHES + 1),
        ("patch_slot", 1, torch.int32, TOKENS),
    )
    new = tuple(Bank(kind, width, of, tuple(sites), length) for kind, width, of, length in kinds)
    table = SiteTable(partial=tuple(sites) != SITES)
    runtime.bind(Plan((), (*runtime.tables.banks, *new), TOKENS), table, torch.device("cpu"))
    return runtime


def make(bound: bool = True, dtype: torch.dtype = torch.float32) -> Runtime:
    runtime = Runtime(SteerSpec(steer="post_block", ops=("patch",), patches=PATCHES, max_tokens=TOKENS))
    return bind(runtime, dtype=dtype) if bound else runtime


def log_of(batch: int = 2, length: int = 3, pads: Sequence[int] = ()) -> CaptureLog:
    log, pads = CaptureLog(), tuple(pads) or (0,) * batch
    values = torch.arange(float(batch * length * WIDTH)).view(batch * length, WIDTH)
    call = Step(batch, length, "prefill", 0, tuple(length - p for p in pads), pads, length)
    log.take(dict.fromkeys(SITES, values), (batch, length), False, call)
    return log


def slots(runtime: Runtime, batch: int, length: int, site: Any = SITE) -> list[list[int]]:
    """Slot of each token behind the preparation of a call."""
    runtime.before_call(0, batch, length)
    found: list[list[int]] = runtime.tables.view("patch_slot", site)[: batch * length, 0].view(batch, length).tolist()
    return found


def state(runtime: Runtime) -> list[Any]:
    return [tensor.tolist() for tensor in runtime.tables.tensors]


@contextmanager
def unfinished(runtime: Runtime, *args: Any, **kwargs: Any) -> Iterator[None]:
    """A block that is left by an error, so that what its calls reached does not count."""
    with suppress(KeyError), runtime.patch(*args, **kwargs):
        yield
        raise KeyError


@pytest.mark.behaviour(28)
@pytest.mark.parametrize("late", [False, True], ids=["after compiling", "before compiling"])
def test_rows_shares_and_slots(late: bool) -> None:
    runtime = make(bound=not late)
    rows = [
        [Patch(SITE, 1, ONE), Patch(SITES[1], (0, 2), "zeros", alpha=0.5)],
        [],
        [Patch("layers.0.post_block", 2, TWO, alpha=0.25, dims=(0, 3))],
    ]
    with runtime.patch(rows=rows):
        if late:
            bind(runtime)
        assert slots(runtime, 3, 3) == [[0, 1, 0], [0, 0, 0], [0, 0, 2]]
        assert slots(runtime, 3, 3, SITES[1]) == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
        assert runtime.tables.view("patch", SITE)[:3].tolist() == [[0] * 4, ONE.tolist(), TWO.tolist()]
        assert runtime.tables.view("patch_alpha", SITE)[:3].tolist() == [[0] * 4, [1] * 4, [0.25, 0, 0, 0.25]]
        assert runtime.tables.view("patch_alpha", SITES[1])[1].tolist() == [0.5] * 4
    assert slots(runtime, 3, 3) == [[0] * 3] * 3
    assert not runtime.tables.view("patch_slot", SITES[1]).any()


def test_positions_count_without_padding_and_go_on_in_decoding() -> None:
    runtime = make()
    every = [Patch(SITE, range(6), ONE)]
    with runtime.patch(every, prompt_lengths=[2, 4], padding="left"):
        assert slots(runtime, 2, 4) == [[0, 0, 1, 1], [1, 1, 1, 1]]
        assert [slots(runtime, 2, 1) for _ in range(5)] == [[[1], [1]], [[1], [1]], [[1], [0]], [[1], [0]], [[0], [0]]]
    with runtime.patch(every, prompt_lengths=[2, 4], padding="right"):
        assert slots(runtime, 2, 4) == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert [slots(runtime, 2, 1) for _ in range(4)] == [[[1], [1]], [[1], [1]], [[1], [0]], [[1], [0]]]
    rows = [[Patch(SITE, 0, ONE)], [Patch(SITE, 4, ONE)]]
    with runtime.steer(prompt_lengths=[2, 4]), runtime.patch(rows=rows):
        assert slots(runtime, 2, 4) == [[0, 0, 1, 0], [0, 0, 0, 0]]
        assert slots(runtime, 2, 1) == [[0], [2]]
    with runtime.patch([Patch(SITE, 4, ONE)], phase="prefill"):
        assert [slots(runtime, 1, 3), slots(runtime, 1, 3)] == [[[0, 0, 0]], [[0, 1, 0]]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_token_reads_its_own_patch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    left, longest = data.draw(st.booleans()), max(lengths)
    choice = st.integers(0, PATCHES)
    wanted = [[data.draw(choice) for _ in range(n + 1)] for n in lengths]
    sources = [torch.full((WIDTH,), float(i)) for i in range(PATCHES + 1)]
    rows = [
        [Patch(SITE, [p for p, w in enumerate(own) if w == i], sources[i]) for i in range(1, PATCHES + 1) if i in own]
        for own in wanted
    ]
    distinct = sum(map(len, rows))
    runtime = Runtime(SteerSpec(steer="post_block", ops=("patch",), patches=max(distinct, 1), max_tokens=TOKENS))
    kinds = (("patch", WIDTH, distinct + 1), ("patch_alpha", WIDTH, distinct + 1))
    banks = [Bank(kind, width, torch.float32, SITES, length) for kind, width, length in kinds]
    banks.append(Bank("patch_slot", 1, torch.int32, SITES, TOKENS))
    runtime.bind(Plan((), tuple(banks), TOKENS), SiteTable(), torch.device("cpu"))

    def read(batch: int, length: int) -> list[list[float]]:
        lines = torch.tensor(slots(runtime, batch, length))
        found: list[list[float]] = runtime.tables.view("patch", SITE)[lines][..., 0].tolist()
        return found

    with runtime.patch(rows=rows, prompt_lengths=lengths, padding="left" if left else "right"):
        pads = [[0] * (longest - n) for n in lengths]
        prompts = [pad + own[:-1] if left else own[:-1] + pad for pad, own in zip(pads, wanted, strict=True)]
        assert read(len(lengths), longest) == prompts
        assert read(len(lengths), 1) == [own[-1:] for own in wanted]


def test_equal_rows_share_a_slot() -> None:
    runtime, log = make(), log_of()
    everything = Patch(SITE, range(3), "zeros")
    with runtime.patch(rows=[[everything], [Patch(SITE, 0, "zeros"), Patch(SITE, (1, 2), log)]]):
        assert slots(runtime, 2, 3) == [[1, 1, 1], [1, 2, 3]]
    with runtime.patch(rows=[[Patch(SITE, 1, log)], [Patch(SITE, 1, Captured(log))]]):
        assert slots(runtime, 2, 3) == [[0, 1, 0], [0, 1, 0]]


def test_captured_rows_are_sources() -> None:
    runtime, log = make(), log_of(pads=(1, 0))
    values = log.steps[0][SITE]
    rows = Rows(
        ("a", "b"), torch.tensor([0, 1, 1]), torch.tensor([4, 4, 4]), torch.full((3,), -1), torch.tensor([0, 0, 1]),
        {"layers.0.post_block": torch.stack([ONE, ONE + 1, TWO])},
    )  # fmt: skip
    given = [Patch(SITE, 0, log), Patch(SITE, 1, Captured(log, 1, 2, SITES[1])), Patch(SITE, 4, Captured(rows, "b"))]
    with unfinished(runtime, given):
        found = runtime.tables.view("patch", SITE)[1:]
        assert torch.equal(found, torch.stack([values[0, 1], values[1, 2], TWO]))
    assert torch.equal(rows.row(SITE, 0, 4), ONE)


def test_the_last_call_that_computed_a_position_counts() -> None:
    log = log_of()
    later = Step(2, 1, "decode", 3, (3, 3), (0, 0), 3)
    log.take(dict.fromkeys(SITES, torch.full((2, WIDTH), 7.0)), (2, 1), False, later)
    assert log.row(SITE, 1, 3).tolist() == [7.0] * WIDTH
    again = Step(2, 3, "prefill", 0, (3, 3), (0, 0), 3)
    log.take(dict.fromkeys(SITES, torch.full((6, WIDTH), 9.0)), (2, 3), False, again)
    assert log.row(SITE, 0, 2).tolist() == [9.0] * WIDTH
    assert log.row(("resid_post", 0), "1", 3).tolist() == [7.0] * WIDTH


REFUSED: list[tuple[Callable[[Runtime], object], type[SteerError], str]] = [
    (lambda r: enter(r, [Patch(SITE, 0, ONE[:3])]), VectorError, "has 3 numbers but the site is 4 wide; give"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE * math.nan)]), VectorError, "holds NaN or infinity; fix the vector"),
    (lambda r: enter(r, [Patch(SITE, 0, [math.inf] * 4)]), VectorError, "holds NaN or infinity"),
    (lambda r: enter(r, [Patch(SITE, 0, [1, 2, 3, 4])]), VectorError, "dtype torch.int64"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE.view(1, 4))]), VectorError, "shape (1, 4); give floating-point numbers"),
    (lambda r: enter(r, [Patch(SITE, 0, "mean")]), VectorError, "'mean'; give a vector, 'zeros', or captured rows"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE, alpha=math.nan)]), VectorError, "alpha nan is not finite"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE, dims=[1, 4])]), VectorError, "dimension 4 but the site is 4 wide"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE, dims=[])]), SpecError, "at least one"),
    (lambda r: enter(r, [Patch(SITE, -1, ONE)]), SpecError, "position=-1 of a patch: give whole numbers from 0 on"),
    (lambda r: enter(r, [Patch(SITE, [1, 1], ONE)]), SpecError, "each once"),
    (lambda r: enter(r, [Patch("post_block", 0, ONE)]), SpecError, "'post_block' names no site"),
    (lambda r: enter(r, [Patch(("mlp_out", 0), 0, ONE)]), SiteNotFound, "does not steer layers.0.mlp_out"),
    (lambda r: enter(r, [Patch(("post_block", 7), 0, ONE)]), SiteNotFound, "no compiled graph has layers.7"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE), Patch(SITE, 0, TWO)]), SpecError, "position 0 is given twice"),
    (lambda r: enter(r, [ONE]), SpecError, "is no patch; give Patch(site, position, source)"),
    (lambda r: enter(r, [Patch(SITE, 0, ONE)], rows=[]), SpecError, "give one of them"),
    (
        lambda r: enter(r, rows=[[Patch(SITE, i, ONE + i)] for i in range(4)]),
        TableFull,
        "layers.0.post_block is patched with 4 distinct rows at once but the spec has patches=3; raise it",
    ),
    (lambda r: enter(r, [Patch(SITE, 0, CaptureLog())]), NotSteered, "was not captured"),
    (lambda r: enter(r, [Patch(("mlp_out", 0), 0, log_of())]), SiteNotFound, "layers.0.mlp_out is not captured"),
    (
        lambda r: enter(r, [Patch(SITE, 3, log_of())]),
        CaptureError,
        "position 3 of batch element 0 is not in the log of layers.0.post_block; it has positions 0 to 2; capture",
    ),
    (lambda r: enter(r, [Patch(SITE, 0, Captured(log_of(), 2))]), CaptureError, "no batch element 2; it has 2"),
    (lambda r: enter(r, [Patch(SITE, 0, Captured(log_of(), "a"))]), CaptureError, "no batch element 'a'"),
    (lambda r: enter(r, [Patch(SITE, 0, Captured(3))]), SpecError, "int holds no captured rows"),  # type: ignore[arg-type]
]


def enter(runtime: Runtime, *args: Any, **kwargs: Any) -> None:
    with runtime.patch(*args, **kwargs):
        pytest.fail("the block began")


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_a_refused_block_changes_nothing(call: Callable[[Runtime], object], kind: type[SteerError], text: str) -> None:
    runtime = make()
    before = state(runtime)
    with pytest.raises(kind) as error:
        call(runtime)
    assert text in str(error.value).splitlines()[0]
    assert state(runtime) == before
    assert slots(runtime, 1, 3) == [[0, 0, 0]]
    with runtime.patch([Patch(SITE, 1, ONE)]):
        assert slots(runtime, 1, 3) == [[0, 1, 0]]


def test_bad_sources_are_refused_before_compiling_and_bad_widths_when_compiling() -> None:
    log = log_of()
    log.steps[0][SITE][0, 1] = math.nan
    with pytest.raises(VectorError, match=r"layers\.0\.post_block at position 1 holds NaN"):
        enter(make(bound=False), [Patch(SITE, 1, log)])
    with pytest.raises(VectorError, match=r"layers\.0\.post_block at position 1 holds NaN"):
        enter(make(), [Patch(SITE, range(3), log)])
    with pytest.raises(VectorError, match="overflows the table's dtype"):
        enter(make(dtype=torch.float16), [Patch(SITE, 0, ONE * 1e6)])
    runtime = make(bound=False)
    with pytest.raises(VectorError, match="3 numbers but the site is 4 wide"), runtime.patch([Patch(SITE, 0, ONE[:3])]):
        bind(runtime)


def test_what_is_never_reached_is_an_error() -> None:
    runtime = make()
    with pytest.raises(NotSteered, match="nothing was patched: no compiled graph ran"), runtime.patch([]):
        pass
    text = r"layers\.0\.post_block at position 3 of sequence 1 was never applied: .* positions 0 to 2 of it; give"
    with pytest.raises(NotSteered, match=text), runtime.patch(rows=[[Patch(SITE, 0, ONE)], [Patch(SITE, 3, ONE)]]):
        runtime.before_call(0, 2, 3)
    with (
        pytest.raises(NotSteered, match="position 2 of sequence 0 was never applied: .* positions 0 to 1"),
        runtime.patch([Patch(SITE, 2, ONE)], prompt_lengths=[2, 3]),
    ):
        runtime.before_call(0, 2, 3)
    assert not runtime.tables.view("patch_slot", SITE).any()


def test_a_batch_of_another_size_is_refused() -> None:
    runtime = make()
    with (
        pytest.raises(NotSteered, match="2 rows of patches are given but the call has 3 sequences; give a list"),
        runtime.patch(rows=[[Patch(SITE, 0, ONE)], []]),
    ):
        runtime.before_call(0, 3, 2)


def test_blocks_do_not_nest_and_leave_no_trace() -> None:
    runtime = make()
    with unfinished(runtime, [Patch(SITE, 0, ONE)]):
        with pytest.raises(SpecError, match="inside of another one; give all patches to one block"):
            enter(runtime, [Patch(SITE, 1, TWO)])
        assert slots(runtime, 1, 2) == [[1, 0]]
    assert slots(runtime, 1, 2) == [[0, 0]]


def test_missing_rows_are_told() -> None:
    labels = torch.zeros(1, dtype=torch.long)
    rows = Rows(("a",), labels, labels + 2, labels, labels, {"layers.0.post_block": ONE[None]})
    for site, request, position, kind, text in (
        (SITES[1], 0, 2, SiteNotFound, r"layers\.1\.post_block is not captured; captured are layers\.0\.post_block"),
        (SITE, "b", 2, UnknownName, "is of request 'b'; there are a"),
        (SITE, 1, 2, UnknownName, "is of request 1; there are a"),
        (SITE, "a", 3, CaptureError, "request 'a' is at position 3; it has positions 2 to 2"),
    ):
        with pytest.raises(kind, match=text):
            rows.row(site, request, position)


def test_the_parts_of_a_model_may_come_one_by_one() -> None:
    runtime = bind(make(bound=False), SITES[:1])
    with (
        pytest.raises(SiteNotFound, match=r"no compiled graph has layers\.1"),
        runtime.patch([Patch(SITES[1], 0, ONE)]),
    ):
        runtime.before_call(0, 1, 2)
    with runtime.patch([Patch(SITES[1], 1, ONE)]):
        runtime.before_call(0, 1, 2)
        bind(runtime, SITES[1:])
        runtime.before_call(1, 1, 2)
        assert runtime.tables.view("patch_slot", SITES[1])[:2, 0].tolist() == [0, 1]


def test_a_source_is_copied() -> None:
    runtime, vector = make(), ONE.clone()
    patch = Patch(SITE, 0, vector)
    vector.zero_()
    with unfinished(runtime, [patch]):
        assert runtime.tables.view("patch", SITE)[1].tolist() == ONE.tolist()
