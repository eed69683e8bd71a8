"""`SweepResult`: the metric of every cell of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

Grid: TypeAlias = tuple[tuple[float | None, ...], ...]
"""Values by layer and position; None where a layer has no such hook."""


class Found(NamedTuple):
    """One cell."""

    hook: str
    layer: int
    position: int
    value: float


@dataclass(frozen=True)
class SweepResult:
    """What patching the clean value into the corrupted run does, cell by cell.

    Attributes:
        metric, measure: as in `Question`.
        clean, corrupted: the measure of both runs.
        layers, positions: of the rows and columns of ``grids``.
        grids: by hook.
        equal: cells that were not run, as both runs have the same value there.
        batch: cells of one forward.
        forwards: number of compiled forwards, the one that captures included.
        compile_seconds: until the first forward was done.
        seconds: for all others.
    """

    metric: str
    measure: str
    clean: float
    corrupted: float
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    grids: Mapping[str, Grid]
    equal: int
    batch: int
    forwards: int
    compile_seconds: float
    seconds: float

    @property
    def baseline(self) -> float:
        """The metric without any patch."""
        return 0.0 if self.metric == "recovered" else self.corrupted

    def __iter__(self) -> Iterator[Found]:
        for hook, grid in self.grids.items():
            for layer, line in zip(self.layers, grid, strict=True):
                for position, value in zip(self.positions, line, strict=True):
                    if value is not None:
                        yield Found(hook, layer, position, value)

    def strongest(self, count: int) -> list[Found]:
        """The cells that move the metric most, the strongest first."""
        return sorted(self, key=lambda cell: -abs(cell.value - self.baseline))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "grids": {hook: [list(line) for line in grid] for hook, grid in self.grids.items()}} | {
            name: list(vars(self)[name]) for name in ("layers", "positions")
        }
