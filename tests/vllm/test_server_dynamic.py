"""What an operator does to running requests over HTTP, and gates of clients."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.vllm import engines
from tests.vllm.engines import at, vector
from tests.vllm.serving import PROMPT, Server
from tests.vllm.test_server_operations import ask

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

SITE = "layers.1.post_block"
PUSH = vector(9, 2.0).tolist()


def status(server: Server) -> dict[str, Any]:
    answer = ask(server, "GET", "/dynamic")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.behaviour(80)
def test_changes_of_sites_and_actions_need_the_key(server: Server) -> None:
    for method, path in (
        ("PUT", "/tier"), ("DELETE", "/tier"), ("PUT", "/monitor"), ("DELETE", "/monitor"), ("POST", "/actions"),
        ("GET", "/dynamic"),
    ):  # fmt: skip
        assert ask(server, method, path, key="another").status_code == 401


def test_a_tier_and_a_monitor_are_set_and_taken_away(server: Server) -> None:
    plain, decode = server.said(), server.said(json.dumps(at(1, vector(9, 2.0), "decode")))
    assert plain != decode
    assert ask(server, "PUT", "/tier", json={"vectors": {SITE: PUSH}}).status_code == 200
    assert server.said() == decode
    assert status(server)["tier"]["digest"]
    shut = {"site": SITE, "monitor": {"probe": PUSH, "threshold": 1e6, "sharpness": 10.0}}
    assert ask(server, "PUT", "/monitor", json=shut).status_code == 200
    assert server.said() == plain
    assert list(status(server)["monitors"]) == [SITE]
    assert ask(server, "DELETE", f"/monitor?site={SITE}").status_code == 200
    assert server.said() == decode
    assert ask(server, "DELETE", "/tier").status_code == 200
    assert server.said() == plain


BAD: dict[str, tuple[str, str, Any]] = {
    "no vectors": ("PUT", "/tier", {"vectors": 3}),
    "a field": ("PUT", "/tier", {"vector": {}}),
    "a layer": ("PUT", "/tier", {"vectors": {"layers.9.post_block": PUSH}}),
    "a width": ("PUT", "/tier", {"vectors": {SITE: PUSH[:-1]}}),
    "a gain": ("PUT", "/tier", {"vectors": {SITE: PUSH}, "gain": "much"}),
    "no monitor": ("PUT", "/monitor", {"site": SITE}),
    "no probe": ("PUT", "/monitor", {"site": SITE, "monitor": {"threshold": 1}}),
    "hidden units": ("PUT", "/monitor", {"site": SITE, "monitor": {"probe": PUSH, "hidden": {
        "weight": [PUSH], "bias": [0.0], "output": [1.0]}}}),
    "a list": ("PUT", "/tier", [1]),
    "no site": ("DELETE", "/monitor", None),
    "another site": ("DELETE", "/monitor?site=layers.1.mlp_out", None),
    "no actions": ("POST", "/actions", {}),
    "actions that are none": ("POST", "/actions", {"actions": [3]}),
    "many actions": ("POST", "/actions", {"actions": [{}] * 257}),
}  # fmt: skip


@pytest.mark.behaviour(80)
@pytest.mark.parametrize("name", BAD)
def test_bad_changes_are_answered_by_400(name: str, server: Server) -> None:
    method, path, body = BAD[name]
    answer = ask(server, method, path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_an_operator_steers_a_running_request(server: Server) -> None:
    """Its name is in the status; an action of it is applied, one of another is rejected, and both are counted."""
    server.said()
    long = " ".join(f"t{i}" for i in range(5, 25))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.said, json.dumps({"conversation": "mine"}), long, 100)
        name = ""
        for _ in range(400):
            name = next((r for r, c in status(server)["requests"].items() if c == "mine"), "")
            if name:
                break
            time.sleep(0.01)
        actions = [
            {"kind": "set_override", "request": name, "vectors": {SITE: PUSH}},
            {"kind": "set_override", "request": "nobody", "vectors": {SITE: PUSH}},
        ]
        answer = ask(server, "POST", "/actions", json={"actions": actions})
        steered = running.result()
    assert (answer.status_code, answer.json()) == (200, {"accepted": [True, True]})
    assert steered != server.said(prompt=long, tokens=100)
    found = status(server)
    assert (found["actions"]["applied"]["operator"], found["actions"]["rejected"]["operator"]) == (1, 1)
    assert found["ranks"] == [{name: found[name] for name in found["ranks"][0]}]
    assert (len(found["checksum"]), found["applied"]) == (32, 1)
    text = ask(server, "GET", "/dynamic/metrics", key=None).text
    assert 'steer_compile_dynamic_actions_total{outcome="applied",source="operator"} 1.0' in text
    assert 'steer_compile_dynamic_controller_errors_total{controller="idle"} 0.0' in text


def test_gates_of_clients(server: Server) -> None:
    import openai

    plain, decode = server.said(), server.said(json.dumps(at(1, vector(9, 2.0), "decode")))
    adds = {"add": {"vectors": {SITE: PUSH}}}
    when = {"site": SITE, "probe": [1.0] * engines.WIDTH, "threshold": -1e6}
    for scope in ("next_step", "rest_of_request"):
        assert server.said(json.dumps({"gates": [{"when": when, "scope": scope, "apply": adds}]})) == decode
        shut = {"when": {**when, "threshold": 1e6}, "scope": scope, "apply": adds}
        assert server.said(json.dumps({"gates": [shut]})) == plain
    assert server.said(json.dumps({"gates": [{"apply": adds}]})) == decode
    beyond = {"when": {**when, "site": "layers.9.post_block"}, "scope": "next_step", "apply": adds}
    with pytest.raises(openai.BadRequestError, match=r"layers\.9"):
        server.said(json.dumps({"gates": [beyond]}))
    assert server.said(prompt=PROMPT) == plain
