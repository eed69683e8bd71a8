"""Entry point of the group ``vllm.general_plugins``: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import functools

from steer_compile.errors import SteerError
from steer_compile.vllm.adapters import Adapter
from steer_compile.vllm.settings import KEY

VERSIONS = "0.26 to 0.32"
"""Versions of vLLM with which the adapters were run."""

_installed: list[str] = []


def register() -> None:
    """Install the adapters, once in a process. An engine without a spec is untouched by them.

    Where this version of vLLM lacks something that an adapter needs, none is installed, and an engine with a spec does
    not start: `SteerError`, which names all that is missing.
    """
    if _installed:
        return
    adapters: tuple[Adapter, ...] = ()
    try:
        adapters = _adapters()
        missing = [f"{a.__name__.rpartition('.')[2]}: {what}" for a in adapters if (what := a.missing())]
    except ImportError as error:
        missing = [str(error)]
    if missing:
        _refuse_specs("; ".join(missing))
        return
    for adapter in adapters:
        adapter.install()
        _installed.append(adapter.__name__)


def _refuse_specs(what: str) -> None:
    """Let engines without a spec be, and stop the others where they read their configuration."""
    from vllm import __version__
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def __post_init__(self: VllmConfig) -> None:
        if KEY in (self.additional_config or {}):
            raise SteerError(
                f"steer_compile does not fit vLLM {__version__}: {what}; use vLLM {VERSIONS}, or leave "
                "additional_config['steer_compile'] out"
            )
        original(self)

    VllmConfig.__post_init__ = __post_init__
    _installed.append("refusal")


def _adapters() -> tuple[Adapter, ...]:
    from steer_compile.vllm.adapters import cache_keys, compile_path, core, intake, outputs, scheduling, workers

    return (compile_path, intake, core, outputs, scheduling, cache_keys, workers)
