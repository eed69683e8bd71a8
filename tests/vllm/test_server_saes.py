"""Autoencoders over HTTP: attached to a running server, used by requests, and detached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_compile import sae
from steer_compile.sae import SAE, JumpReLU
from tests.sae._weights import parts
from tests.vllm import engines
from tests.vllm.serving import PROMPT, Server
from tests.vllm.test_server_operations import ask

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

COUNT, PLACE = 96, "layers.1.post_block"


def made(seed: int) -> SAE:
    own = parts(seed, engines.WIDTH, COUNT)
    activation = JumpReLU(own["threshold"])
    return SAE(own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"], activation, site=("post_block", 1), name="one")


@pytest.fixture(scope="module")
def root(server: Server) -> Path:
    for seed in (3, 9):
        sae.save(made(seed), server.root / f"sae{seed}")
    return server.root


@pytest.fixture
def attached(server: Server, root: Path) -> Iterator[Any]:
    """The answer to attaching features 3 and 8 of one."""
    yield ask(server, "PUT", "/saes/bridge", json={"path": "sae3", "features": [3, 8]})
    assert ask(server, "DELETE", "/saes/bridge").status_code in (200, 404)


def text(feature: int = 3, **more: Any) -> str:
    clamps = [{"feature": feature, "value": 9.0}]
    return json.dumps({"features": [{"sae": "bridge", "clamps": clamps, **more}]})


def message(answer: Any) -> str:
    return str(answer.json()["error"]["message"])


def test_one_comes_and_goes(server: Server, attached: Any) -> None:
    assert (attached.status_code, attached.json()["digest"]) == (200, made(3).digest)
    listed = ask(server, "GET", "/saes", key=None).json()
    assert listed["saes"] == [attached.json()] == ask(server, "GET", "", key=None).json()["saes"]
    assert listed["room"][PLACE] == {"features": {"used": 2, "free": 2}}
    plain, steered = server.said(), server.said(text())
    assert plain != steered == server.said(text())
    with pytest.raises(Exception, match="feature 5 of 'bridge' is not loaded"):
        server.said(text(5))
    again = ask(server, "PUT", "/saes/bridge", json={"path": "sae9", "features": [3, 8]})
    assert (again.status_code, "detach it first" in message(again)) == (400, True)
    assert ask(server, "DELETE", "/saes/bridge").json() == {"name": "bridge"}
    gone = ask(server, "DELETE", "/saes/bridge")
    assert (gone.status_code, "attached are none" in message(gone)) == (404, True)
    with pytest.raises(Exception, match="no autoencoder 'bridge' is attached"):
        server.said(text())
    assert ask(server, "PUT", "/saes/bridge", json={"path": "sae9", "features": [3, 8]}).status_code == 200
    assert server.said(text()) not in (plain, steered)
    assert server.said() == plain


def test_running_requests_and_everyone_hold_it(server: Server, attached: Any) -> None:
    asked = {"vllm_xargs": {"steer": text()}, "ignore_eos": True}
    model = server.client.models.list().data[0].id
    running = server.client.completions.create(
        model=model, prompt=PROMPT, max_tokens=100, temperature=0, stream=True, extra_body=asked
    )
    next(iter(running))
    refused = ask(server, "DELETE", "/saes/bridge")
    assert (refused.status_code, "is in use by 1 request; let it end" in message(refused)) == (400, True)
    running.close()  # the server aborts it
    everyone = json.dumps({**json.loads(text(phase="decode"))})
    for _ in range(2):
        assert ask(server, "PUT", "/global", content=everyone).status_code == 200
        refused = ask(server, "DELETE", "/saes/bridge")
        assert (refused.status_code, "in use by everyone (decode)" in message(refused)) == (400, True)
        assert ask(server, "DELETE", "/global").status_code == 200
    answer = ask(server, "DELETE", "/saes/bridge")
    assert answer.status_code == 200, answer.text


def test_bad_bodies_and_paths_are_refused(server: Server, root: Path, tmp_path: Path) -> None:
    sae.save(made(3), tmp_path / "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    first = {"features": [3, 8]}
    answers = {
        str(body)[:60]: ask(server, "PUT", "/saes/bad", content=body if isinstance(body, str) else json.dumps(body))
        for body in (
            "", "[]", "{", {}, {"path": 3}, {"path": "sae3"}, {"path": "sae3", "features": [99]},
            {**first, "path": "link"}, {**first, "path": "../secret"}, {**first, "path": str(tmp_path / "secret")},
            {"path": "sae3", "whole": True}, {"path": "sae3", "features": list(range(5))},
            {**first, "path": "sae3", "site": "layers.9.post_block"},
        )
    }  # fmt: skip
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 400)
    assert all(message(answer) for answer in answers.values())
    assert ask(server, "PUT", "/saes/bad", json={**first, "path": "nowhere"}).status_code == 404
    for key in (None, "another"):
        assert ask(server, "PUT", "/saes/bad", key=key, json={**first, "path": "sae3"}).status_code == 401
        assert ask(server, "DELETE", "/saes/bad", key=key).status_code == 401
    found = ask(server, "GET", "/saes", key=None).json()
    assert (found["saes"], found["room"][PLACE]["features"]) == ([], {"used": 0, "free": 4})


def test_without_a_root_no_path_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    from types import SimpleNamespace

    from steer_compile.vllm.server import plugin

    async def stream() -> Any:
        yield b'{"path": "sae3"}'

    engine = SimpleNamespace(check_changes=lambda: None, root="")
    state = SimpleNamespace(state=SimpleNamespace(steering=engine))
    request: Any = SimpleNamespace(
        headers={"X-Steering-Key": "k"}, app=state, stream=stream, path_params={"name": "bridge"}
    )
    monkeypatch.setenv(plugin.KEY_VARIABLE, "k")
    answer: Any = asyncio.run(plugin.answered(plugin.attach_sae, True, True)(request))  # type: ignore[arg-type]
    assert (answer.status_code, b"set vector_root in additional_config" in answer.body) == (403, True)
