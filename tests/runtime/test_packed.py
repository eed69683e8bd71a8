"""The choice of rows of packed captures against its definition, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import TokenSelection
from steer_compile.errors import CaptureError, NotSteered, SpecError, TableFull
from steer_compile.runtime.demand import Choice, Demand, Sites, demand
from steer_compile.runtime.packed import choose
from steer_compile.runtime.rows import PhaseTracker, Step
from steer_compile.spec import CAPTURE_GROUPS

SITES = [("post_block", 0), ("post_block", 1), ("mlp_out", 1)]


@dataclass(frozen=True)
class Positions:
    """The tokens at some positions."""

    at: frozenset[int]

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        return np.array([p in self.at for p in range(first, first + length)], np.bool_)


@dataclass(frozen=True)
class Short:
    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        return np.ones(length + 1, np.bool_)


POSITIONS = st.frozensets(st.integers(-3, 9)).map(Positions)
SETS = st.one_of(st.none(), st.lists(st.sampled_from([*SITES, "post_block"]), unique=True))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    prompts = tuple(draw(st.integers(0, length)) for _ in range(batch))
    tracker = PhaseTracker(prompts=prompts, padding=draw(st.sampled_from(["left", "right"])))
    step = tracker.advance(batch, length)
    return tracker.advance(batch, 1) if draw(st.booleans()) else step


@st.composite
def demands(draw: st.DrawFn, batch: int) -> Demand:
    tokens: Any = draw(st.one_of(POSITIONS, st.none(), st.lists(POSITIONS, min_size=batch, max_size=batch)))
    sites: Any = draw(st.one_of(st.none(), st.lists(SETS, min_size=batch, max_size=batch)))
    return demand(tokens, sites)


@given(st.data())
def test_each_wanted_token_has_a_row_at_the_sites_that_are_wanted(data: st.DataObject) -> None:
    step = data.draw(steps())
    asked = data.draw(st.lists(demands(step.batch), min_size=1, max_size=3))
    chosen = choose(step, asked, 100)
    rows = iter(range(100))
    for b in range(step.batch):
        for t in range(step.length):
            position = step.start - step.pads[b] + t
            real = position >= 0 and (step.phase == "decode" or position < step.prompts[b])
            each = [one.of(step.batch)[b] for one in asked]
            wants = [
                real and bool(choice.mask(position, 1, step.prompts[b])[0]) and bool(sites) for choice, sites in each
            ]
            row, group = chosen.rows[b * step.length + t]
            assert [bool(mask[b * step.length + t]) for _, mask in chosen.readers] == wants
            assert row == (next(rows) if any(wants) else -1)
            for site in SITES:
                stored = row >= 0 and site in chosen.groups[group]
                assert stored == any(w and site in sites for w, (_, sites) in zip(wants, each, strict=True))
    assert chosen.used == next(rows)


def step(batch: int, length: int, **given: Any) -> Step:
    return PhaseTracker(**given).advance(batch, length)


def test_as_many_tokens_as_there_are_rows() -> None:
    assert choose(step(2, 3), [demand()], 6).used == 6
    words = r"the call has 6 chosen tokens of 2 x 3 but .* capture_rows=5; choose fewer, split the call, or raise it"
    with pytest.raises(TableFull, match=words):
        choose(step(2, 3), [demand()], 5)
    last = choose(step(2, 3), [demand([None, TokenSelection(last_prompt=True)])], 1)
    assert last.rows[:, 0].tolist() == [-1, -1, -1, -1, -1, 0]


def test_as_many_sets_of_sites_as_there_are_groups() -> None:
    each = [[("post_block", n)] for n in range(CAPTURE_GROUPS)]
    assert len(choose(step(CAPTURE_GROUPS, 1), [demand(sites=each)], 100).groups) == CAPTURE_GROUPS
    with pytest.raises(TableFull, match="65 sets of sites but packed captures have room for 64"):
        choose(step(CAPTURE_GROUPS + 1, 1), [demand(sites=[*each, ["mlp_out"]])], 100)


def test_what_is_generated_behind_padding_on_the_right_goes_on_with_the_prompt() -> None:
    for padding in ("left", "right"):
        tracker = PhaseTracker(prompts=(2, 4), padding=padding)
        tracker.advance(2, 4)
        at = [tracker.advance(2, 1) for _ in range(2)][-1]
        assert [at.start - pad for pad in at.pads] == [3, 5]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: demand(tokens=3), SpecError, "tokens holds 3, which chooses no tokens; give a TokenSelection"),
        (lambda: demand(tokens=[TokenSelection(generated=True), "all"]), SpecError, "tokens holds 'all'"),
        (lambda: demand(sites=[]), SpecError, r"sites=\[\] names no site; name hooks or sites"),
        (lambda: demand(sites=4), SpecError, "sites=4 is no list of sites; give for example"),
        (lambda: demand(sites=[4]), SpecError, "4 names no site; write"),
        (lambda: demand(sites="layers.-1.post_block"), SpecError, "counts from the last layer; give the layer's"),
        (lambda: demand(sites="nowhere"), SpecError, "unknown hook 'nowhere'"),
        (lambda: choose(step(2, 1), [demand([None])], 9), NotSteered, "tokens for 1 sequences but the call has 2"),
        (lambda: choose(step(1, 1), [demand(sites=[None] * 2)], 9), NotSteered, "sites for 2 sequences but .* has 1"),
        (lambda: choose(step(1, 2), [demand(Short())], 9), CaptureError, r"Short.mask gave \(3,\) for 2 tokens"),
    ],
)
def test_refusals(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, None),
        ("hook_resid_post", {("post_block", None)}),
        (("post_block", 3), {("post_block", 3)}),
        (["layers.3.post_block", ("resid_post", 4)], {("post_block", 3), ("post_block", 4)}),
        ({"mlp_out", ("post_block", 1)}, {("mlp_out", None), ("post_block", 1)}),
    ],
)
def test_forms_of_sites(given: object, names: set[Any] | None) -> None:
    assert demand(sites=given).sites == Sites(None if names is None else frozenset(names))


def test_sites_of_each_sequence() -> None:
    each = demand(sites=[None, [], ["post_block"], {("mlp_out", 1)}]).sites
    names = [None, frozenset(), frozenset({("post_block", None)}), frozenset({("mlp_out", 1)})]
    assert each == tuple(Sites(one) for one in names)


def test_a_token_selection_is_a_choice() -> None:
    assert isinstance(TokenSelection(generated=True), Choice)
