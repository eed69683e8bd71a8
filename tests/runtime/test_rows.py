"""Row bookkeeping against models written the slow way: an allocator that counts, and one row per token."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from steer_compile.errors import NotSteered, TableFull
from steer_compile.runtime.rows import PhaseTracker, RowAllocator, RowKey, RowPlan, Step, token_rows
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.spec import RESERVED_ROWS

CAPACITY = 4
KEYS = st.tuples(st.sampled_from(["prefill", "decode"]), st.sampled_from("abcd"))


class Allocation(RuleBasedStateMachine):
    """Requests that come and go. The model of the allocator is the list of live requests."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = RowAllocator(CAPACITY)
        self.live: list[list[RowKey]] = []
        self.known: dict[RowKey, int] = {}

    @rule(keys=st.lists(KEYS, max_size=4))
    def acquire(self, keys: list[RowKey]) -> None:
        before = self.rows.live()
        held = {key for request in self.live for key in request}
        fits = len(held | set(keys)) <= CAPACITY
        if not fits:
            with pytest.raises(TableFull, match=f"{len(held)} of {CAPACITY} rows are in use"):
                self.rows.acquire(keys)
            assert self.rows.live() == before
            return
        given = self.rows.acquire(keys)
        assert set(given) == set(keys)
        assert {key for key, (_, new) in given.items() if new} == set(keys) - held
        self.live.append(keys)
        self.known = {key: row for key, row in self.known.items() if key in held}
        for key, (row, _) in given.items():
            assert self.known.setdefault(key, row) == row

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            self.rows.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @invariant()
    def every_live_key_has_a_row_of_its_own(self) -> None:
        held = {key for request in self.live for key in request}
        rows = self.rows.live()
        assert set(rows) == held
        assert self.rows.in_use == len(held) == len(set(rows.values()))
        assert all(RESERVED_ROWS <= row < RESERVED_ROWS + CAPACITY for row in rows.values())
        assert all(self.rows.row(key) == row for key, row in rows.items())


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


BOUND = st.one_of(st.none(), st.integers(-9, 9))


@st.composite
def token_selections(draw: st.DrawFn) -> TokenSelection | None:
    spans = tuple(draw(st.lists(st.tuples(BOUND, BOUND), max_size=2)))
    last, generated = draw(st.booleans()), draw(st.booleans())
    if not (spans or last or generated):
        return None
    return TokenSelection(spans, last, generated)


def expected_row(plan: RowPlan, phase: str, position: int, prompt: int) -> int:
    """Row of one token, said in words: the text of its prompt, what it generates, everything else is padding."""
    if position < 0 or (phase == "prefill" and position >= prompt):
        return 0
    tier = {"prefill": 1, "decode": 2}[phase]
    own = plan.rows[["prefill", "decode"].index(phase)]
    if own == 0:
        return tier
    if plan.tokens is None:
        return own
    if position >= prompt:
        return own if plan.tokens.generated else tier
    words = list(range(prompt))
    chosen = {word for start, stop in plan.tokens.spans for word in words[start:stop]}
    chosen |= {words[-1]} if plan.tokens.last_prompt else set()
    return own if position in chosen else tier


@pytest.mark.behaviour(39)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_token_rows(data: st.DataObject) -> None:
    phase = data.draw(st.sampled_from(["prefill", "decode"]))
    batch, padded = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    prompts = tuple(data.draw(st.lists(st.integers(0, padded), min_size=batch, max_size=batch)))
    pads = tuple(padded - p for p in prompts) if data.draw(st.booleans()) else (0,) * batch
    start = data.draw(st.integers(0, padded)) if phase == "prefill" else data.draw(st.integers(padded, padded + 5))
    length = data.draw(st.integers(0, padded - start if phase == "prefill" else 4))
    row = st.integers(RESERVED_ROWS, 9) | st.just(0)
    plans = [RowPlan((data.draw(row), data.draw(row)), data.draw(token_selections())) for _ in range(batch)]
    rows = token_rows(Step(batch, length, phase, start, prompts, pads), plans)
    assert rows.shape == (batch, length)
    for b in range(batch):
        positions = [start - pads[b] + t for t in range(length)]
        assert rows[b].tolist() == [expected_row(plans[b], phase, p, prompts[b]) for p in positions]


def steps(tracker: PhaseTracker, *shapes: tuple[int, int]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(s.phase, s.start, s.pads) for s in (tracker.advance(*shape) for shape in shapes)]


def test_phases_from_the_shapes_of_the_calls() -> None:
    tracker = PhaseTracker()
    assert steps(tracker, (2, 5), (2, 1), (2, 1)) == [
        ("prefill", 0, (0, 0)),
        ("decode", 5, (0, 0)),
        ("decode", 6, (0, 0)),
    ]
    assert steps(tracker, (2, 3), (2, 1)) == [("prefill", 0, (0, 0)), ("decode", 3, (0, 0))]
    assert steps(tracker, (3, 1), (3, 1)) == [("prefill", 0, (0, 0, 0)), ("decode", 1, (0, 0, 0))]
    tracker.restart()
    assert steps(tracker, (3, 1)) == [("prefill", 0, (0, 0, 0))]


def test_a_prompt_in_parts_needs_the_phase_told() -> None:
    tracker = PhaseTracker(told="prefill", prompts=(7, 5))
    assert steps(tracker, (2, 4), (2, 3)) == [("prefill", 0, (0, 2)), ("prefill", 4, (0, 2))]
    tracker.told = "decode"
    assert steps(tracker, (2, 1), (2, 2), (2, 1)) == [
        ("decode", 7, (0, 2)),
        ("decode", 8, (0, 2)),
        ("decode", 10, (0, 2)),
    ]


@pytest.mark.parametrize("prompts", [None, (4, 6)])
def test_decode_that_is_told_from_the_start_generates(prompts: tuple[int, ...] | None) -> None:
    step = PhaseTracker(told="decode", prompts=prompts).advance(2, 1)
    plan = RowPlan((3, 4), TokenSelection(generated=True))
    assert token_rows(step, [plan, plan]).tolist() == [[4], [4]]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_in_a_prompt_and_behind_it(padding: str) -> None:
    tracker = PhaseTracker(prompts=(2, 4), padding=padding)
    plan = RowPlan((3, 4))
    prompt = {"left": [0, 0, 3, 3], "right": [3, 3, 0, 0]}[padding]
    assert token_rows(tracker.advance(2, 4), [plan, plan]).tolist() == [prompt, [3] * 4]
    assert token_rows(tracker.advance(2, 1), [plan, RowPlan()]).tolist() == [[4], [2]]


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({"prompts": (4, 6)}, (3, 6), "2 prompt lengths are given but the call has 3 sequences"),
        ({"prompts": (4, 9)}, (2, 6), "a prompt of 9 tokens is given but the call has 6"),
    ],
)
def test_prompt_lengths_that_do_not_fit_are_refused(options: dict[str, Any], shape: tuple[int, int], text: str) -> None:
    tracker = PhaseTracker(**options)
    before = repr(tracker)
    with pytest.raises(NotSteered, match=text):
        tracker.advance(*shape)
    assert repr(tracker) == before
