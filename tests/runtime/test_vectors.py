"""Vectors: every form that is taken means the same, every bad value is refused by its site's name."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import Steering, TokenSelection, vector_set
from steer_compile.errors import SpecError, SteerError, VectorError
from steer_compile.runtime.vectors import scaled

FLOATS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=4)
KEYS = st.tuples(st.sampled_from(["post_block", "attn_out", "write_2"]), st.integers(0, 3))


@pytest.mark.behaviour(42)
def test_every_form_gives_the_same_set() -> None:
    numbers = [0.5, -2.0, 0.0]
    forms: list[dict[Any, Any]] = [
        {"post_block": {3: numbers}},
        {("resid_post", 3): np.array(numbers)},
        {"layers.3.post_block": torch.tensor(numbers, dtype=torch.bfloat16)},
        {"blocks.3.hook_resid_post": torch.tensor(numbers, dtype=torch.float64, requires_grad=True)},
        {"post_block": {"3": np.array(numbers, dtype=np.float16)}},
        {"post_block": {3: torch.tensor([0.5, 9, -2, 9, 0, 9])[::2]}},
    ]
    for form in forms:
        (key, vector), *rest = vector_set(form).items()
        assert key == ("post_block", 3)
        assert not rest
        assert vector.dtype == torch.float32
        assert vector.tolist() == numbers
        assert not vector.requires_grad
    assert len({vector_set(form) for form in forms}) == len({vector_set(form).digest for form in forms}) == 1


@pytest.mark.behaviour(42)
def test_a_set_is_a_copy() -> None:
    vector = torch.ones(3)
    made = vector_set({"post_block": {0: vector}})
    vector.fill_(7)
    assert dict(made.items())["post_block", 0].tolist() == [1, 1, 1]
    with torch.inference_mode():
        inside = vector_set({"post_block": {0: torch.ones(3)}})
    assert not dict(inside.items())["post_block", 0].is_inference()


@pytest.mark.behaviour(61)
def test_nothing_is_the_empty_set() -> None:
    assert not vector_set(None)
    assert vector_set({}) == vector_set(None) == vector_set({"post_block": {}})
    assert vector_set(vector_set(None)).digest == ""


@pytest.mark.behaviour(61)
@given(st.dictionaries(KEYS, FLOATS, min_size=1), st.randoms())
def test_the_digest_does_not_know_the_order(vectors: dict[tuple[str, int], list[float]], random: Any) -> None:
    items = list(vectors.items())
    random.shuffle(items)
    assert vector_set(dict(items)).digest == vector_set(vectors).digest


@pytest.mark.behaviour(61)
@given(st.dictionaries(KEYS, FLOATS, min_size=1, max_size=2), st.dictionaries(KEYS, FLOATS, min_size=1, max_size=2))
def test_the_digest_knows_the_content(one: dict[Any, list[float]], other: dict[Any, list[float]]) -> None:
    assert (vector_set(one).digest == vector_set(other).digest) == (one == other)


def test_minus_zero_is_zero() -> None:
    assert vector_set({"post_block": {0: [-0.0, 1.0]}}) == vector_set({"post_block": {0: [0.0, 1.0]}})


def test_a_sum_of_sets() -> None:
    one, other = vector_set({"post_block": {0: [1.0, 2.0]}}), vector_set({"post_block": {0: [0.5, 0.0], 1: [3.0]}})
    total = scaled([(one, 2.0), (other, -1.0)])
    assert {key: vector.tolist() for key, vector in total.items()} == {
        ("post_block", 0): [1.5, 4.0],
        ("post_block", 1): [-3.0],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1.0, math.nan], "holds NaN or infinity"),
        ([1.0, -math.inf], "holds NaN or infinity"),
        (torch.tensor([1e300], dtype=torch.float64), "holds NaN or infinity"),
        ([1, 2], "has dtype torch.int64"),
        (torch.ones(2, dtype=torch.complex64), "has dtype torch.complex64"),
        (np.ones((2, 2)), r"has shape \(2, 2\)"),
        (3.0, r"has shape \(\)"),
        ([], r"has shape \(0,\)"),
        ("abc", "is a str that is no tensor"),
        (None, "is a NoneType that is no tensor"),
        ([[1.0], [2.0, 3.0]], "is a list that is no tensor"),
    ],
)
def test_bad_vectors_are_refused_by_name(value: object, text: str) -> None:
    for form in ({"attn_out": {2: value}}, {("attn_out", 2): value}):
        with pytest.raises(VectorError, match=rf"layers\.2\.attn_out {text}") as error:
            vector_set(form)
        assert ";" in str(error.value).splitlines()[0]


@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        ([1.0], VectorError, "given as list; give {hook: {layer: vector}}"),
        (torch.ones(3), VectorError, "given as Tensor"),
        ({"resid": {0: [1.0]}}, SpecError, "unknown hook 'resid'"),
        ({"post_block": [1.0]}, SpecError, "'post_block' names no site"),
        ({"post_block": {"x": [1.0]}}, SpecError, "layer 'x' of 'post_block'"),
        ({("post_block", 1.5): [1.0]}, SpecError, "layer 1.5 of 'post_block'"),
        ({"post_block": {True: [1.0]}}, SpecError, "layer True of 'post_block'"),
        ({"resid_post": {1: [1.0]}, ("post_block", 1): [1.0]}, VectorError, r"layers\.1\.post_block is given twice"),
    ],
)
def test_bad_sources(source: object, kind: type[SteerError], text: str) -> None:
    with pytest.raises(kind, match=text):
        vector_set(source)


def test_a_configuration_takes_any_form() -> None:
    config = Steering({"post_block": {0: [1.0]}}, named="a", scale=2)
    assert config.base == vector_set({"post_block": {0: [1.0]}})
    assert config.named == (("a", 1.0),)
    assert config.scale == 2.0
    assert Steering(named=("a", ("b", -1))).named == (("a", 1.0), ("b", -1.0))
    assert Steering() == Steering(vector_set(None))


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None])
def test_a_scale_is_a_finite_number(scale: Any) -> None:
    with pytest.raises(VectorError, match="scale .* is not finite; give a finite number"):
        Steering(scale=scale)
    with pytest.raises(VectorError, match="scale .* is not finite; give a finite number"):
        Steering(named=(("a", scale),))


@pytest.mark.parametrize("named", [[3], [("a",)], [("a", 1.0, 2.0)], [(1, 1.0)]])
def test_a_name_is_a_string(named: Any) -> None:
    with pytest.raises(VectorError, match="names no vector set; give a name or a pair"):
        Steering(named=named)


@pytest.mark.parametrize("spans", [(0, 3), ((0,),), ((0, 1, 2),), (("a", 1),), ((0.0, 1),), ((True, 2),)])
def test_a_span_is_a_pair_of_positions(spans: Any) -> None:
    with pytest.raises(SpecError, match="is no span of prompt positions; give pairs"):
        TokenSelection(spans)


def test_a_token_selection_selects_something() -> None:
    with pytest.raises(SpecError, match="selects nothing; give spans, last_prompt=True or generated=True"):
        TokenSelection()
    assert TokenSelection([[0, None]]) == TokenSelection(((0, None),))  # type: ignore[arg-type]
