"""What a request asks to be captured: read from plain data, and the same in the engine's process."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import EVERYTHING, Selection, Top
from steer_compile.errors import SteerError
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.vllm.capture_requests import CaptureAsked, CaptureRequest

SITE = ("post_block", 3)
NAME = "layers.3.post_block"
SELECTIONS = st.builds(
    Selection,
    st.sampled_from([None, EVERYTHING, TokenSelection(((0, 5), (-3, None)), last_prompt=True)]),
    st.integers(1, 9),
    st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    st.sampled_from([None, Top(3, SITE, torch.tensor([0.5, -1.0]))]),
)
KEEP = st.sampled_from(
    [
        Reduction(),
        Reduction("mean"),
        Reduction(["rows", "norm"]),
        Reduction("project", {SITE: torch.tensor([[1.0, 2.0], [0.0, -0.5], [3.0, 3.0]])}),
    ]
)


@given(SELECTIONS, KEEP, st.sampled_from(["", "parquet"]))
def test_the_engine_gets_what_was_asked(tokens: Selection, keep: Reduction, to: str) -> None:
    asked = CaptureRequest("run-7", (SITE, ("post_attn", 0)), tokens, keep, to)
    found = CaptureRequest.of_data(asked.to_data())
    assert (found.name, found.sites, found.keep, found.to) == (asked.name, asked.sites, keep, to)
    assert (found.tokens.tokens, found.tokens.every, found.tokens.positions) == (
        tokens.tokens, tokens.every, tokens.positions,
    )  # fmt: skip
    assert (found.tokens.top is None) == (tokens.top is None)
    if tokens.top is not None and found.tokens.top is not None:
        assert (found.tokens.top.count, found.tokens.top.site) == (3, SITE)
        assert torch.equal(found.tokens.top.probe, tokens.top.probe)


def of(text: str) -> CaptureAsked:
    return CaptureAsked.of(json.loads(text))


def test_fields_that_are_left_out() -> None:
    everything = of("{}")
    assert everything.sites is None
    assert (everything.tokens.tokens, everything.tokens.top, everything.keep) == (EVERYTHING, None, Reduction())
    assert of('{"tokens": {"positions": [3, 1, 3]}}').tokens == Selection(None, 1, (1, 3))
    assert of('{"tokens": {"positions": [3], "generated": true}}').tokens.tokens == TokenSelection(generated=True)
    assert of('{"tokens": {"every": 4}}').tokens == Selection(EVERYTHING, 4)
    projected = of(f'{{"sites": ["{NAME}"], "directions": {{"{NAME}": [[1.0, 2.0], [3.0, 4.0]]}}}}').keep
    assert projected == Reduction("project", {SITE: torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


BAD = """
[] {"where":1} {"name":3} {"to":[]} {"sites":[]} {"sites":{"post_block":3}} {"sites":["layers.x.post_block"]}
{"tokens":{}} {"tokens":{"positions":3}} {"tokens":{"positions":[1.5]}} {"tokens":{"positions":[-1]}}
{"tokens":{"every":0}} {"tokens":{"every":"2"}} {"tokens":{"top":{}}}
{"tokens":{"top":{"count":0,"site":"layers.3.post_block","probe":[1.0]}}}
{"tokens":{"top":{"count":2,"site":"layers.3.post_block","probe":[]}}}
{"reduce":"median"} {"reduce":3} {"reduce":[1]} {"reduce":[]} {"reduce":"project"} {"reduce":["mean","rows"]}
{"directions":[]} {"directions":{"layers.3.post_block":3}} {"directions":{"layers.3.post_block":[]}}
{"directions":{"layers.3.post_block":[[1.0],[1.0,2.0]]}} {"reduce":"norm","directions":{"layers.3.post_block":[[1.0]]}}
{"reduce":"mean","tokens":{"top":{"count":2,"site":"layers.3.post_block","probe":[1.0]}}}
""".split()


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SteerError):
        of(text)


def test_many_positions_are_refused() -> None:
    with pytest.raises(SteerError, match="4096"):
        CaptureAsked.of({"tokens": {"positions": list(range(5000))}})
