"""Two GPUs, as pipeline stages or as tensor parallel ranks, against one.

Each engine has processes of its own. The runner V2 is vLLM's default on GPUs; both are run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import engines
from tests.vllm.pipelines import hold_against, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SPLITS = {"stages": (2, 1), "ranks": (1, 2)}


@pytest.fixture(scope="module")
def whole(models: Path, vllm_environment: None) -> dict[str, Any]:
    """What one GPU gives."""
    return run(engines.saved("llama", models), 1, 1)


@pytest.mark.behaviour(51, 82)
@pytest.mark.parametrize("runner", ["V2", "V1"])
@pytest.mark.parametrize("split", SPLITS)
def test_two_gpus_give_what_one_gives(split: str, runner: str, models: Path, whole: dict[str, Any]) -> None:
    found = run(engines.saved("llama", models), *SPLITS[split], VLLM_USE_V2_MODEL_RUNNER=str(int(runner == "V2")))
    hold_against(whole, found)


def test_a_stage_in_which_nothing_is_steered(models: Path) -> None:
    model = engines.saved("llama", models)
    hold_against(run(model, 1, 1, "narrow"), run(model, 2, 1, "narrow"))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_stages_of_other_models_give_what_one_gpu_gives(name: str, models: Path) -> None:
    """GPT-2 hands its stream on as one value, and Gemma 3 has norms of its own on each branch."""
    model = engines.saved(name, models)
    hold_against(run(model, 1, 1), run(model, 2, 1))
