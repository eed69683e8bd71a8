"""`Gather`: chosen rows of the captures' tables, reduced where they are, and brought to the CPU in few copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steer_compile.capture.reduce import Reduction
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey
from steer_compile.vllm.logged import captured_as

Sites = tuple[SiteKey, ...]


class Gather:
    """Rows of the sites that this process captures, and logged features of sites.

    Attributes:
        device: where the tables are.
    """

    def __init__(self, tables: TableSet) -> None:
        pairs = zip(tables.banks, tables.tensors, strict=True)
        self._banks = {key: tensor[0] for bank, tensor in pairs if (key := captured_as(bank)) is not None}
        self._directions: WeakKeyDictionary[Reduction, dict[Sites, Tensor]] = WeakKeyDictionary()
        self.device = next((t.device for t in self._banks.values()), torch.device("cpu"))

    def own(self, sites: Sites) -> Sites:
        """Those of the sites that are captured in this process."""
        return tuple(site for site in sites if site in self._banks)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor where the tables are."""
        return tensor.to(self.device, non_blocking=True)

    def row_bytes(self, sites: Sites, keep: Reduction) -> int:
        """Bytes of what is kept of one row."""
        size = 0
        for site in sites:
            bank = self._banks[site]
            of = {
                "rows": bank.size(1) * bank.element_size(),
                "mean": bank.size(1) * 4,
                "norm": 4,
                "project": 4 * len(keep.directions.get(site, ())),
            }
            size += sum(of[kind] for kind in keep.kinds)
        return size

    def blocks(self, sites: Sites, index: Tensor) -> dict[Sites, Tensor]:
        """Rows (sites, n, H) of the sites, those of one width and dtype in one block."""
        alike: dict[tuple[int, torch.dtype], list[SiteKey]] = {}
        for site in sites:
            alike.setdefault((self._banks[site].size(1), self._banks[site].dtype), []).append(site)
        found: dict[Sites, Tensor] = {}
        for (width, dtype), group in alike.items():
            block = torch.empty((len(group), index.numel(), width), dtype=dtype, device=index.device)
            for i, site in enumerate(group):
                torch.index_select(self._banks[site], 0, index, out=block[i])
            found[tuple(group)] = block
        return found

    def reduced(self, keep: Reduction, values: Mapping[Any, Tensor]) -> dict[str, Tensor]:
        """What is kept of blocks (sites, n, H), or of the rows (n, H) of single sites, on its way to the CPU."""
        found: dict[str, Tensor] = {}
        for key, tensor in values.items():
            single = tensor.dim() == 2
            group: Sites = (key,) if single else key
            block = tensor.unsqueeze(0) if single else tensor
            for part, rows in self._projected(keep, group, block):
                for n, made in enumerate(keep.of(rows, self._directions_of(keep, part))):
                    on_host = to_host(made)
                    found |= {keep.keys(site)[n]: on_host[i] for i, site in enumerate(part)}
        return found

    def _projected(self, keep: Reduction, group: Sites, block: Tensor) -> Sequence[tuple[Sites, Tensor]]:
        """The block in parts whose sites have equally many directions."""
        counts = [len(keep.directions.get(site, ())) for site in group]
        if len(set(counts)) <= 1:
            return [(group, block)]
        return [((site,), block[i : i + 1]) for i, site in enumerate(group)]

    def _directions_of(self, keep: Reduction, sites: Sites) -> Tensor | None:
        """Directions (sites, D, H) on the device; they go there once for all live requests with equal ones."""
        if not keep.directions:
            return None
        there = self._directions.setdefault(keep, {})
        if sites not in there:
            there[sites] = self.put(torch.stack([keep.directions[site] for site in sites]))
        return there[sites]


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU that is there once the stream has come so far."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
