"""A tiny Llama and a spec for it, for the commands that look at graphs.

The package is imported inside of fixtures: this file may be read before Triton's interpreter is chosen.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    from tests.cli._commands import graphs_read_once

    with graphs_read_once():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of three layers, with weights."""
    from tests.cli._commands import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    from steer_compile import HookSelection, SteerSpec

    file = tmp_path / "spec.json"
    steer = (HookSelection("post_block", [0, 2], ("add", "clamp")), HookSelection("mlp_out", [1]))
    file.write_text(SteerSpec(steer=steer, capture=(HookSelection("post_attn", [1]),), max_tokens=64).to_json())
    return file
