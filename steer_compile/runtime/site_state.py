"""`SiteState`: the tier and the monitors of sites, as they can be read back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from steer_compile.runtime.gates import Monitor
from steer_compile.runtime.site_monitors import SiteMonitors
from steer_compile.runtime.vectors import SiteKey, VectorSet, finite


class SiteState(SiteMonitors):
    """`SiteMonitors` that say what they hold."""

    @property
    def tier(self) -> VectorSet:
        """Vectors of the dynamic tier."""
        return self._tier

    @property
    def gain(self) -> float:
        """Factor on the dynamic tier."""
        return self._gain

    @property
    def monitors(self) -> Mapping[SiteKey, tuple[Monitor, bool]]:
        """Monitors by site, and whether each gates rows."""
        return MappingProxyType(self._monitors)

    def set_gain(self, gain: float) -> None:
        """Change the factor on the dynamic tier alone; tokens carry it, so no vector is written.

        Raises:
            VectorError: it is not finite.
        """
        factor = finite(gain, "the gain of the dynamic tier")
        with self._lock, torch.no_grad():
            self._gain = factor
            self._written = None
