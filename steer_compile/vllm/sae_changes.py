"""`SAEChanges`: autoencoders that one worker attaches and detaches between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from steer_compile.errors import SAEError, SteerError
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.sae_tables import Attached
from steer_compile.vllm.autoencoders import sae_specs


class SAEChanges:
    """Each change has a number, by which it is taken back where another worker refuses it.

    A refusal is an answer, "" for none: where a worker raises, vLLM does not wait for the answers of the others.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._last: tuple[int, Callable[[], object]] | None = None

    def attach(self, number: int, data: Mapping[str, Any]) -> str:
        """Load one of `Held.to_data` at the places that the front end gave it; returns why it cannot be."""
        self._last = None
        try:
            made = self._registry.saes.adopt(_read(data))
        except (SteerError, OSError, RuntimeError) as error:  # files, and memory of the device
            return str(error)
        self._last = number, partial(self._registry.saes.detach, made.name)
        return ""

    def detach(self, number: int, name: str) -> str:
        """Give its room back; returns why that cannot be."""
        self._last = None
        try:
            former = self._registry.saes.get(name)
            self._registry.saes.detach(name)
        except SteerError as error:
            return str(error)
        self._last = number, partial(self._registry.saes.adopt, former)
        return ""

    def undo(self, number: int) -> None:
        """Take a change back where it was made."""
        if self._last is not None and self._last[0] == number:
            self._last[1]()
            self._last = None

    def keep(self, number: int) -> None:
        """A change is in all workers: what would take it back, as weights that went, is no longer held."""
        if self._last is not None and self._last[0] == number:
            self._last = None

    def users(self, name: str) -> int:
        """Rows that use an autoencoder."""
        return self._registry.saes.users(name)


def _read(data: Mapping[str, Any]) -> Attached:
    (spec,) = sae_specs({data["name"]: data["spec"]})
    sae = spec.read()
    if sae.digest != data["digest"]:
        raise SAEError(
            f"{sae.source or spec.path}: the autoencoder {spec.name!r} has the digest {sae.digest[:12]} on this worker "
            f"and {data['digest'][:12]} where it was checked; give all machines the same files"
        )
    if sae.site is None:
        raise SAEError(f"{sae.source}: the autoencoder {spec.name!r} does not say which site it belongs to; give site")
    return Attached(spec.name, sae, sae.site, spec.features, tuple(data["slots"]), data["whole"])
