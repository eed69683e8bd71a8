"""What one row of the tables holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from steer_compile.errors import VectorError
from steer_compile.runtime.gates import Clamp, Clamps, Monitors
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import SiteKey, VectorSet, scaled

Parts: TypeAlias = tuple[tuple[VectorSet, float], ...]


@dataclass(frozen=True)
class Contents:
    """Vectors with their scales, monitors and clamps of one row."""

    parts: Parts = ()
    monitors: Monitors = ()
    clamps: Clamps = ()

    def __bool__(self) -> bool:
        return bool(self.parts or self.monitors or self.clamps)

    def __add__(self, own: Contents) -> Contents:
        """Both together; at a site the clamps of ``own`` come last, and its monitors are the ones that count."""
        clamps: dict[SiteKey, tuple[Clamp, ...]] = dict(self.clamps)
        for site, each in own.clamps:
            clamps[site] = (*clamps.get(site, ()), *each)
        monitors = {**dict(self.monitors), **dict(own.monitors)}
        return Contents((*self.parts, *own.parts), tuple(monitors.items()), tuple(clamps.items()))

    def scaled(self, factor: float) -> Contents:
        """The same with a factor on its vectors."""
        parts = self.parts if factor == 1.0 else tuple((vectors, scale * factor) for vectors, scale in self.parts)
        return Contents(parts, self.monitors, self.clamps)

    def digest(self) -> str:
        """Equal contents have equal digests."""
        vectors = [f"{vectors.digest}*{scale!r}" for vectors, scale in self.parts]
        monitors = [f"{site}?{monitor.digest}" for site, monitor in self.monitors]
        clamps = [f"{site}|{','.join(c.digest for c in each)}" for site, each in self.clamps]
        return ";".join([*vectors, *monitors, *clamps])

    def needs(self) -> Iterator[tuple[str, SiteKey, int | None]]:
        """What a site must offer: op family, site and how many numbers its vectors have."""
        for vectors, _ in self.parts:
            yield from (("add", site, vector.numel()) for site, vector in vectors.items())
        for site, monitor in self.monitors:
            yield "row_monitor", site, monitor.probe.numel()
            if monitor.remembers:
                yield "memory", site, None
            if monitor.hidden is not None:
                raise VectorError(
                    f"the monitor of layers.{site[1]}.{site[0]} has hidden units, which a row's monitor cannot have; "
                    "set it as the site's, with set_monitor"
                )
        for site, each in self.clamps:
            yield from (("clamp", site, clamp.direction.numel()) for clamp in each)

    def check_room(self, most_clamps: int) -> None:
        """Raise `VectorError` for more clamps at a site than a row has room for."""
        for (hook, layer), each in self.clamps:
            if len(each) > most_clamps:
                raise VectorError(
                    f"layers.{layer}.{hook} gets {len(each)} clamps, global ones included, but the spec has "
                    f"clamps={most_clamps}; raise it and compile again, or give fewer"
                )

    def check_range(self, tables: TableSet, share: float = 1.0) -> None:
        """Raise `VectorError` for a sum of vectors that overflows a share of the range of its table's dtype."""
        by_dtype: dict[tuple[torch.dtype, int], dict[SiteKey, torch.Tensor]] = {}
        for site, total in scaled(self.parts).items():
            by_dtype.setdefault((tables.view("table", site).dtype, total.numel()), {})[site] = total
        for (dtype, _), sums in by_dtype.items():
            fits = torch.isfinite((torch.stack(list(sums.values())) / share).to(dtype)).all(dim=1).tolist()
            if not all(fits):
                hook, layer = list(sums)[fits.index(False)]
                raise VectorError(
                    f"the vectors of layers.{layer}.{hook} overflow the table's dtype {dtype}; scale them down or set "
                    "dtype in the spec"
                )

    def write(self, tables: TableSet, rows: Sequence[int], most_clamps: int) -> None:
        """Write some rows of every table: what the contents do not name is neutral afterwards.

        Raises:
            VectorError: a sum of vectors overflows the table's dtype.
        """
        tables.put("table", rows, 1, scaled(self.parts))
        monitors = dict(self.monitors)
        tables.put("rowprobe", rows, 1, {site: m.probe for site, m in monitors.items()})
        settings = {site: numbers(m.settings(rows=True)) for site, m in monitors.items()}
        tables.put("rowprobe_set", rows, 1, settings)
        clamps, lines = dict(self.clamps), [row * most_clamps for row in rows]
        directions = {site: torch.stack([c.direction for c in each]) for site, each in clamps.items()}
        tables.put("clamp", lines, most_clamps, directions)
        bounds = {site: numbers([[c.lo, c.hi, c.strength] for c in each]) for site, each in clamps.items()}
        tables.put("clamp_set", lines, most_clamps, bounds)
