"""The dynamic tier and the monitors of sites, as an operator gives them: plain data, read alike in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer_compile.dynamic.codec import fields_of, monitor_from_data, unpacked, vectors_from_data
from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import Hidden, Monitor
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.vectors import SiteKey, VectorSet, finite, site_key

Data = dict[str, Any]
MOST_UNITS = 4096
"""Most hidden units of a probe that is sent."""


@dataclass(frozen=True)
class Tier:
    """Vectors of the dynamic tier and their gain."""

    vectors: VectorSet
    gain: float

    def set(self, registry: Registry) -> None:
        """Raises `SiteNotFound` or `VectorError`, and the tier stays as it was."""
        registry.sites.set_tier(self.vectors, self.gain)


@dataclass(frozen=True)
class SiteMonitor:
    """What a site's monitor is to be, None for none."""

    site: SiteKey
    monitor: Monitor | None
    gate_rows: bool

    def set(self, registry: Registry) -> None:
        """Raises `SiteNotFound` or `VectorError`, and the monitor stays as it was."""
        registry.sites.set_monitor(self.site, self.monitor, self.gate_rows)


@dataclass(frozen=True)
class Former:
    """What all sites had."""

    tier: Tier
    monitors: Mapping[SiteKey, tuple[Monitor, bool]]

    @classmethod
    def of(cls, registry: Registry) -> Former:
        sites = registry.sites
        return cls(Tier(sites.tier, sites.gain), dict(sites.monitors))

    def set(self, registry: Registry) -> None:
        """Bring it back."""
        self.tier.set(registry)
        for site in registry.sites.monitors.keys() - self.monitors.keys():
            registry.sites.set_monitor(site, None)
        for site, (monitor, gate_rows) in self.monitors.items():
            registry.sites.set_monitor(site, monitor, gate_rows)


def read(given: object) -> Tier | SiteMonitor:
    """``{"tier": {"vectors": ..., "gain": 1.0}}`` or ``{"monitor": {"site": ..., "monitor": ..., "gate_rows": ...}}``.

    Raises:
        SpecError, VectorError: data of another form, bad vectors or numbers.
    """
    data = fields_of("a change of sites", given, ("tier", "monitor"))
    if len(data) != 1:
        raise SpecError("a change of sites has a tier or a monitor; give one of them")
    return _tier(data["tier"]) if "tier" in data else _monitor(data["monitor"])


def _tier(given: object) -> Tier:
    data = fields_of("the tier", given, ("vectors", "gain"))
    gain = finite(data.get("gain", 1.0), "the gain of the dynamic tier")
    return Tier(vectors_from_data("the vectors of the tier", data.get("vectors")), gain)


def _monitor(given: object) -> SiteMonitor:
    data = fields_of("a site's monitor", given, ("site", "monitor", "gate_rows"), ("site",))
    gate_rows = data.get("gate_rows", False)
    if not isinstance(gate_rows, bool):
        raise SpecError(f"gate_rows={gate_rows!r:.80} is neither true nor false; give one of them")
    site, found = site_key(str(data["site"])), data.get("monitor")
    if found is None:
        return SiteMonitor(site, None, gate_rows)
    fields = dict(found) if isinstance(found, Mapping) else {}
    hidden = fields.pop("hidden", None)
    if hidden is None:
        return SiteMonitor(site, monitor_from_data("the monitor", found), gate_rows)
    units = _hidden(hidden)
    plain = fields_of(
        "the monitor", fields, ("probe", "threshold", "sharpness", "kind", "low", "high", "clamps"), ("probe",)
    )
    made = Monitor(unpacked("the probe of the monitor", plain.pop("probe")), **plain, hidden=units)
    return SiteMonitor(site, made, gate_rows)


def _hidden(given: object) -> Hidden:
    data = fields_of("the hidden units", given, ("weight", "bias", "output"), ("weight", "bias", "output"))
    rows = data["weight"]
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_UNITS:
        raise VectorError(f"the hidden units have no list of up to {MOST_UNITS} vectors as weight; give one for each")
    units = [Monitor(unpacked("a hidden unit", row)).probe for row in rows]
    if len({unit.numel() for unit in units}) > 1:
        raise VectorError("the hidden units have vectors of several widths; give that of the site")
    ends = (Monitor(unpacked(f"the {name} of hidden units", data[name])).probe for name in ("bias", "output"))
    return Hidden([unit.tolist() for unit in units], *ends)
