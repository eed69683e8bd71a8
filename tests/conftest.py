"""What every test runs under: no network, fresh compile caches, two threads, and Dynamo reset after each test."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps

import pytest
import torch

_SESSION_FOLDER = pytest.StashKey[str]()

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.mkdtemp(prefix="steer-compile-tests-")
    config.stash[_SESSION_FOLDER] = folder
    os.environ.update(_OFFLINE)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    os.environ["MPLCONFIGDIR"] = os.path.join(folder, "matplotlib")
    torch.set_num_threads(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_SESSION_FOLDER], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what no computation should read: NaN, or the largest value of the type."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes uninitialised memory poisonous, so that code which reads what it never wrote gives NaN.

    For code that runs uncompiled: a compiler would trace the fill into the graph.
    """

    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(function)
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            return _poison(function(*args, **kwargs))

        return call

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
