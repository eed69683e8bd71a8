"""Pipeline stages in processes of their own, on the CPU, against the whole model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer_compile import HookSelection, SteerSpec
from steer_compile.errors import LoweringError, SiteNotFound
from tests.vllm import engines
from tests.vllm.pipelines import hold_against, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs test_two_gpus.py holds more"),
]


@pytest.mark.parametrize(("name", "more"), [("llama", []), ("gpt2", []), ("llama", ["narrow"])])
def test_stages_give_what_the_whole_model_gives(name: str, more: list[str], models: Path) -> None:
    """Llama hands its stream on in two parts, GPT-2 as one value."""
    model = engines.saved(name, models)
    hold_against(run(model, 1, 1, *more), run(model, 2, 1, *more))


def test_what_no_stage_has_is_refused_before_the_engine_starts(models: Path, tmp_path: Path) -> None:
    model = engines.saved("llama", models)
    with pytest.raises(LoweringError, match="the stages of a pipeline have some of its layers each"):
        engines.engine(model, SteerSpec(capture=("post_block",)), capture_dir=str(tmp_path), pipeline_parallel_size=2)
    with pytest.raises(SiteNotFound, match=r"no site layers\.9\.post_block: the model has layers 0 to 3"):
        engines.engine(model, SteerSpec(steer=[HookSelection("post_block", [9])]), pipeline_parallel_size=2)
