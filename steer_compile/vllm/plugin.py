"""Entry point of the group ``vllm.general_plugins``: vLLM calls `register` in each of its processes."""

from __future__ import annotations

from steer_compile.errors import SteerError
from steer_compile.vllm.adapters import Adapter

_installed: list[str] = []


def register() -> None:
    """Install the adapters, once in a process. An engine without a spec is untouched by them.

    Raises:
        SteerError: this version of vLLM lacks something that an adapter needs; all are named, none is installed.
    """
    if _installed:
        return
    try:
        adapters = _adapters()
    except ImportError as error:
        raise _unfit(str(error)) from error
    missing = [f"{a.__name__.rpartition('.')[2]}: {what}" for a in adapters if (what := a.missing())]
    if missing:
        raise _unfit("; ".join(missing))
    for adapter in adapters:
        adapter.install()
        _installed.append(adapter.__name__)


def _unfit(what: str) -> SteerError:
    from vllm import __version__

    return SteerError(
        f"steer_compile does not fit vLLM {__version__}: {what}; use vLLM 0.32, or uninstall steer_compile to run "
        "without it"
    )


def _adapters() -> tuple[Adapter, ...]:
    from steer_compile.vllm.adapters import (
        cache_keys,
        compile_path,
        intake,
        runner_v1,
        runner_v2,
        scheduling,
        workers,
    )

    return (compile_path, intake, scheduling, cache_keys, runner_v1, runner_v2, workers)
