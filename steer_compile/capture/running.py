"""What is kept of a request while it runs, on the device: a mean, or the tokens with the largest scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import Top
from steer_compile.runtime.vectors import SiteKey

Values: TypeAlias = Mapping[Any, Tensor]


class Running(Protocol):
    """Takes a request's chosen tokens step by step. Nothing waits for the device."""

    def add(self, positions: Tensor, token_ids: Tensor, values: Values) -> None:
        """Tokens behind those before: labels (n,) and values by site (n, H), on the device."""

    def result(self) -> tuple[Tensor, Tensor, Values]:
        """Positions and token ids (m,) and values by site (m, H) of what is kept, in the order of the positions."""


def running_of(keep: Reduction, top: Top | None, device: torch.device) -> Running | None:
    """What a request's tokens run into, None where they are given on step by step."""
    if top is not None:
        return Largest(top.count, top.site, top.probe.to(device, non_blocking=True))
    return Mean() if keep.mean else None


class Mean:
    """The mean of all tokens, fp32, labelled with the last one's position and token id. Values may also be those of
    several sites in one, (..., n, H), under any key.

    Attributes:
        count: tokens so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._sums: dict[Any, Tensor] = {}

    def add(self, positions: Tensor, token_ids: Tensor, values: Values) -> None:
        self.count += positions.numel()
        self._last = positions[-1:].clone(), token_ids[-1:].clone()
        for site, rows in values.items():
            total = rows.sum(-2, keepdim=True, dtype=torch.float32)
            self._sums[site] = total if site not in self._sums else self._sums[site].add_(total)

    def result(self) -> tuple[Tensor, Tensor, Values]:
        if self._last is None:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), {}
        return *self._last, {site: total / self.count for site, total in self._sums.items()}


class Largest:
    """The tokens with the largest scores at one site, ``h . probe`` in fp32; of equal ones the earlier.

    A token whose score is NaN counts as the largest, so that it is seen.
    """

    def __init__(self, count: int, site: SiteKey, probe: Tensor) -> None:
        self._count, self._site, self._probe = count, site, probe
        self._kept: tuple[Tensor, Tensor, Tensor, dict[Any, Tensor]] | None = None

    def add(self, positions: Tensor, token_ids: Tensor, values: Values) -> None:
        scores = (values[self._site].float() * self._probe).sum(-1)
        found = scores, positions, token_ids, dict(values)
        if self._kept is not None:
            before = self._kept
            found = (
                torch.cat([before[0], scores]),
                torch.cat([before[1], positions]),
                torch.cat([before[2], token_ids]),
                {site: torch.cat([before[3][site], rows]) for site, rows in values.items()},
            )
        best = torch.sort(found[0], descending=True, stable=True).indices[: self._count]
        self._kept = found[0][best], found[1][best], found[2][best], {s: rows[best] for s, rows in found[3].items()}

    def result(self) -> tuple[Tensor, Tensor, Values]:
        if self._kept is None:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), {}
        _, positions, token_ids, values = self._kept
        order = torch.argsort(positions)
        return positions[order], token_ids[order], {site: rows[order] for site, rows in values.items()}
