"""`Keeping`: what is kept of the chosen rows of sequences, on the device: rows, reductions, means, largest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.running import Mean, Running, running_of
from steer_compile.capture.selection import Selection, Top
from steer_compile.runtime.vectors import SiteKey

Numbers = npt.NDArray[np.int64]


@dataclass(eq=False)
class Taken:
    """Chosen rows of one call.

    Attributes:
        request: number of each row's sequence (n,).
        rows: number of each row in ``positions``, ``token_ids`` and the values (n,).
        positions, token_ids: (T,) on the CPU or the values' device; ids are None where they are not known.
        values: by site (T, \\*row shape).
    """

    request: Numbers
    rows: Numbers
    positions: Tensor
    token_ids: Tensor | None
    values: Mapping[SiteKey, Tensor]

    def of(self, chosen: npt.NDArray[np.bool_]) -> Taken:
        """Some of the rows (n,)."""
        return Taken(self.request[chosen], self.rows[chosen], self.positions, self.token_ids, self.values)

    def gathered(self) -> Taken:
        """The rows alone."""
        device = next(iter(self.values.values())).device
        index = torch.from_numpy(np.array(self.rows, np.int64))
        there = index.to(device, non_blocking=True)
        ids = self.token_ids.index_select(0, there.to(self.token_ids.device)) if self.token_ids is not None else None
        values = {site: value.index_select(0, there) for site, value in self.values.items()}
        numbers = np.arange(len(self.rows), dtype=np.int64)
        return Taken(self.request, numbers, self.positions.index_select(0, index), ids, values)


class Keeping:
    """Reduces rows call by call; what runs on until a sequence ends is kept on the device.

    Args:
        keep: what is kept of each token.
        tokens: the choice of each sequence, or one of all; a `Selection` may have a ``top``.

    Raises:
        SpecError: a mean of the tokens of a ``top``.
    """

    def __init__(self, keep: Reduction, tokens: object = None) -> None:
        self._keep = keep
        self._tokens = tokens
        self._running: dict[str, Running] = {}
        self._directions: dict[SiteKey, Tensor] = {}
        self._shapes: dict[SiteKey, tuple[int, ...]] = {}
        for top in self._tops():
            keep.check_top(top)

    def _tops(self) -> list[Top]:
        each = self._tokens if isinstance(self._tokens, Sequence) else [self._tokens]
        return [one.top for one in each if isinstance(one, Selection) and one.top is not None]

    def _check(self, values: Mapping[SiteKey, Tensor]) -> None:
        """Raise, where sites are new, unless what is kept of them fits them.

        Raises:
            SpecError, VectorError: directions or a top of other sites, or of another width.
        """
        if values.keys() <= self._shapes.keys():
            return
        self._shapes |= {site: tuple(value.shape[1:]) for site, value in values.items()}
        widths = {site: prod(self._shapes[site]) for site in values}
        self._keep.check(widths)
        for top in self._tops():
            top.check(widths)

    def _begun(self, name: str, number: int, device: torch.device) -> Running | None:
        """What a sequence's rows run into, None where they are given on call by call."""
        if name not in self._running:
            own = self._tokens[number] if isinstance(self._tokens, Sequence) else self._tokens
            made = running_of(self._keep, own.top if isinstance(own, Selection) else None, device)
            if made is None:
                return None
            self._running[name] = made
        return self._running[name]

    def take(self, names: Sequence[str], taken: Taken) -> tuple[Taken, dict[str, Tensor]] | None:
        """Which rows are given on now, and their values by key; None for none.

        Args:
            names: of the sequences.

        Raises:
            SpecError, VectorError: what is kept does not fit the sites.
        """
        if taken.values:
            self._check(taken.values)
        if not taken.values or not len(taken.rows):
            return None
        device = next(iter(taken.values.values())).device
        runs = [self._begun(name, number, device) for number, name in enumerate(names)]
        for number, run in enumerate(runs):
            if run is None or not (own := taken.request == number).any():
                continue
            part = taken.of(own).gathered()
            run.add(part.positions.to(device, non_blocking=True), _ids(part), _flat(part.values))
        rest = taken.of(np.array([run is None for run in runs], np.bool_)[taken.request])
        if not len(rest.rows):
            return None
        if self._keep.kinds == ("rows",):
            return rest, {f"layers.{layer}.{hook}": value for (hook, layer), value in rest.values.items()}
        rest = rest.gathered()
        return rest, self._reduced(_flat(rest.values))

    def ended(self, name: str) -> tuple[Taken, dict[str, Tensor]] | None:
        """What was kept of a sequence while it ran, None for nothing."""
        run = self._running.pop(name, None)
        if run is None:
            return None
        positions, ids, values = run.result()
        if not positions.numel():
            return None
        made = self._reduced(values)
        if isinstance(run, Mean):
            made |= {f"{key}.tokens": torch.tensor([run.count]) for key in list(made)}
        numbers = np.arange(positions.numel(), dtype=np.int64)
        return Taken(np.zeros_like(numbers), numbers, positions, ids, values), made

    def forget(self) -> None:
        """Let go of what was kept of all sequences."""
        self._running.clear()

    def _reduced(self, values: Mapping[SiteKey, Tensor]) -> dict[str, Tensor]:
        """What is kept of values (n, H) by key; rows and means have the shape of the site's rows again."""
        made: dict[str, Tensor] = {}
        for site, value in values.items():
            directions = self._keep.directions.get(site)
            if directions is not None and site not in self._directions:
                self._directions[site] = directions.to(value.device)
            reduced = self._keep.of(value, self._directions.get(site))
            for kind, key, one in zip(self._keep.kinds, self._keep.keys(site), reduced, strict=True):
                made[key] = one.view(len(one), *self._shapes[site]) if kind in ("rows", "mean") else one
        return made


def _flat(values: Mapping[SiteKey, Tensor]) -> dict[SiteKey, Tensor]:
    """Rows (n, H) of at least one token each, those of parallel streams joined."""
    return {site: value.reshape(len(value), -1) for site, value in values.items()}


def _ids(taken: Taken) -> Tensor:
    """Token ids where the values are, -1 where they are not known."""
    device = next(iter(taken.values.values())).device
    ids = taken.token_ids if taken.token_ids is not None else torch.full_like(taken.positions, -1)
    return ids.to(device, non_blocking=True)
