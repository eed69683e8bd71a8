"""`Rows`: captured values on the CPU, each row with the request, position, token and step that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steer_compile.errors import CaptureError, SiteNotFound, UnknownName


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one or more requests, in the order in which they were computed.

    Attributes:
        requests: names of the requests.
        request: index of each row's request in ``requests`` (n,) int32.
        positions, token_ids, steps: absolute position in the sequence, token id (-1 where the host knows none) and
            number of the forward, of each row (n,) int64.
        values: by key, ``layers.3.post_block``, the values (n, \\*row shape) of all rows.

    Raises:
        CaptureError: labels or values that are not of one length, or a request that is not there.
    """

    requests: tuple[str, ...]
    request: Tensor
    positions: Tensor
    token_ids: Tensor
    steps: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.request.numel()
        for name, labels in (("positions", self.positions), ("token_ids", self.token_ids), ("steps", self.steps)):
            if labels.shape != (n,):
                raise CaptureError(f"{n} rows have {name} of shape {tuple(labels.shape)}; give one for each row")
        for key, value in self.values.items():
            if value.dim() == 0 or value.size(0) != n:
                raise CaptureError(f"{key} has shape {tuple(value.shape)} for {n} rows; give one entry for each row")
        if n and not 0 <= int(self.request.min()) <= int(self.request.max()) < len(self.requests):
            raise CaptureError(f"a row's request is none of the {len(self.requests)} that are named")

    def __len__(self) -> int:
        return self.request.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of values and labels."""
        tensors = (self.request, self.positions, self.token_ids, self.steps, *self.values.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, by number (m,) or mask (n,)."""
        values = {key: value[index] for key, value in self.values.items()}
        labels = (self.request[index], self.positions[index], self.token_ids[index], self.steps[index])
        return Rows(self.requests, *labels, values)

    def of(self, request: str) -> Rows:
        """The rows of one request, which is then the only one that is named.

        Raises:
            UnknownName: no row is of such a request.
        """
        if request not in self.requests:
            raise UnknownName(f"no captured row is of request {request!r}; there are {', '.join(self.requests)}")
        one = self.take(self.request == self.requests.index(request))
        return Rows((request,), torch.zeros_like(one.request), one.positions, one.token_ids, one.steps, one.values)

    def row(self, site: tuple[str, int], request: int | str, position: int) -> Tensor:
        """The value of one token, the one that was computed last.

        Args:
            site: hook and layer. request: name, or index in ``requests``. position: absolute position.

        Raises:
            SiteNotFound: the site is not captured. UnknownName: no such request. CaptureError: no row of the position.
        """
        key = f"layers.{site[1]}.{site[0]}"
        if key not in self.values:
            raise SiteNotFound(f"{key} is not captured; captured are {', '.join(self.values) or 'none'}")
        numbered = isinstance(request, int) and 0 <= request < len(self.requests)
        name = self.requests[request] if isinstance(request, int) and numbered else str(request)
        if name not in self.requests:
            raise UnknownName(f"no captured row is of request {request!r}; there are {', '.join(self.requests)}")
        own = self.request == self.requests.index(name)
        (found,) = (own & (self.positions == position)).nonzero(as_tuple=True)
        if not found.numel():
            have = self.positions[own]
            span = f"positions {int(have.min())} to {int(have.max())}" if have.numel() else "none"
            raise CaptureError(f"no captured row of request {name!r} is at position {position}; it has {span}")
        return self.values[key][int(found[-1])]

    def latest_per_position(self) -> Rows:
        """Of each request and position the row that was computed last, in the order of requests and positions.

        Positions are computed twice after a preemption, and where speculated tokens were not accepted.
        """
        place = np.stack([self.request.numpy(), self.positions.numpy()], 1)[::-1]
        _, last = np.unique(place, axis=0, return_index=True)
        return self.take(torch.from_numpy(len(self) - 1 - last))


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows one behind the other; requests of one name are one request.

    Raises:
        CaptureError: nothing to join, or parts that hold other keys.
    """
    if not parts:
        raise CaptureError("no captured rows to join; give at least one part")
    keys = list(parts[0].values)
    names: dict[str, int] = {}
    for part in parts:
        if set(part.values) != set(keys):
            raise CaptureError(f"rows of {sorted(part.values)} cannot follow rows of {sorted(keys)}; join them apart")
        for name in part.requests:
            names.setdefault(name, len(names))
    where = [torch.tensor([names[n] for n in part.requests], dtype=torch.int32) for part in parts]
    request = torch.cat([w[part.request.long()] for w, part in zip(where, parts, strict=True)])
    return Rows(
        tuple(names),
        request,
        torch.cat([part.positions for part in parts]),
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.steps for part in parts]),
        {key: torch.cat([part.values[key] for part in parts]) for key in keys},
    )
