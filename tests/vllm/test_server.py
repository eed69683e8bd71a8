"""Requests to the OpenAI server through the official client."""

from __future__ import annotations

import json
import random

import pytest

from tests.vllm import engines
from tests.vllm.serving import PROMPT, Server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


def test_a_request_is_steered_and_the_next_one_is_not(server: Server) -> None:
    plain, moved = server.said(), engines.at(1, engines.vector(1))
    steered = server.said(json.dumps(moved))
    assert steered != plain == server.said(json.dumps({**moved, "scale": 0.0})) == server.said()


def test_rows_of_finished_requests_are_free_again(server: Server) -> None:
    """Each takes two of the eight rows, and the engine is idle between them."""
    answers = [server.said(json.dumps(engines.at(1, engines.vector(40 + n, 2.0)))) for n in range(12)]
    assert len(set(answers)) > 6


def test_beam_search_is_refused_rather_than_run_unsteered(server: Server) -> None:
    import openai

    asked = {"steer": json.dumps(engines.at(1, engines.vector(1)))}
    model = server.client.models.list().data[0].id
    for more in ({"use_beam_search": True, "vllm_xargs": asked}, {"use_beam_search": True}):
        extra = {"extra_body": more, "max_tokens": 4, "temperature": 0, "n": 2}
        if "vllm_xargs" in more:
            with pytest.raises(openai.BadRequestError, match="beam search"):
                server.client.completions.create(model=model, prompt=PROMPT, **extra)
        else:
            assert server.client.completions.create(model=model, prompt=PROMPT, **extra).choices


@pytest.mark.behaviour(80)
def test_malformed_steering_is_answered_by_400_and_nothing_dies(server: Server) -> None:
    import openai

    draw, answers = random.Random(0), []
    ones = [1.0] * engines.WIDTH
    pieces = [
        "", "{", "[]", "3", "null", '{"named": "x"}', '{"base": 1}', '{"base": {"post_block": {"9": [1.0]}}}',
        json.dumps({"base": {"post_block": {"1": ones[:-1]}}}), json.dumps({"base": {"mlp_out": {"1": ones}}}),
        '{"base": {"post_block": {"1": [NaN]}}}', '{"base": {"post_block": {"1": {"dtype": "x"}}}}',
        '{"scale": 1e999}', '{"tokens": {"spans": [[0]]}}', '{"clamps": {"layers.1.post_block": [{}]}}',
        '{"monitors": 4}', '{"decode": {"": {"": []}}}', json.dumps({"a" * draw.randrange(9): draw.random()}),
        '{"base": {"post_block": {"-1": [1.0]}}}', '{"named": [["x", "y"]]}', '{"named": {"x": 1}}', "[" * 500,
        "[" * 100_000, "1" * 5000, '{"base": {"post_block": {"1": {"dtype": [], "shape": [1], "data": ""}}}}',
        '{"gates": 3}', '{"gates": [3]}', '{"gates": [{"apply": {"add": {"named": ["x"]}}}]}', '{"conversation": 3}',
        json.dumps({"gates": [{"when": {"site": "layers.1.post_block", "probe": ones[:-1]}, "scope": "next_step",
                               "apply": {"add": {"vectors": {"layers.1.post_block": ones}}}}]}),
        '{"gates": [{"when": {"site": "layers.9.post_block", "probe": [1.0]}, "apply": {"attenuate": 0.5}}]}',
        '{"gates": [{"scope": [], "apply": {"clamp": {"layers.1.post_block": [{}]}}}]}',
        '{"base": {"post_block": {"1": [1.0, 1' + "0" * 400 + "]}}}",
    ]  # fmt: skip
    for _ in range(2000):
        text = draw.choice(pieces)
        cut = text[: draw.randrange(len(text) + 1)] if draw.random() < 0.3 else text
        try:
            server.said(cut)
        except openai.APIConnectionError:
            raise AssertionError(f"the server hung up on {cut!r}") from None
        except openai.APIStatusError as error:
            answers.append(error.status_code)
        else:
            answers.append(200)  # "{}" and "null" ask for nothing
    assert set(answers) <= {200, 400}
    assert answers.count(400) > 1500
    assert server.said() == server.said()
