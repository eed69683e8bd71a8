"""What an operator does over HTTP: named vectors, global steering, status and metrics."""

from __future__ import annotations

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from steer_compile.vllm.capture_files import read
from tests.vllm import engines
from tests.vllm.engines import at, vector
from tests.vllm.serving import KEY, Server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

LONG = " ".join(f"t{i}" for i in range(5, 75))


def ask(server: Server, method: str, path: str, key: str | None = KEY, **more: Any) -> Any:
    """An answer of a route below /v1/steering."""
    import httpx

    headers = ({} if key is None else {"X-Steering-Key": key}) | more.pop("headers", {})
    return httpx.request(method, f"{server.address}/v1/steering{path}", headers=headers, timeout=60, **more)


def file_of(seed: int, layer: int = 1, width: int = engines.WIDTH) -> bytes:
    return save({f"layers.{layer}.post_block": vector(seed, 2.0)[:width].clone()})


@pytest.mark.behaviour(80)
def test_status_says_what_is_steered(server: Server) -> None:
    found = ask(server, "GET", "", key=None).json()
    assert found["spec"]["steer"]
    assert found["model"] == {"layers": engines.LAYERS, "width": engines.WIDTH}
    assert found["workers"] == [{"requests": 0, "rows_in_use": 0, "rows": 8}]


@pytest.mark.behaviour(80)
def test_changes_need_the_key(server: Server) -> None:
    for key in (None, "", "another"):
        for method, path in (
            ("PUT", "/vectors/x"),
            ("DELETE", "/vectors/x"),
            ("PUT", "/global"),
            ("DELETE", "/global"),
        ):
            assert ask(server, method, path, key=key).status_code == 401


@pytest.mark.behaviour(48)
def test_a_named_set_is_registered_used_replaced_and_deleted(server: Server) -> None:
    plain = server.said()
    first = ask(server, "PUT", "/vectors/calm", content=file_of(5))
    assert first.status_code == 200
    by_name = server.said('{"named": ["calm"]}')
    assert by_name == server.said(json.dumps(at(1, vector(5, 2.0)))) != plain
    again = ask(server, "PUT", "/vectors/calm", content=file_of(6))
    assert (again.status_code, "replace=True" in again.json()["error"]["message"]) == (400, True)
    second = ask(server, "PUT", "/vectors/calm?replace=true", content=file_of(6)).json()
    assert second["digest"] != first.json()["digest"]
    assert server.said('{"named": ["calm"]}') == server.said(json.dumps(at(1, vector(6, 2.0)))) != by_name
    assert [v["name"] for v in ask(server, "GET", "/vectors").json()["vectors"]] == ["calm"]
    assert ask(server, "DELETE", "/vectors/calm").status_code == 200
    assert ask(server, "DELETE", "/vectors/calm").status_code == 404
    with pytest.raises(Exception, match="no vector set is named 'calm'"):
        server.said('{"named": ["calm"]}')


def test_control_vectors_of_llama_cpp(server: Server, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="an optional reader")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.1", vector(7, 2.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "v.gguf").read_bytes()
    assert ask(server, "PUT", "/vectors/gguf", content=data).status_code == 200
    assert server.said('{"named": ["gguf"]}') == server.said(json.dumps(at(1, vector(7, 2.0))))
    assert ask(server, "PUT", "/vectors/cut", content=data[:60]).status_code == 400
    assert ask(server, "DELETE", "/vectors/gguf").status_code == 200


def test_paths_stay_under_the_root(server: Server, tmp_path: Path) -> None:
    (server.root / "calm.safetensors").write_bytes(file_of(8))
    (tmp_path / "secret.safetensors").write_bytes(file_of(8))
    (server.root / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    answers = {
        path: ask(server, "PUT", "/vectors/path?replace=true", json={"path": path}).status_code
        for path in (
            "calm.safetensors", "nowhere.safetensors", "../secret.safetensors", str(tmp_path / "secret.safetensors"),
            "link.safetensors", "calm.pt", "a\0b.safetensors", "x" * 5000,
        )
    }  # fmt: skip
    assert list(answers.values()) == [200, 404, 400, 400, 400, 400, 400, 400]
    assert ask(server, "PUT", "/vectors/path", json={"file": "calm.safetensors"}).status_code == 400
    assert ask(server, "DELETE", "/vectors/path").status_code == 200


BAD = {
    "empty": b"",
    "pickle": pickle.dumps({"layers.1.post_block": [0.0]}),
    "a site that is not steered": file_of(1, layer=9),
    "another width": file_of(1, width=8),
    "another name": save({"weights": vector(1)}),
    "cut": file_of(1)[:40],
    "no number": save({"layers.1.post_block": torch.full((engines.WIDTH,), float("nan"))}),
}


@pytest.mark.behaviour(80)
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, server: Server) -> None:
    answer = ask(server, "PUT", "/vectors/bad", content=BAD[name])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_too_large_an_upload_is_refused(server: Server) -> None:
    assert ask(server, "PUT", "/vectors/large", content=bytes((64 << 20) + 1)).status_code == 413


@pytest.mark.behaviour(54, 80)
def test_global_steering_reaches_every_request_and_goes_again(server: Server) -> None:
    """The prefix cache holds nothing of the former steering."""
    plain, moved = server.said(prompt=LONG), json.dumps(at(2, vector(9, 2.0)))
    steered, own = server.said(moved, LONG), json.dumps(at(1, vector(3, 2.0)))
    both = {"base": {"post_block": {"1": vector(3, 2.0).tolist(), "2": vector(9, 2.0).tolist()}}}
    together = server.said(json.dumps(both), LONG)
    assert len({plain, steered, together}) == 3
    for _ in range(2):
        assert ask(server, "PUT", "/global", content=moved).status_code == 200
        assert server.said(prompt=LONG) == steered
        assert server.said(own, LONG) == together
        assert ask(server, "GET", "").json()["global"]["prefill"]
        assert ask(server, "DELETE", "/global").status_code == 200
        assert server.said(prompt=LONG) == plain
    for bad in ('{"base": 3}', "[]", "{", '{"tokens": {"generated": true}, "base": {}}', '{"named": ["nobody"]}'):
        assert ask(server, "PUT", "/global", content=bad).status_code in (400, 404)
    assert server.said(prompt=LONG) == plain


@pytest.mark.behaviour(56)
def test_global_steering_changes_under_running_requests(server: Server) -> None:
    """More configurations than rows, all of them under way: none is lost, and nothing stays behind."""
    moved = [json.dumps(at(1, vector(60 + n, 2.0))) if n % 2 else None for n in range(12)]
    before = [server.said(asked, tokens=48) for asked in moved]
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(server.said, asked, tokens=48) for asked in moved]
        for n in range(3):
            assert ask(server, "PUT", "/global", content=json.dumps(at(2, vector(80 + n, 2.0)))).status_code == 200
        assert ask(server, "DELETE", "/global").status_code == 200
        assert all(each.result(timeout=60) for each in running)
    assert [server.said(asked, tokens=48) for asked in moved] == before
    assert ask(server, "GET", "").json()["workers"][0]["requests"] == 0


def test_captured_rows_come_with_the_answer(server: Server, tmp_path: Path) -> None:
    """By reference in the answer and by a route; what the same request captures twice is the same."""
    found = []
    for _ in range(2):
        asked = json.dumps({**at(1, vector(3)), "capture": {"sites": {"post_block": [0, 2]}, "name": "run 1"}})
        made = server.client.completions.create(
            model=server.client.models.list().data[0].id, prompt=LONG, max_tokens=4, temperature=0,
            extra_body={"vllm_xargs": {"steer": asked}},
        )  # fmt: skip
        name = made.kv_transfer_params["steer_capture"]["name"]
        assert name.startswith("run-1-")
        assert ask(server, "GET", f"/captures/{name}", key=None).status_code == 401
        answer = wait_for(server, name)
        (tmp_path / "rows").write_bytes(answer.content)
        found.append(read(tmp_path / "rows", 73))
        assert ask(server, "DELETE", f"/captures/{name}").status_code == 200
        assert ask(server, "GET", f"/captures/{name}").status_code == 404
    first, second = found
    assert first.status == "complete"
    assert first.positions.tolist() == list(range(73))
    assert set(first.values) == {"layers.0.post_block", "layers.2.post_block"}
    for site, values in first.values.items():
        assert torch.equal(values, second.values[site])
    assert ask(server, "GET", "/captures/..%2F..%2Fetc").status_code in (400, 404)


def wait_for(server: Server, name: str) -> Any:
    for _ in range(100):
        answer = ask(server, "GET", f"/captures/{name}")
        if answer.status_code == 200:
            return answer
        time.sleep(0.05)
    raise AssertionError(answer.text)


def test_metrics_stand_beside_vllms(server: Server) -> None:
    import httpx

    server.said(json.dumps(at(1, vector(1))))
    with pytest.raises(Exception, match="400"):
        server.said('{"named": 3}')
    found = httpx.get(f"{server.address}/metrics", timeout=30).text
    numbers = {}
    for line in found.splitlines():
        if line.startswith(("steer_compile", "vllm:")):
            name, _, value = line.rpartition(" ")
            numbers[name] = float(value)
    assert any(name.startswith("vllm:") for name in numbers)
    assert numbers["steer_compile_requests_total"] >= 1
    assert sum(v for n, v in numbers.items() if n.startswith("steer_compile_refused_requests_total")) >= 1
    assert numbers["steer_compile_check_seconds_count"] >= 1
