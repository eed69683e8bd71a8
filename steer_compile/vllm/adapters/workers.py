"""Workers: methods that vLLM's collective calls find by name, for steering that every request gets."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from steer_compile.vllm.adapters.runners import live_of
from steer_compile.vllm.capture_files import RESULT
from steer_compile.vllm.site_data import Former, read
from steer_compile.vllm.transport import received

SET_EVERYONE, STATE = "steer_compile_set_everyone", "steer_compile_state"
SET_SITES, RESTORE_SITES = "steer_compile_set_sites", "steer_compile_restore_sites"
DYNAMIC, SUBMIT, RENAME = "steer_compile_dynamic", "steer_compile_submit", "steer_compile_rename"
ATTACH_SAE, DETACH_SAE = "steer_compile_attach_sae", "steer_compile_detach_sae"
UNDO_SAE, KEEP_SAE = "steer_compile_undo_sae", "steer_compile_keep_sae"
SAE_USERS = "steer_compile_sae_users"


def missing() -> str:
    """Workers derive from one class."""
    return "" if "load_model" in vars(WorkerBase) else "WorkerBase has no load_model"


def install() -> None:
    """Add the methods."""
    for name, method in {
        SET_EVERYONE: set_everyone, STATE: state, SET_SITES: set_sites, RESTORE_SITES: restore_sites,
        DYNAMIC: dynamic, SUBMIT: submit, RENAME: rename, RESULT: capture_result,
        ATTACH_SAE: attach_sae, DETACH_SAE: detach_sae, UNDO_SAE: undo_sae, KEEP_SAE: keep_sae,
        SAE_USERS: sae_users,
    }.items():  # fmt: skip
        setattr(WorkerBase, name, method)


def set_everyone(self: Any, data: dict[str, Any]) -> None:
    """Replace what every request gets, between two steps."""
    live = live_of(self.model_runner)
    if live is not None:
        live.rows.set_everyone(received(data)[0])


def state(self: Any) -> dict[str, int]:
    """Requests with rows of their own, rows in use and rows in all."""
    live = live_of(self.model_runner)
    return {} if live is None else live.rows.state()


def set_sites(self: Any, number: int, data: dict[str, Any]) -> None:
    """Change the tier or a site's monitor, between two steps; `restore_sites` of the number undoes it."""
    live = live_of(self.model_runner)
    if live is not None:
        live.former = number, Former.of(live.rows.registry)
        read(data).set(live.rows.registry)


def restore_sites(self: Any, number: int) -> None:
    """Bring back what sites had before a change, in a worker that has seen it."""
    live = live_of(self.model_runner)
    if live is not None and live.former is not None and live.former[0] == number:
        live.former[1].set(live.rows.registry)
        live.former = None


def attach_sae(self: Any, number: int, data: dict[str, Any]) -> str:
    """Attach an autoencoder, between two steps; why it cannot be, "" where it was. `undo_sae` of the number undoes
    it."""
    live = live_of(self.model_runner)
    return "" if live is None else live.saes.attach(number, data)


def detach_sae(self: Any, number: int, name: str) -> str:
    """Detach an autoencoder; answers as `attach_sae`."""
    live = live_of(self.model_runner)
    return "" if live is None else live.saes.detach(number, name)


def undo_sae(self: Any, number: int) -> None:
    """Take a change of autoencoders back, in a worker that made it."""
    live = live_of(self.model_runner)
    if live is not None:
        live.saes.undo(number)


def keep_sae(self: Any, number: int) -> None:
    """All workers have a change of autoencoders."""
    live = live_of(self.model_runner)
    if live is not None:
        live.saes.keep(number)


def sae_users(self: Any, name: str) -> int:
    """Rows that use an autoencoder."""
    live = live_of(self.model_runner)
    return 0 if live is None else live.saes.users(name)


def dynamic(self: Any) -> dict[str, Any]:
    """Status of dynamic steering, {} where the engine has none. It reads numbers of the host and waits for nothing."""
    live = live_of(self.model_runner)
    return {} if live is None or live.dynamic is None else live.dynamic.status()


def capture_result(self: Any, consumer: str, name: str) -> dict[str, str]:
    """What became of a request's rows in a consumer, {} in a worker that has no consumers."""
    live = live_of(self.model_runner)
    return {} if live is None or live.writer is None else live.writer.consumers.results(consumer, name)


def submit(self: Any, actions: list[dict[str, Any]], sets: dict[str, Any]) -> list[bool]:
    """Ask for actions in front of the next step; which of them found room in the queue.

    Args:
        sets: vector sets that they name, as the front end has them.
    """
    live = live_of(self.model_runner)
    return [] if live is None or live.dynamic is None else live.dynamic.submit(actions, sets)


def rename(self: Any, sets: dict[str, Any], gone: list[str]) -> None:
    """Named sets have other content, or are no more."""
    live = live_of(self.model_runner)
    if live is not None and live.dynamic is not None:
        live.dynamic.rename(sets, gone)
