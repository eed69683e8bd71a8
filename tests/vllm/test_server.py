"""The OpenAI server in processes of its own, on loopback, driven by the official client."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_compile import SteerSpec
from steer_compile.vllm.settings import cli_config
from tests import _tree
from tests.vllm import engines

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

PROMPT = " ".join(f"t{i}" for i in engines.PROMPT)


def with_words(folder: Path) -> None:
    """A tokenizer whose words are the numbers of tokens: ``t0 t1 ...``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(engines.VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="vLLM brings it")
    folder = engines.saved("llama", models)
    with_words(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "256", "--additional-config", cli_config(SteerSpec(steer=("post_block",), rows=8)),
    ]  # fmt: skip
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, cwd=_tree.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(server, f"http://127.0.0.1:{port}/health")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait(server: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server ended while it started"
        try:
            urllib.request.urlopen(address, timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the server did not start within 150 seconds")


def said(client: Any, steering: object = None) -> str:
    extra = {} if steering is None else {"extra_body": {"vllm_xargs": {"steer": steering}}}
    model = client.models.list().data[0].id
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, **extra)
    return str(made.choices[0].text)


def test_a_request_is_steered_and_the_next_one_is_not(client: Any) -> None:
    plain, moved = said(client), engines.at(1, engines.vector(1))
    steered = said(client, json.dumps(moved))
    assert steered != plain == said(client, json.dumps({**moved, "scale": 0.0})) == said(client)


def test_rows_of_finished_requests_are_free_again(client: Any) -> None:
    """Each takes two of the eight rows, and the engine is idle between them."""
    answers = [said(client, json.dumps(engines.at(1, engines.vector(40 + n, 2.0)))) for n in range(12)]
    assert len(set(answers)) > 6


def test_malformed_steering_is_answered_by_400_and_nothing_dies(client: Any) -> None:
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
        '{"base": {"post_block": {"1": [1.0, 1' + "0" * 400 + "]}}}",
    ]  # fmt: skip
    for _ in range(2000):
        text = draw.choice(pieces)
        cut = text[: draw.randrange(len(text) + 1)] if draw.random() < 0.3 else text
        try:
            said(client, cut)
        except openai.APIConnectionError:
            raise AssertionError(f"the server hung up on {cut!r}") from None
        except openai.APIStatusError as error:
            answers.append(error.status_code)
        else:
            answers.append(200)  # "{}" and "null" ask for nothing
    assert set(answers) <= {200, 400}
    assert answers.count(400) > 1500
    assert said(client) == said(client)
