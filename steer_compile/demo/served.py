"""The demo model behind vLLM's OpenAI server, steered by request: ``make demo-vllm``.

Starts the real server on loopback, registers a style direction by upload, sends steered and unsteered requests at the
same time through the official client, shows the texts side by side with the server's metrics, and stops it.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from steer_compile import SteerSpec
from steer_compile.demo.bytes_tokenizer import BOS_ID, PAD_ID, ByteTokenizer
from steer_compile.demo.inputs import bundled_model, read_styles, style_scorer
from steer_compile.demo.run import Styles
from steer_compile.vllm.settings import cli_config

LAYER, STRENGTH, TOKENS, PATIENCE = 2, 2.5, 60, 180
ASKS = {
    "unsteered": None,
    "scripture": f'{{"named": [["style", {-STRENGTH}]]}}',
    "code": f'{{"named": [["style", {STRENGTH}]]}}',
    "code, decoded tokens": f'{{"named": [["style", {STRENGTH}]], "tokens": {{"generated": true}}}}',
}


def with_tokenizer(folder: Path, target: Path) -> None:
    """The model's files, and its bytes as a tokenizer that transformers loads: id 0 to 255 is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (target / name).symlink_to(folder / name)
    # The byte-level alphabet shows printable bytes as themselves, and the others as characters from 256 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    words = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
    made = Tokenizer(models.BPE(words | {"<edge>": BOS_ID, "<pad>": PAD_ID}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<edge> $A", special_tokens=[("<edge>", BOS_ID)])
    names = {"bos_token": "<edge>", "eos_token": "<edge>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(target)


def direction(folder: Path, styles: Styles) -> torch.Tensor:
    """Difference of the styles' mean streams behind a layer, by the uncompiled model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def mean(texts: Sequence[str]) -> torch.Tensor:
        ids, mask = ByteTokenizer().batch(texts)
        with torch.no_grad():
            streams = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[LAYER + 1]
        weight = mask.unsqueeze(-1)
        average: torch.Tensor = ((streams * weight).sum(1) / weight.sum(1)).mean(0)
        return average

    positive, negative = styles.passages
    return mean(positive) - mean(negative)


@dataclass(frozen=True)
class Served:
    """A running server."""

    address: str
    key: str

    def call(self, method: str, path: str, data: bytes | None = None) -> str:
        """The answer of a route."""
        request = urllib.request.Request(f"{self.address}{path}", data, {"X-Steering-Key": self.key}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[Served]:
    """vLLM's server of a model on loopback, ended behind the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}", secrets.token_hex(16))
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name",
        "demo", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512",
        "--max-num-seqs", "16", "--max-num-batched-tokens", "512",
        "--additional-config", cli_config(SteerSpec(steer=("post_block",), rows=16)),
    ]  # fmt: skip
    settings = {
        "VLLM_PLUGINS": "steer_compile,steer_compile_endpoints", "STEER_COMPILE_API_KEY": served.key,
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(server, served, log)
        yield served
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], served: Served, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended while it started; its log is {log}")
        try:
            served.call("GET", "/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit(f"the server did not start within {PATIENCE} seconds; its log is {log}")


def texts(served: Served, prompts: Sequence[str]) -> dict[str, list[str]]:
    """What the server says to each prompt for each of `ASKS`, all requests at the same time."""
    import openai

    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=120)

    def one(pair: tuple[str, str | None]) -> str:
        prompt, asked = pair
        extra = {} if asked is None else {"extra_body": {"vllm_xargs": {"steer": asked}}}
        made: Any = client.completions.create(model="demo", prompt=prompt, max_tokens=TOKENS, temperature=0, **extra)
        return str(made.choices[0].text)

    pairs = [(prompt, asked) for asked in ASKS.values() for prompt in prompts]
    with ThreadPoolExecutor(len(pairs)) as pool:
        said = list(pool.map(one, pairs))
    return {name: said[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(ASKS)}


def show(out: Console, prompts: Sequence[str], said: dict[str, list[str]]) -> dict[str, float]:
    """Texts side by side; returns the mean style of each column, above 0 for code."""
    score = style_scorer(bundled_model())
    assert score is not None
    table = Table(title="The same prompts, all requests in one batch", show_lines=True)
    for name in ("prompt", *ASKS):
        table.add_column(name, overflow="fold", ratio=1 if name == "prompt" else 3)
    for i, prompt in enumerate(prompts):
        table.add_row(*[repr(text)[1:-1] for text in (prompt, *(said[name][i] for name in ASKS))])
    means = {name: sum(score(said[name])) / len(prompts) for name in ASKS}
    table.add_row("style (code > 0)", *[f"{means[name]:+.3f}" for name in ASKS])
    out.print(table)
    return means


def main() -> int:
    """Run the demo; 1 where steering does not do what it says."""
    out = Console(record=True, width=150)
    folder = Path("out/demo-vllm")
    folder.mkdir(parents=True, exist_ok=True)
    model = bundled_model()
    styles = read_styles(model, None, None, 64, 4)
    with tempfile.TemporaryDirectory() as made:
        with_tokenizer(model, Path(made))
        vector = direction(model, styles)
        out.print("starting vLLM's server on loopback (about a minute on a CPU)")
        with serving(Path(made), folder / "server.log") as served:
            data = save({f"layers.{LAYER}.post_block": vector})
            out.print("PUT /v1/steering/vectors/style", served.call("PUT", "/v1/steering/vectors/style", data))
            said = texts(served, styles.prompts)
            again = texts(served, styles.prompts)
            means = show(out, styles.prompts, said)
            lines = [x for x in served.call("GET", "/metrics").splitlines() if x.startswith("steer_compile")]
            out.print("\n".join(x for x in lines if "bucket" not in x and "created" not in x))
            out.print("GET /v1/steering", served.call("GET", "/v1/steering"))
    same = said == again
    ordered = means["scripture"] < means["unsteered"] < means["code"]
    out.print(f"the same again: {same}; scripture < unsteered < code: {ordered}")
    (folder / "transcript.txt").write_text(out.export_text())
    out.print(f"transcript: {folder / 'transcript.txt'}, the server's log: {folder / 'server.log'}")
    return 0 if same and ordered else 1


if __name__ == "__main__":
    sys.exit(main())
