"""The OpenAI server in processes of its own, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_compile import SteerSpec
from steer_compile.vllm.settings import cli_config
from tests import _tree
from tests.vllm import engines

KEY = "a key of the operator's"
PROMPT = " ".join(f"t{i}" for i in engines.PROMPT)


@dataclass(frozen=True)
class Server:
    """Where it listens, the folder whose vector files it may read, and OpenAI's client of it."""

    address: str
    root: Path
    client: Any

    def said(self, steering: object = None, prompt: str = PROMPT, tokens: int = 6) -> str:
        """What it says next, steered or not."""
        extra = {} if steering is None else {"extra_body": {"vllm_xargs": {"steer": steering}}}
        model = self.client.models.list().data[0].id
        made = self.client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **extra)
        return str(made.choices[0].text)


def with_words(folder: Path) -> None:
    """A tokenizer whose words are the numbers of tokens: ``t0 t1 ...``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(engines.VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )


@contextmanager
def serving(folder: Path, root: Path) -> Iterator[Server]:
    """A server of a model with words, with this package's routes and a key for changes."""
    import openai

    with_words(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    captures = root / "captures"
    captures.mkdir()
    config = cli_config(
        SteerSpec(
            steer=("post_block",), capture=("post_block",), rows=8, overrides=4, features=4,
            ops=("add", "tier", "monitor", "row_monitor", "sae"),
        ),
        vector_root=root, capture_dir=captures, controllers={"idle": {"class": "tests.vllm.controllers:Idle"}},
    )  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "256", "--block-size", "32", "--additional-config", config,
    ]  # fmt: skip
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_tree.ROOT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_PLUGINS": "steer_compile,steer_compile_endpoints",
        "STEER_COMPILE_API_KEY": KEY,
    }
    server = subprocess.Popen(command, cwd=_tree.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait(server, f"{address}/health")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        yield Server(address, root, client)
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
