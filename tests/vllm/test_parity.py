"""Steering through vLLM equals the same edit by a forward hook on the Hugging Face model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from tests import _tree
from tests.vllm import engines
from tests.vllm.processes import TOKENS
from tests.vllm.transformers_backend import STEERING

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


def printed(text: str) -> Any:
    """The line of JSON among what vLLM's processes print."""
    return json.loads([line for line in text.splitlines() if line.startswith("[[")][-1])


# Experts first: what vLLM sets up for a process with its first engine is without them otherwise.
@pytest.mark.behaviour(83)
@pytest.mark.parametrize("name", ["mixtral", "llama", "qwen3", "gemma3", "gpt2"])
def test_tokens_and_probabilities_are_those_of_a_forward_hook(name: str, models: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = engines.saved(name, models)
    judge: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    llm = engines.engine(path, SteerSpec(steer=engines.HOOKS, rows=8))
    vector = engines.vector(1)
    steering = [
        engines.at(1, vector), engines.at(1, vector, "decode"), {**engines.at(1, vector), "scale": -2.0}, None,
        engines.at(3, vector),
    ]  # fmt: skip
    wanted = [
        (1, vector, False),
        (1, vector, True),
        (1, -2 * vector, False),
        (0, 0 * vector, False),
        (3, vector, False),
    ]
    outputs = engines.generated(llm, steering)
    for output, (layer, moved, decode_only) in zip(outputs, wanted, strict=True):
        tokens, numbers = engines.judged(judge, output, moved, layer, decode_only)
        assert list(output.token_ids) == tokens
        assert engines.logprobs(output) == pytest.approx(numbers, abs=engines.TOLERANCE)
    assert len({tuple(t) for t in engines.texts(outputs)}) >= 3  # the vectors do something


def test_the_transformers_backend_is_steered_as_the_native_model_is(models: Path) -> None:
    path = engines.saved("llama", models)
    command = [sys.executable, "-m", "tests.vllm.transformers_backend", str(path)]
    done = subprocess.run(command, cwd=_tree.ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    native = engines.engine(path, SteerSpec(steer=engines.HOOKS, rows=8))
    expected = engines.texts(engines.generated(native, STEERING))
    assert printed(done.stdout) == expected
    assert len({tuple(t) for t in expected}) == len(STEERING)


@pytest.mark.behaviour(82)
@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, []), pytest.param(2, [], marks=pytest.mark.slow), pytest.param(1, ["ngram"], marks=pytest.mark.slow)],
)
def test_processes_and_ranks_give_the_same(ranks: int, more: list[str], models: Path) -> None:
    """An engine core of its own, and tensor parallel workers: the site is behind the all-reduce, rows are alike.

    With drafts of an n-gram proposer, rows follow their tokens: some drafts are taken, others are computed again.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    path = engines.saved("llama", models)
    native = engines.engine(path, SteerSpec(steer=engines.HOOKS, rows=8))
    expected = engines.texts(engines.generated(native, STEERING, TOKENS))
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks])}
    if "ngram" in more:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the runner V2 has no such drafts
    command = [sys.executable, "-m", "tests.vllm.processes", str(path), str(ranks), *more]
    done = subprocess.run(command, cwd=_tree.ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert printed(done.stdout) == expected
