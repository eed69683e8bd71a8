"""`Scope`: which sites take which data, by the spec and by the graphs compiled so far."""

from __future__ import annotations

from collections.abc import Callable

from steer_compile.errors import SiteNotFound, VectorError
from steer_compile.runtime.gates import Monitor
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, SteerSpec


class Scope:
    """Checks sites and widths of what is given at run time.

    Attributes:
        partial: the graphs compiled so far are parts of a model (graph breaks), and further sites may follow.
    """

    def __init__(
        self, spec: SteerSpec, tables: TableSet, elsewhere: Callable[[SiteKey], bool] = lambda site: False
    ) -> None:
        self.partial = False
        self._elsewhere = elsewhere
        self._spec = spec
        self._tables = tables

    def check(self, family: str, site: SiteKey, numbers: int | None = None, whole: bool = False) -> None:
        """Raise for data that a site cannot take; before a compile, and for a site elsewhere, only the spec is asked.

        Args:
            family: op family of the data.
            numbers: how many numbers the vector has, None for no vector.
            whole: all parts of the model ran, so a site that is not compiled is missing.

        Raises:
            SiteNotFound: the spec does not steer the site or lacks the family there, or no graph has the site.
            VectorError: the site has another width.
        """
        self._check_spec(family, site)
        if self._elsewhere(site):
            return
        later = self.partial and not whole and not self._tables.families(site)
        if self._tables.device is not None and not later:
            self._tables.check(family, site, numbers)

    def check_gate(self, site: SiteKey, monitor: Monitor) -> None:
        """Raise `VectorError` for a gate of clamps at a site that can decode from features, which it would not reach.

        Whether something is decoded there is not asked: it may be later, where nothing can be refused any more.
        """
        families = self.families(site) if self._tables.device is None else self._tables.families(site)
        if monitor.clamps and "sae_full" in families and not self._spec.cross_layer:
            raise VectorError(
                f"layers.{site[1]}.{site[0]} has a monitor with clamps=True, whose gate would not reach values that "
                "are decoded from features there; set cross_layer=True in the spec and compile again, or clamps=False"
            )

    def families(self, site: SiteKey) -> tuple[str, ...]:
        """Op families that the spec gives a site, none where it does not steer it."""
        chosen = [s for s in self._spec.steer if s.hook == site[0] and _may_hold(s, site[1])]
        return tuple(dict.fromkeys(op for s in chosen for op in s.ops))

    def _check_spec(self, family: str, site: SiteKey) -> None:
        hook, layer = site
        families = self.families(site)
        if not families:
            have = ", ".join(f"{s.hook} at {s.layers}" for s in self._spec.steer) or "nothing"
            raise SiteNotFound(
                f"the spec does not steer layers.{layer}.{hook}; it steers {have}; add it to the spec and compile again"
            )
        if family not in families:
            raise SiteNotFound(
                f"the spec gives layers.{layer}.{hook} no op family {family!r}; it has {', '.join(families)}; "
                f"add {family!r} to its ops in the spec and compile again"
            )


def _may_hold(selection: HookSelection, layer: int) -> bool:
    """Whether a layer is among the selected ones; negative ones are known only once the model is compiled."""
    layers = selection.layers
    return layers == "all" or layer in layers or any(isinstance(n, int) and n < 0 for n in layers)
