"""Autoencoders that come and go while an engine runs: requests have the tokens of an engine that started with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import sae
from steer_compile.errors import SAEError, UnknownName
from steer_compile.sae import FeatureClamp, JumpReLU
from steer_compile.vllm import attach_sae, attached_saes, detach_sae
from tests.sae._weights import parts
from tests.vllm import engines
from tests.vllm.test_features import CLAMPS, COUNT, SPEC, WIDTH, asked, made

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

LONG = [(7 * i * i + 3 * i) % 500 + 5 for i in range(70)]
OPTIONS = {"block_size": 32, "max_num_batched_tokens": 256}
REQUESTS = [None, asked("parts"), asked("whole", [], mode="reconstruct"), asked("whole"), None]


def loud(seed: int) -> sae.SAE:
    return made(JumpReLU(parts(seed, WIDTH, COUNT)["threshold"]), seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    sae.save([loud(3), made(sae.TopK(12), 4)], folder / "both")
    sae.save(loud(9), folder / "another")
    return folder


def said(llm: Any, requests: list[Any]) -> list[list[int]]:
    return engines.texts(engines.generated(llm, requests, prompts=[LONG] * len(requests)))


def of_the_prompt(llm: Any) -> list[float]:
    """What is said where the prompt alone is steered, all of which is cached but for its end."""
    (output,) = engines.generated(llm, [asked("parts", phase="prefill")], prompts=[LONG])
    return engines.logprobs(output)


def compiled() -> dict[str, int]:
    """How many graphs Dynamo has made in this process, and how many frames it has looked at."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "frames": counters["frames"]["total"]}


def added(llm: Any, name: str, request: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False, extra_args={"steer": request})
    llm.llm_engine.add_request(name, {"prompt_token_ids": engines.PROMPT}, params)


def test_they_come_and_go_while_the_engine_runs(models: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: nothing is compiled, and a cached block is of the weights that it was computed with."""
    path = engines.saved("llama", models)
    saes = {
        "parts": {"path": str(root / "both"), "sae": "sae3", "features": [20, 3, 8]},
        "whole": {"path": str(root / "both"), "sae": "sae4", "whole": True},
    }
    llm = engines.engine(path, SPEC, saes=saes, **OPTIONS)
    expected = said(llm, REQUESTS)
    del llm
    llm = engines.engine(path, SPEC, saes={"parts": {"path": str(root / "another"), "features": [20, 3, 8]}}, **OPTIONS)
    (other,), early = said(llm, [asked("parts")]), of_the_prompt(llm)
    del llm
    assert len({*map(tuple, expected), tuple(other)}) == len(REQUESTS)

    llm = engines.engine(path, SPEC, vector_root=str(root), **OPTIONS)
    assert said(llm, [None]) == expected[:1]
    with pytest.raises(ValueError, match="no autoencoder 'parts' is attached; attached are none"):
        said(llm, [asked("parts")])
    before = compiled()
    line = attach_sae(llm, "parts", "both", [20, 3, 8], sae="sae3")
    attach_sae(llm, "whole", Path("both"), whole=True, sae="sae4")
    assert line["digest"] == loud(3).digest
    assert [each["name"] for each in attached_saes(llm)["saes"]] == ["parts", "whole"]
    for _ in range(2):  # the second time from cached blocks
        assert said(llm, REQUESTS) == expected
    former = of_the_prompt(llm)
    assert former != pytest.approx(early, abs=100 * engines.TOLERANCE)
    with pytest.raises(ValueError, match="feature 5 of 'parts' is not loaded"):
        said(llm, [asked("parts", [FeatureClamp(5, 1.0)])])

    in_use(llm)
    detach_sae(llm, "parts")
    with pytest.raises(ValueError, match="no autoencoder 'parts' is attached; attached are whole"):
        said(llm, [asked("parts")])
    with pytest.raises(UnknownName, match="attached are whole"):
        detach_sae(llm, "parts")
    assert said(llm, REQUESTS[2:]) == expected[2:]
    attach_sae(llm, "parts", "another", [20, 3, 8])
    assert of_the_prompt(llm) == pytest.approx(early, abs=engines.TOLERANCE)  # not from blocks of the former
    assert said(llm, [asked("parts")]) == [other]
    detach_sae(llm, "parts")
    attach_sae(llm, "parts", "both", [20, 3, 8], sae="sae3")
    assert of_the_prompt(llm) == pytest.approx(former, abs=engines.TOLERANCE)
    assert said(llm, REQUESTS) == expected
    refused_on_the_way(llm, monkeypatch)
    assert compiled() == before


def in_use(llm: Any) -> None:
    """Requests that wait and requests that run hold it; those that end or are aborted do not."""
    added(llm, "first", asked("parts", CLAMPS[:1]))
    with pytest.raises(SAEError, match="'parts' at layers.1.post_block is in use by 1 request; let it end or abort"):
        detach_sae(llm, "parts")
    llm.llm_engine.step()
    added(llm, "second", asked("parts", CLAMPS[1:]))
    added(llm, "third", asked("whole"))
    with pytest.raises(SAEError, match="in use by 2 requests"):
        detach_sae(llm, "parts")
    llm.llm_engine.abort_request(["second"])
    with pytest.raises(SAEError, match="in use by 1 request;"):
        detach_sae(llm, "parts")
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def refused_on_the_way(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was checked is refused where its autoencoder goes before it is handed on."""
    processor = llm.llm_engine.input_processor
    inner = processor.process_inputs

    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        request = inner(*args, **kwargs)
        detach_sae(llm, "parts")
        attach_sae(llm, "parts", "another", [20, 3, 8])
        return request

    with monkeypatch.context() as patch:
        patch.setattr(processor, "process_inputs", process_inputs)
        with pytest.raises(ValueError, match="was detached while the request was taken in"):
            added(llm, "late", asked("parts"))
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_notebook_may_attach_too(models: Path, root: Path) -> None:
    """Its thread runs an event loop."""
    import asyncio

    llm = engines.engine(engines.saved("llama", models), SPEC, vector_root=str(root), **OPTIONS)

    async def cell() -> list[str]:
        attach_sae(llm, "parts", "both", [3], sae="sae3")
        return [each["name"] for each in attached_saes(llm)["saes"]]

    assert asyncio.run(cell()) == ["parts"]
    assert torch.is_inference_mode_enabled() is False
    assert len(said(llm, [asked("parts", CLAMPS[:1])])) == 1


@pytest.mark.slow
def test_two_ranks_change_together_or_not_at_all(models: Path, root: Path) -> None:
    """Tensor parallel ranks in processes of their own, one of which refuses in between."""
    path, found = engines.saved("llama", models), {}
    for ranks in (1, 2):
        insecure = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # one rank is made to differ by a function
        found[ranks] = engines.told(ranks, ["tests.vllm.sae_processes", str(path), str(ranks), str(root)], insecure)
    (plain, steered), refusal, again = found[2]
    assert plain != steered
    assert found[1] == [[plain, steered], "", [plain, steered]]
    assert again == [plain, steered]
    assert "a worker of the engine refuses the change, which was taken back in all" in refusal
    assert "are those of 'stray'" in refusal
