"""`Keeping`: what is kept of the chosen rows of sequences, on the device: rows, reductions, means, largest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.running import Largest, Mean, Running
from steer_compile.capture.selection import Selection
from steer_compile.errors import SpecError
from steer_compile.runtime.vectors import SiteKey

Numbers = npt.NDArray[np.int64]


@dataclass(eq=False)
class Taken:
    """Chosen rows of one call.

    Attributes:
        request: number of each row's sequence (n,).
        rows: number of each row in ``positions``, ``token_ids`` and the values (n,).
        positions: (T,) on the CPU. ``token_ids``: (T,) on the values' device, None where they are not known.
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
        each = tokens if isinstance(tokens, Sequence) else [tokens]
        if keep.mean and any(isinstance(one, Selection) and one.top is not None for one in each):
            raise SpecError("a mean of the tokens of top is not kept; capture their rows, or a mean by position")

    def _begun(self, name: str, number: int, device: torch.device) -> Running | None:
        """What a sequence's rows run into, None where they are given on call by call."""
        own = self._tokens[number] if isinstance(self._tokens, Sequence) else self._tokens
        top = own.top if isinstance(own, Selection) else None
        if name not in self._running and (top is not None or self._keep.mean):
            made = Mean() if top is None else Largest(top.count, top.site, top.probe.to(device))
            self._running[name] = made
        return self._running.get(name)

    def take(self, names: Sequence[str], taken: Taken) -> tuple[Taken, dict[str, Tensor]] | None:
        """Which rows are given on now, and their values by key; None for none.

        Args:
            names: of the sequences.
        """
        if not taken.values or not len(taken.rows):
            return None
        device = next(iter(taken.values.values())).device
        runs = [self._begun(name, number, device) for number, name in enumerate(names)]
        for number, run in enumerate(runs):
            own = taken.request == number
            if run is not None and own.any():
                part = taken.of(own).gathered()
                run.add(part.positions, _ids(part), part.values)
        rest = taken.of(np.array([runs[n] is None for n in taken.request.tolist()], np.bool_))
        if not len(rest.rows):
            return None
        if self._keep.kinds == ("rows",):
            return rest, {f"layers.{layer}.{hook}": value for (hook, layer), value in rest.values.items()}
        rest = rest.gathered()
        return rest, self._reduced(rest.values)

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
        made: dict[str, Tensor] = {}
        for site, value in values.items():
            directions = self._keep.directions.get(site)
            if directions is not None and site not in self._directions:
                self._directions[site] = directions.to(value.device)
            kinds = self._keep.of(value.reshape(len(value), -1), self._directions.get(site))
            rows = [
                value if kind in ("rows", "mean") else one for kind, one in zip(self._keep.kinds, kinds, strict=True)
            ]
            made |= dict(zip(self._keep.keys(site), rows, strict=True))
        return made


def _ids(taken: Taken) -> Tensor:
    if taken.token_ids is not None:
        return taken.token_ids.cpu() if taken.token_ids.device != taken.positions.device else taken.token_ids
    return torch.full_like(taken.positions, -1)
