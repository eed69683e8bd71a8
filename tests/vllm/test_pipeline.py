"""Pipeline stages in processes of their own, on the CPU, against the whole model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer_compile import HookSelection, SteerSpec
from steer_compile.errors import SiteNotFound
from tests.vllm import engines
from tests.vllm.pipelines import hold_against, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs test_two_gpus.py holds more"),
]


@pytest.mark.behaviour(82)
@pytest.mark.parametrize(("name", "more"), [("llama", []), ("gpt2", []), ("llama", ["narrow"])])
def test_stages_give_what_the_whole_model_gives(name: str, more: list[str], models: Path) -> None:
    """Llama hands its stream on in two parts, GPT-2 as one value."""
    model = engines.saved(name, models)
    hold_against(run(model, 1, 1, *more), run(model, 2, 1, *more))


@pytest.mark.behaviour(77, 81)
def test_captured_rows_of_stages_are_merged(models: Path, tmp_path: Path) -> None:
    """Every stage writes its own layers, and the reader gives those of the whole model."""
    model, folders = engines.saved("llama", models), [tmp_path / "whole", tmp_path / "stages"]
    for stages, folder in enumerate(folders, 1):
        folder.mkdir()
        run(model, stages, 1, f"capture={folder}")
    whole, found = (torch.load(folder / "found.pt", weights_only=True) for folder in folders)
    assert len(whole) == len(found) == 3
    for one, other in zip(whole, found, strict=True):
        assert one.keys() == other.keys()
        assert "layers.0.post_attn" in one or "layers.3.post_block.mean" in one
        for name, numbers in one.items():
            if name != "steps":  # a pipeline has several steps under way
                torch.testing.assert_close(other[name], numbers, atol=engines.TOLERANCE, rtol=engines.TOLERANCE)


@pytest.mark.behaviour(81)
def test_what_no_stage_has_is_refused_before_the_engine_starts(models: Path) -> None:
    model = engines.saved("llama", models)
    with pytest.raises(SiteNotFound, match=r"no site layers\.9\.post_block: the model has layers 0 to 3"):
        engines.engine(model, SteerSpec(steer=[HookSelection("post_block", [9])]), pipeline_parallel_size=2)
