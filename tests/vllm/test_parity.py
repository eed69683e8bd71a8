"""Steering through vLLM equals the same edit by a forward hook on the Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from tests.vllm import engines

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
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
        assert engines.logprobs(output) == pytest.approx(numbers, abs=2e-4)
    assert len({tuple(t) for t in engines.texts(outputs)}) >= 3  # the vectors do something
