"""The plugin in a version of vLLM that it does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


def lacking() -> Any:
    return SimpleNamespace(__name__="adapters.scheduling", missing=lambda: "Scheduler has no method schedule")


def absent() -> Any:
    raise ImportError("cannot import name 'Scheduler'")


@pytest.mark.parametrize("adapters", [lambda: (lacking(),), absent])
def test_only_engines_with_a_spec_are_stopped(adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    from steer_compile.vllm import plugin

    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__)
    monkeypatch.setattr(plugin, "_installed", [])
    monkeypatch.setattr(plugin, "_adapters", adapters)
    plugin.register()
    plugin.register()
    VllmConfig()
    with pytest.raises(ValueError, match=r"does not fit vLLM .*Scheduler.*use vLLM 0\.26 to 0\.32"):
        VllmConfig(additional_config={"steer_compile": {"steer": ["post_block"]}})
