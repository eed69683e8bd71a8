"""What one row of the tables holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from steer_compile.errors import VectorError
from steer_compile.runtime.features import Features
from steer_compile.runtime.gates import Clamp, Clamps, Monitors
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import SiteKey, VectorSet, scaled
from steer_compile.spec import SteerSpec

Parts: TypeAlias = tuple[tuple[VectorSet, float], ...]


@dataclass(frozen=True)
class Contents:
    """Vectors with their scales, monitors, clamps and features of one row."""

    parts: Parts = ()
    monitors: Monitors = ()
    clamps: Clamps = ()
    features: Features = Features()

    def __bool__(self) -> bool:
        return bool(self.parts or self.monitors or self.clamps or self.features)

    def __add__(self, own: Contents) -> Contents:
        """Both together; at a site the clamps of ``own`` come last, and its monitors are the ones that count.

        Raises:
            SAEError: both clamp one feature of an autoencoder, or decode a site's values differently.
        """
        clamps: dict[SiteKey, tuple[Clamp, ...]] = dict(self.clamps)
        for site, each in own.clamps:
            clamps[site] = (*clamps.get(site, ()), *each)
        monitors = {**dict(self.monitors), **dict(own.monitors)}
        parts, features = (*self.parts, *own.parts), self.features + own.features
        return Contents(parts, tuple(monitors.items()), tuple(clamps.items()), features)

    def under(self, own: Contents) -> Contents:
        """Both together as in a sum, where features that ``own`` has too are its own."""
        return replace(self, features=self.features.yielding(own.features)) + own

    def scaled(self, factor: float) -> Contents:
        """The same with a factor on its vectors."""
        parts = self.parts if factor == 1.0 else tuple((vectors, scale * factor) for vectors, scale in self.parts)
        return replace(self, parts=parts)

    def digest(self) -> str:
        """Equal contents have equal digests."""
        vectors = [f"{vectors.digest}*{scale!r}" for vectors, scale in self.parts]
        monitors = [f"{site}?{monitor.digest}" for site, monitor in self.monitors]
        clamps = [f"{site}|{','.join(c.digest for c in each)}" for site, each in self.clamps]
        features = [self.features.digest()] if self.features else []
        return ";".join([*vectors, *monitors, *clamps, *features])

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
        yield from (("sae", site, None) for site, _ in self.features.clamps)
        yield from (("sae_full", site, None) for site, _ in self.features.decodings)
        yield from (("sae_log", site, None) for site, one in self.features.decodings if one.log)

    def check_room(self, spec: SteerSpec) -> None:
        """Raise `VectorError` or `TableFull` for more clamps at a site than a row has room for."""
        most_clamps = spec.clamps
        self.features.check_room(spec.features)
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

    def write(self, tables: TableSet, rows: Sequence[int]) -> None:
        """Write some rows of every table: what the contents do not name is neutral afterwards.

        Raises:
            VectorError: a sum of vectors overflows the table's dtype.
        """
        most_clamps = tables.spec.clamps
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
        for kind, found in self.features.lines(tables.spec.features).items():
            tables.put(kind, rows, 1, found)
