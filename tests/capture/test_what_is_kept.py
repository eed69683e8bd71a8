"""Which tokens are captured, and what of their values is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.capture.keeping import Keeping, Taken
from steer_compile.capture.reduce import KINDS, Reduction, reference
from steer_compile.capture.rows import Rows, joined
from steer_compile.capture.running import Largest, Mean, Running
from steer_compile.capture.selection import Selection, Top
from steer_compile.errors import CaptureError, SpecError, SteerError, UnknownName
from steer_compile.runtime.vectors import TokenSelection

SITE = ("post_block", 3)
NAME = "layers.3.post_block"

SELECTIONS = st.builds(
    Selection,
    st.one_of(
        st.just(TokenSelection(((1, -1),), generated=True)),
        st.just(TokenSelection(last_prompt=True)),
        st.just(TokenSelection(((None, None),))),
    ),
    every=st.integers(1, 5),
    positions=st.lists(st.integers(0, 40), max_size=5).map(tuple),
)


@pytest.mark.behaviour(73)
@given(SELECTIONS, st.integers(0, 20), st.lists(st.integers(0, 9), max_size=8))
def test_a_selection_is_the_same_in_any_steps(chosen: Selection, prompt: int, steps: list[int]) -> None:
    whole = chosen.mask(0, sum(steps), prompt)
    first, parts = 0, []
    for length in steps:
        parts.append(chosen.mask(first, length, prompt))
        if not chosen.may_choose(first, prompt):
            assert not whole[first:].any()
        first += length
    assert np.array_equal(np.concatenate([*parts, np.zeros(0, bool)]), whole)
    for position, taken in enumerate(whole):
        assert chosen.tokens is not None
        plain = bool(chosen.tokens.mask(position, 1, prompt)[0]) and position % chosen.every == 0
        assert taken == (plain or position in chosen.positions)


def test_what_selects_nothing_or_cannot_be_is_refused() -> None:
    for bad in ({"tokens": None}, {"every": 0}, {"every": True}, {"positions": (-1,)}, {"positions": (1.5,)}):
        with pytest.raises(SpecError):
            Selection(**bad)
    for count in (0, True, 10**6):
        with pytest.raises(SpecError, match="count"):
            Top(count, SITE, torch.ones(3))
    with pytest.raises(SteerError, match="NaN"):
        Top(1, SITE, torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 7), (5, 7), (3, 5, 96)])
def test_reductions_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values, directions = torch.randn(shape).to(dtype), torch.randn(4, shape[-1])
    made = Reduction(["rows", "norm", "project"], {SITE: directions})
    rows, norms, projections = made.of(values, directions)
    assert torch.equal(rows, values)
    flat = values.reshape(-1, shape[-1])
    for kind, found in (("norm", norms), ("project", projections)):
        wanted = reference(kind, flat, directions)
        torch.testing.assert_close(found.reshape(wanted.shape).double(), wanted, rtol=1e-4, atol=1e-4)
        assert found.dtype == torch.float32
    assert made.keys(SITE) == (NAME, f"{NAME}.norm", f"{NAME}.project")


def test_reductions_that_cannot_be_are_refused() -> None:
    ones = {SITE: torch.ones(2, 8)}
    for kinds, directions in (("sum", None), ((), None), (("mean", "norm"), None), ("project", None), ("norm", ones)):
        with pytest.raises(SpecError):
            Reduction(kinds, directions)
    made = Reduction("project", ones)
    made.check({SITE: 8})
    with pytest.raises(SpecError, match=r"layers\.4\.post_block has no directions"):
        made.check({SITE: 8, ("post_block", 4): 8})
    with pytest.raises(SteerError, match="have 8 numbers and its values 9"):
        made.check({SITE: 9})
    assert Reduction("project", ones) == made != Reduction("project", {SITE: torch.zeros(2, 8)})
    assert set(KINDS) == {"rows", "norm", "project", "mean"}


STEPS = st.lists(st.integers(0, 5), max_size=6)


def run(kept: Running, steps: list[int], values: torch.Tensor) -> None:
    first = 0
    for count in steps:
        if count:
            places = torch.arange(first, first + count)
            kept.add(places, places + 100, {SITE: values[first : first + count]})
        first += count


@given(STEPS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_a_mean_is_that_of_all_tokens(steps: list[int], dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(sum(steps), 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mean = Mean()
    run(mean, steps, values)
    positions, ids, found = mean.result()
    assert mean.count == sum(steps)
    assert positions.tolist() == [sum(steps) - 1] * bool(sum(steps))
    if sum(steps):
        torch.testing.assert_close(found[SITE].double(), reference("mean", values), rtol=1e-5, atol=1e-5)
        assert ids.tolist() == [sum(steps) + 99]


@given(STEPS, st.integers(1, 8), st.integers(0, 9))
def test_the_largest_scores_in_any_steps(steps: list[int], count: int, seed: int) -> None:
    total = sum(steps)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (total, 3), generator=generator).float()  # with many equal scores
    probe = torch.tensor([1.0, 2.0, -1.0])
    kept = Largest(count, SITE, probe)
    run(kept, steps, values)
    positions, ids, found = kept.result()
    wanted = sorted(range(total), key=lambda i: (-float(values[i] @ probe), i))[:count]
    assert positions.tolist() == sorted(wanted)
    assert ids.tolist() == [p + 100 for p in sorted(wanted)]
    if total:
        assert torch.equal(found[SITE], values[sorted(wanted)])


def test_a_top_is_never_left_out_silently() -> None:
    chosen = Selection(top=Top(2, SITE, torch.ones(3)))
    with pytest.raises(SpecError, match="a top of 2 tokens, which needs their values; give it to capture_to"):
        chosen.mask(0, 3, 3)
    assert chosen.candidates(0, 3, 3).tolist() == [True] * 3


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_rows_of_parallel_streams_keep_their_shape(shape: tuple[int, ...]) -> None:
    """A mean is over tokens and not over streams; norms are of all numbers of a token."""
    values = torch.randn(4, *shape)
    ids, places = torch.arange(4) + 100, torch.arange(4)
    taken = Taken(np.zeros(4, np.int64), np.arange(4), places, ids, {SITE: values})
    mean = Keeping(Reduction("mean"))
    assert mean.take("a", taken) is None
    ended = mean.ended("a")
    assert ended is not None
    torch.testing.assert_close(ended[1][f"{NAME}.mean"], values.mean(0, keepdim=True))
    top = Keeping(Reduction(["rows", "norm"]), Selection(top=Top(2, SITE, torch.ones(6))))
    assert top.take("a", taken) is None
    ended = top.ended("a")
    assert ended is not None
    best = sorted(values.flatten(1).sum(1).topk(2).indices.tolist())
    assert torch.equal(ended[1][NAME], values[best])
    torch.testing.assert_close(ended[1][f"{NAME}.norm"], values[best].flatten(1).norm(dim=1))
    assert ended[0].positions.tolist() == best


def rows(name: str, positions: list[int], step: int = 0) -> Rows:
    places = torch.tensor(positions, dtype=torch.int64)
    zeros = torch.zeros(len(positions), dtype=torch.int32)
    return Rows((name,), zeros, places, places + 100, torch.full_like(places, step), {NAME: places.float()[:, None]})


def test_rows_are_joined_by_name_and_the_latest_of_a_position_stays() -> None:
    whole = joined([rows("a", [0, 1, 2], 0), rows("b", [5], 1), rows("a", [1, 2, 3], 2)])
    assert whole.requests == ("a", "b")
    latest = whole.latest_per_position()
    assert latest.of("a").positions.tolist() == [0, 1, 2, 3]
    assert latest.of("a").steps.tolist() == [0, 2, 2, 2]
    assert latest.of("b").values[NAME].tolist() == [[5.0]]
    assert latest.nbytes == 5 * (4 + 3 * 8 + 4)
    with pytest.raises(UnknownName, match="'c'"):
        whole.of("c")
    with pytest.raises(CaptureError, match="join"):
        joined([])
    with pytest.raises(CaptureError, match="shape"):
        Rows(("a",), torch.zeros(2, dtype=torch.int32), torch.zeros(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(CaptureError, match="none of the 0"):
        Rows((), torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1), torch.zeros(1))
