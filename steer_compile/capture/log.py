"""`RowLog`: what a block of calls captured, packed captures as `Rows`."""

from __future__ import annotations

import torch

from steer_compile.capture.rows import Rows, joined
from steer_compile.errors import CaptureError, NotSteered, UnknownName
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.packed import PackedCall


class RowLog(CaptureLog):
    """`CaptureLog` with the rows of packed captures. Reading them copies them to the CPU."""

    @property
    def rows(self) -> Rows:
        """All chosen rows in the order in which they were computed; a step is the number of a call of this runtime.

        Raises:
            CaptureError: the spec captures densely, or sequences have rows of different sites. NotSteered: no compiled
                graph ran inside the block yet.
        """
        parts = self._parts()
        filled = [part for part in parts if len(part)] or parts[:1]
        if len({frozenset(part.values) for part in filled}) > 1:
            names = sorted({name for part in filled for name in part.requests})
            raise CaptureError(
                f"requests {', '.join(names)} have rows of different sites; read log.of(request) of each"
            )
        return joined(filled)

    def of(self, request: str) -> Rows:
        """The rows of one request.

        Raises:
            UnknownName: no call had such a request. CaptureError, NotSteered: as `rows`.
        """
        parts = [part for part in self._parts() if request in part.requests]
        if not parts:
            have = dict.fromkeys(name for call in self.packed for name in call.names)
            raise UnknownName(f"no call was of request {request!r}; there are {', '.join(have)}")
        filled = [part for part in (part.of(request) for part in parts) if len(part)]
        return joined(filled or [parts[0].of(request)])

    def _parts(self) -> list[Rows]:
        if self.demand is None:
            raise CaptureError(
                "the spec captures every token at every site, without labels; read log[hook, layer], or give "
                "SteerSpec(capture_rows=...) and compile again"
            )
        if not self.packed:
            raise NotSteered("nothing was captured: no compiled graph ran inside the block yet")
        return [part for call in self.packed for part in rows_of(call)]


def rows_of(call: PackedCall) -> list[Rows]:
    """The rows of one call on the CPU: one `Rows` for each set of sites that its sequences have."""
    by_sites: dict[tuple[tuple[str, int], ...], list[int]] = {}
    keys_of = {sites: tuple(site for site in call.values if site in sites) for sites in set(call.sites)}
    for b, sites in enumerate(call.sites):
        by_sites.setdefault(keys_of[sites], []).append(b)
    values = {site: value.cpu() for site, value in call.values.items()}
    ids = (
        torch.full((int(call.tokens.max(initial=-1)) + 1,), -1, device="cpu")
        if call.token_ids is None
        else call.token_ids.cpu()
    )
    request, positions, tokens, rows = map(torch.from_numpy, (call.request, call.positions, call.tokens, call.rows))
    parts = []
    for keys, members in by_sites.items():
        own = torch.isin(request, torch.tensor(members, device="cpu"))
        place = torch.full((len(call.names),), -1, dtype=torch.int32, device="cpu")
        place[members] = torch.arange(len(members), dtype=torch.int32, device="cpu")
        parts.append(Rows(
            tuple(call.names[b] for b in members), place[request[own]], positions[own], ids[tokens[own]].long(),
            torch.full_like(positions[own], call.step),
            {f"layers.{layer}.{hook}": values[hook, layer][rows[own]] for hook, layer in keys},
        ))  # fmt: skip
    return parts
