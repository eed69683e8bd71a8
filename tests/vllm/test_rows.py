"""Rows of tokens, waiting requests and block keys, against plain loops; no engine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import SteerSpec
from steer_compile.errors import TableFull
from steer_compile.ir import Site
from steer_compile.passes.plan_edits import reserve_banks
from steer_compile.runtime.registry import Registry
from steer_compile.vllm.admission import Grants, block_keys, row_keys
from steer_compile.vllm.requests import DIGESTS, KEY, parse
from steer_compile.vllm.rows import RequestRows
from steer_compile.vllm.transport import sent

WIDTH = 4
ZERO, GLOBAL_PREFILL, GLOBAL_DECODE = 0, 1, 2


def registry(rows: int = 64, tokens: int = 256) -> Registry:
    spec = SteerSpec(steer=("post_block",), rows=rows, max_tokens=tokens, ops=("add", "row_monitor"))
    made = Registry(spec)
    site = Site(0, "post_block", "", WIDTH, torch.float32, (), "flat")
    made.reserve(reserve_banks(spec, [site], 1), torch.device("cpu"))
    return made


def steering(kind: str, seed: int) -> dict[str, Any] | None:
    vector = {"post_block": {"0": [float(seed + 1)] * WIDTH}}
    tokens = {"spans": [[1, 3]], "generated": seed % 2 == 0}
    return {
        "none": None, "base": {"base": vector}, "prefill": {"prefill": vector}, "decode": {"decode": vector},
        "some": {"base": vector, "tokens": tokens},
    }[kind]  # fmt: skip


def asks(made: Registry, asked: dict[str, Any] | None) -> dict[str, Any] | None:
    """Extra arguments of a request, as the front end hands them on."""
    if asked is None:
        return None
    config = parse(asked)
    return {KEY: sent({phase: made.contents(config, phase) for phase in ("prefill", "decode")}, config.tokens)}


KINDS = st.sampled_from(["none", "base", "prefill", "decode", "some"])
REQUESTS = st.lists(
    st.tuples(KINDS, st.integers(0, 3), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)), max_size=6
)


def run(rows: RequestRows, names: list[str], spans: list[tuple[int, int, int]]) -> None:
    """A step: of each request the position of its first token, its tokens and those of its prompt."""
    starts, counts, prompts = np.array(spans, np.int32).reshape(-1, 3).T
    rows.step(names, starts, counts, prompts)


@pytest.mark.behaviour(49, 50, 51, 52)
@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_each_token_reads_the_row_of_its_request_and_position(
    steps: list[list[tuple[str, int, int, int, int]]],
) -> None:
    made = registry()
    rows = RequestRows(made)
    names: list[str] = []
    for number, step in enumerate(steps):
        rows.drop(names)
        names = [f"{number}.{i}" for i in range(len(step))]
        for name, (kind, seed, *_) in zip(names, step, strict=True):
            asked = steering(kind, seed)
            rows.admit(name, asks(made, asked))
        run(rows, names, [(start, length, prompt) for _, _, start, length, prompt in step])
        expected, mask = [], []
        for kind, seed, start, length, prompt in step:
            for position in range(start, start + length):
                decoded = position >= prompt
                own = kind in ("base", "some") or kind == ("decode" if decoded else "prefill")
                if kind == "some":
                    own = seed % 2 == 0 if decoded else position in range(*slice(1, 3).indices(prompt))
                expected.append(float(seed + 1) if own else 0.0)
                mask.append(float(decoded))
        table = made.tables.view("table", ("post_block", 0))
        tokens = len(expected)
        assert table[made.tables.rows[:tokens].long()][:, 0].tolist() == expected
        assert made.tables.decode[:tokens].tolist() == mask
        assert made.tables.rows[tokens:].count_nonzero() == 0  # what an earlier step left is gone
    rows.drop(names)
    assert (rows.live, made.tables.rows.numel()) == (0, 256)


def test_a_step_that_the_tables_hold_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent_steps = registry(), []
    rows = RequestRows(made)
    monkeypatch.setattr(
        rows, "_send", lambda rows, decoded, lines: sent_steps.append((rows.tolist(), decoded.tolist()))
    )
    for start, length in ((3, 1), (4, 1), (0, 2), (5, 1)):
        run(rows, ["a"], [(start, length, 3)])
    decoded, prompt = ([GLOBAL_DECODE], [True]), ([GLOBAL_PREFILL] * 2, [False] * 2)
    assert sent_steps == [decoded, prompt, ([GLOBAL_DECODE, ZERO], [True, False])]


@pytest.mark.behaviour(37, 38)
def test_without_a_free_row_a_request_is_not_run() -> None:
    made = registry(rows=1)
    rows = RequestRows(made)
    rows.admit("a", asks(made, steering("decode", 0)))
    rows.admit("b", asks(made, steering("decode", 0)))  # the same content
    with pytest.raises(TableFull):
        rows.admit("c", asks(made, steering("decode", 1)))
    rows.drop(["a", "b", "unknown"])
    rows.admit("c", asks(made, steering("decode", 1)))


@pytest.mark.behaviour(52)
def test_a_request_that_goes_on_with_other_steering_changes_its_rows() -> None:
    made = registry(rows=1)
    rows = RequestRows(made)
    for asked in (steering("prefill", 0), steering("prefill", 1), None, steering("decode", 2)):
        rows.admit("a", asks(made, asked))
        run(rows, ["a"], [(0, 4, 3)])
        table = made.tables.view("table", ("post_block", 0))
        found = table[made.tables.rows[:4].long()][:, 0].tolist()
        assert found[1:] == ([0.0, 0.0, 3.0] if asked and "decode" in asked else [found[0]] * 2 + [0.0])
        assert found[0] == (asked["prefill"]["post_block"]["0"][0] if asked and "prefill" in asked else 0.0)


_NUMBERS = count()


def request(prefill: str = "", decode: str = "", prompt: int = 10, name: str = "") -> Any:
    extra = {KEY: {}, DIGESTS: {"prefill": prefill, "decode": decode}} if prefill or decode else None
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        request_id=name or f"request {next(_NUMBERS)}", num_prompt_tokens=prompt, sampling_params=params
    )


@dataclass(frozen=True)
class Case:
    running: list[Any]
    waiting: list[Any]
    held: list[int]


CASES = {
    "room for all": Case([request("a", "b")], [request("c", "d"), request()], []),
    "full": Case([request("a", "b"), request("c", "d")], [request("e"), request(), request("a", "b")], [0]),
    "no overtaking": Case([request("a", "b"), request("c")], [request("e", "f"), request("g"), request("c")], [0, 1]),
    "equal ones": Case(
        [request("a", "b", name=n) for n in "xyz"], [request("c", "d"), request("c", "d"), request("e")], [2]
    ),
    "other input": Case(
        [request("a", "b", name="x"), request("c", "d")], [request("e", "f", name="x"), request("a")], [1]
    ),
    "other input, shared rows": Case(
        [request("a", "b", name="x"), request("a", "b")], [request("e", "f", name="x"), request("c")], [1]
    ),
}


@pytest.mark.behaviour(55)
@pytest.mark.parametrize("name", CASES)
def test_who_waits_for_rows(name: str) -> None:
    case, grants = CASES[name], Grants(4)
    for each in case.running:
        grants.grant(each)
    held = grants.beyond(case.waiting)
    assert [i for i, r in enumerate(case.waiting) if any(r is h for h in held)] == case.held


@pytest.mark.behaviour(55)
def test_who_waits_for_rows_of_overrides() -> None:
    """They have a pool of their own; equal gates share none of it."""

    def gated(name: str, decode: str = "") -> Any:
        made = request("", decode, name=name)
        made.sampling_params.extra_args = {KEY: {}, DIGESTS: {"prefill": "", "decode": decode, "override": "1"}}
        return made

    grants = Grants(2, overrides=2)
    for each in (gated("a"), gated("b", "x")):
        grants.grant(each)
    waiting = [gated("c"), request(name="d"), request("", "x", name="e"), request("", "y", name="f")]
    assert [each.request_id for each in grants.beyond(waiting)] == ["c", "f"]  # none overtakes but with rows there are
    grants.release(["a"])
    assert grants.beyond(waiting) == []


names = st.sampled_from(["", "a", "b", "c"])
arrivals = st.tuples(st.integers(0, 5), names, names)


@pytest.mark.behaviour(56)
@given(st.lists(st.tuples(st.lists(arrivals), st.sets(st.integers(0, 5)))), st.integers(2, 6))
def test_what_runs_always_has_rows(steps: list[tuple[list[tuple[int, str, str]], set[int]]], capacity: int) -> None:
    """Against the rows that a runner would hold: arrivals of new and of running requests, and ends."""
    grants, runner = Grants(capacity), dict[str, set[tuple[str, str]]]()
    for queue, ended in steps:
        grants.release([str(i) for i in ended])
        for i in ended:
            runner.pop(str(i), None)
        waiting = [request(p, d, name=str(i)) for i, p, d in {i: (i, p, d) for i, p, d in queue}.values()]
        held, goes_on = grants.beyond(waiting), any(each.request_id in runner for each in waiting)
        for each in waiting:
            if not any(each is h for h in held):
                grants.grant(each)
                runner[each.request_id] = row_keys(each)
                assert len(set().union(*runner.values())) <= capacity
        all_of_them = set().union(*runner.values(), *map(row_keys, waiting))
        # One that goes on with other steering gives rows back only when its turn comes.
        assert not held or len(all_of_them) > capacity or goes_on


@pytest.mark.behaviour(57, 58)
def test_keys_of_cached_blocks() -> None:
    both = request("p", "d")
    assert block_keys(both, 0, 8) == (("steer_prefill", "p"),)
    assert block_keys(both, 8, 16) == (("steer_prefill", "p"), ("steer_decode", "d"), ("steer_prompt_end", "2"))
    assert block_keys(request("p"), 8, 16) == (("steer_prefill", "p"), ("steer_prompt_end", "2"))
    assert block_keys(request("p", prompt=16), 8, 16) == (("steer_prefill", "p"),)  # all of it was steered
    assert block_keys(both, 10, 18) == (("steer_decode", "d"),)
    assert block_keys(request(decode="d"), 0, 10) == ()
    assert block_keys(request(), 0, 32) == ()
    assert block_keys(SimpleNamespace(num_prompt_tokens=4, sampling_params=None), 0, 8) == ()


def test_numbers_of_tokens_are_fp32_whatever_the_default_dtype_is() -> None:
    """vLLM builds a model, and so its tables, with the model's dtype as default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = registry()
        handle = made.register(parse({"monitors": {"layers.0.post_block": {"probe": [1.0] * WIDTH, "threshold": 0.1}}}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {made.tables.gain.dtype, made.tables.decode.dtype, made.tables.scale.dtype} == {torch.float32}
    row = made.tables.view("rowprobe_set", ("post_block", 0))[handle.rows["decode"]]
    assert row[:2].tolist() == torch.tensor([0.1, 1.0]).tolist()
