"""`Monitor` and `Clamp`: what is taken, what it becomes, and what is refused with which words."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import Clamp, Monitor, Steering
from steer_compile.errors import SpecError, SteerError, VectorError

NUMBERS = st.floats(-1e300, 1e300, allow_subnormal=False)


@given(st.lists(NUMBERS, min_size=1, max_size=5).filter(any))
def test_a_direction_is_brought_to_length_one(numbers: list[float]) -> None:
    largest = max(abs(n) for n in numbers)
    exact = torch.tensor([n / largest for n in numbers], dtype=torch.float64)
    clamp = Clamp(torch.tensor(numbers, dtype=torch.float64), value=0)
    assert clamp.direction.dtype == torch.float32
    torch.testing.assert_close(clamp.direction, (exact / exact.norm()).float())


@pytest.mark.behaviour(22)
@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_bounds(lo: float, hi: float) -> None:
    lo, hi = sorted((lo, hi))
    both, low, high, pinned = Clamp([1.0], lo, hi), Clamp([1.0], lo=lo), Clamp([1.0], hi=hi), Clamp([1.0], value=lo)
    assert (both.lo, both.hi, both.strength) == (lo, hi, 1.0)
    assert (low.lo, low.hi) == (lo, math.inf)
    assert (high.lo, high.hi) == (-math.inf, hi)
    assert (pinned.lo, pinned.hi) == (lo, lo)


def test_equal_content_is_equal() -> None:
    same = [Clamp([2.0, 0.0], 0, 1), Clamp(torch.tensor([5.0, -0.0], dtype=torch.bfloat16), -0.0, 1.0, strength=1)]
    assert len({*same}) == len({c.digest for c in same}) == 1
    other = [Clamp([1.0, 0.0], 0, 2), Clamp([1.0, 0.0], -1, 1), Clamp([1.0, 0.0], 0, 1, 0.5), Clamp([-1.0, 0.0], 0, 1)]
    assert len({*same, *other}) == 5
    monitors = [Monitor([1.0]), Monitor([2.0]), Monitor([1.0], 1.0), Monitor([1.0], 0.0, 2.0)]
    assert len({*monitors, Monitor(torch.ones(1))}) == 4
    assert Monitor([1.0]) != Clamp([1.0], 0)
    assert Steering(clamps={("post_block", 0): same[:1]}) == Steering(clamps={"layers.0.resid_post": same[1]})


def test_sites_are_written_in_any_form() -> None:
    monitor, clamp = Monitor([1.0]), Clamp([1.0], value=0)
    forms: list[dict[Any, Any]] = [
        {("resid_post", 3): 0},
        {"layers.3.post_block": 0},
        {"blocks.3.hook_resid_post": 0},
    ]
    for form in forms:
        config = Steering(monitors=dict.fromkeys(form, monitor), clamps={site: [clamp, clamp] for site in form})
        assert config.monitors == ((("post_block", 3), monitor),)
        assert config.clamps == ((("post_block", 3), (clamp, clamp)),)
    assert Steering(clamps={"post_block": {3: clamp}}).clamps == ((("post_block", 3), (clamp,)),)
    assert Steering(clamps={"layers.3.post_block": []}).clamps == ()


def test_what_is_given_is_copied() -> None:
    probe = torch.ones(2)
    monitor = Monitor(probe)
    probe.fill_(7)
    assert monitor.probe.tolist() == [1, 1]
    with pytest.raises(AttributeError, match="threshold"):
        monitor.threshold = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError, match="lo"):
        Clamp([1.0], 0).lo = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Monitor([math.nan]), VectorError, "probe of a monitor holds NaN or infinity; fix"),
        (lambda: Monitor([[1.0]]), VectorError, "probe of a monitor has shape (1, 1); give one dimension"),
        (lambda: Monitor([1]), VectorError, "probe of a monitor has dtype torch.int64; give"),
        (lambda: Monitor([1.0], math.inf), VectorError, "threshold of a monitor inf is not finite; give"),
        (lambda: Monitor([1.0], 1e39), VectorError, "threshold of a monitor 1e+39 is not finite; give"),
        (lambda: Monitor([1.0], 0.0, math.nan), VectorError, "sharpness of a monitor nan is not finite; give"),
        (lambda: Monitor([1.0], 0.0, -1.0), VectorError, "sharpness of a monitor is -1.0, below 0; turn the probe"),
        (lambda: Clamp([0.0, -0.0], 0), VectorError, "direction of a clamp is zeros, which point nowhere; give"),
        (lambda: Clamp([math.inf], 0), VectorError, "direction of a clamp holds NaN or infinity; fix"),
        (lambda: Clamp([1.0]), VectorError, "no bound and would do nothing; give lo, hi or value"),
        (lambda: Clamp([1.0], 1, value=2), VectorError, "both a value and bounds; give value, or lo and hi"),
        (lambda: Clamp([1.0], 2, 1), VectorError, "lo=2.0 above hi=1.0; exchange"),
        (lambda: Clamp([1.0], math.nan), VectorError, "lower bound of a clamp nan is not finite; give"),
        (lambda: Clamp([1.0], hi=math.nan), VectorError, "upper bound of a clamp nan is not finite; give"),
        (lambda: Clamp([1.0], value=10**400), VectorError, "bound of a clamp 1000"),
        (lambda: Clamp([1.0], 0, strength=math.nan), VectorError, "strength of a clamp nan is not finite; give"),
        (lambda: Steering(clamps=[Clamp([1.0], 0)]), VectorError, "given as list; give {site: list of clamps}"),
        (lambda: Steering(clamps={"layers.0.mlp_in": [[1.0]]}), VectorError, "layers.0.mlp_in is a list; give [Clamp("),
        (lambda: Steering(clamps={"layers.0.mlp_in": 3.0}), VectorError, "layers.0.mlp_in is a float; give [Clamp("),
        (
            lambda: Steering(monitors={"layers.0.mlp_in": [1.0]}),
            VectorError,
            "layers.0.mlp_in is a list; give Monitor(",
        ),
        (lambda: Steering(monitors={"mlp_in": Monitor([1.0])}), SpecError, "'mlp_in' names no site; write it as"),
        (
            lambda: Steering(monitors={"layers.0.resid_post": Monitor([1.0]), ("post_block", 0): Monitor([2.0])}),
            VectorError,
            "monitor of layers.0.post_block is given twice; give each site once",
        ),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], kind: type[SteerError], text: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert text in str(error.value).splitlines()[0]
