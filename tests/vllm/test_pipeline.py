"""Pipeline stages in processes of their own, on the CPU, against the whole model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm import engines
from tests.vllm.pipelines import hold_against, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs test_two_gpus.py holds more"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stages_give_what_the_whole_model_gives(name: str, models: Path) -> None:
    """Llama hands its stream on in two parts, GPT-2 as one value."""
    model = engines.saved(name, models)
    hold_against(run(model, 1, 1), run(model, 2, 1))
