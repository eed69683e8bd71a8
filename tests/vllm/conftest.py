"""One process runs all engines of a module; everything that vLLM stores goes to a folder of the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm import engines
from tests.vllm.serving import Server, serving


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_CI_ENV": "1",  # Dynamo and eager operators in place of Inductor: the same graphs, sooner
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import vllm  # noqa: F401  (reads some of them once)

        yield


@pytest.fixture(scope="session")
def server(models: Path, vllm_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(engines.saved("llama", models), tmp_path_factory.mktemp("vectors")) as started:
        yield started
