"""`OfferedSAEs`: the autoencoders that requests may name, in the process that takes requests.

Each has a number, which no other one of the process ever has. A request carries the numbers of those that it uses, so
that one of a name is never taken for a later one of the same name, also where it is checked while that changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from steer_compile.errors import UnknownName
from steer_compile.runtime.features import SAESteering
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.sae_places import check_name
from steer_compile.runtime.sae_tables import Attached
from steer_compile.sae.model import SAE
from steer_compile.vllm.autoencoders import SAESpec

_numbers = count(1)
_offered: set[int] = set()


def offered(numbers: Iterable[int]) -> bool:
    """Whether these autoencoders of any engine of this process are still there for requests."""
    return _offered.issuperset(numbers)


@dataclass(frozen=True)
class Held:
    """An autoencoder of the front end.

    Attributes:
        number: that of this one, in this process.
    """

    number: int
    spec: SAESpec
    attached: Attached

    def to_data(self) -> dict[str, Any]:
        """Plain data for `SAEChanges.attach` of a worker."""
        places = {"slots": list(self.attached.slots), "whole": self.attached.whole}
        return {"name": self.spec.name, "spec": self.spec.to_data(), "digest": self.attached.sae.digest, **places}


class OfferedSAEs:
    """Autoencoders by name, beside tables that hold nothing. While one is attached or detached it is not offered."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._held: dict[str, Held] = {}

    def start(self, specs: Iterable[SAESpec]) -> None:
        """Those that the engine loads when it starts; raises as `SAESpec.attach`."""
        for spec in specs:
            self.put(spec, spec.read())
            self.offer(spec.name)

    def check_free(self, name: str) -> None:
        """Raise `SAEError` where a name is taken."""
        check_name(name, self._registry.saes.attached)

    def put(self, spec: SAESpec, made: SAE) -> Held:
        """Find room for one that was read; it is not offered yet.

        Raises:
            SAEError, SiteNotFound, VectorError, TableFull: as `SAESpec.put`.
        """
        held = Held(next(_numbers), spec, spec.put(self._registry, made))
        self._held[spec.name] = held
        return held

    def offer(self, name: str) -> None:
        """From now on requests may name it."""
        _offered.add(self._held[name].number)

    def hide(self, name: str) -> None:
        """From now on requests that name it are refused, also those that have been checked and not handed on."""
        _offered.discard(self._held[name].number)

    def drop(self, name: str) -> None:
        """Give its room back."""
        self.hide(name)
        self._registry.saes.detach(name)
        del self._held[name]

    def get(self, name: str) -> Held:
        """The one of a name.

        Raises:
            UnknownName: there is none.
        """
        held = self._held.get(name)
        if held is None:
            self._registry.saes.get(name)
            raise _between(name)
        return held

    def numbers(self, steering: Sequence[SAESteering]) -> tuple[int, ...]:
        """Numbers of the autoencoders that a request names.

        Raises:
            UnknownName: one is not there, or is being attached or detached.
        """
        found = {one.sae: self.get(one.sae).number for one in steering}
        between = [name for name, number in found.items() if not offered((number,))]
        if between:
            raise _between(between[0])
        return tuple(sorted(found.values()))

    def listed(self) -> list[dict[str, Any]]:
        """What requests may name, in the order of names."""
        return [_line(held) for _, held in sorted(self._held.items()) if offered((held.number,))]

    def room(self) -> dict[str, dict[str, Any]]:
        """Room by site: ``used`` and ``free`` of ``features``, and of ``saes`` with up to ``sae_features`` each."""
        tables, found = self._registry.tables, dict[str, dict[str, Any]]()
        spec, attached = tables.spec, list(self._registry.saes.attached.values())
        for hook, layer in dict.fromkeys(site for bank in tables.banks for site in bank.sites):
            here = [one for one in attached if one.site == (hook, layer)]
            families, room = tables.families((hook, layer)), dict[str, Any]()
            if "sae" in families:
                room["features"] = _share(sum(len(one.slots) for one in here), spec.features)
            if "sae_full" in families:
                room["saes"] = _share(sum(one.whole is not None for one in here), spec.saes)
                room["sae_features"] = spec.sae_features
            if room:
                found[f"layers.{layer}.{hook}"] = room
        return found


def _between(name: str) -> UnknownName:
    return UnknownName(f"the autoencoder {name!r} is being attached or detached; ask again soon, or leave it out")


def _share(used: int, most: int) -> Mapping[str, int]:
    return {"used": used, "free": most - used}


def _line(held: Held) -> dict[str, Any]:
    one, sae = held.attached, held.attached.sae
    return {
        "name": one.name, "site": one.place, "d_in": sae.d_model, "d_sae": sae.d_sae, "activation": sae.activation.kind,
        "features": list(one.features), "whole": one.whole is not None, "file": Path(held.spec.path).name,
        "sae": held.spec.sae, "digest": sae.digest,
    }  # fmt: skip
