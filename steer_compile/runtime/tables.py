"""`TableSet`: the backing tensors of a compiled model. They never move, so CUDA graphs keep their addresses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import SiteNotFound, VectorError
from steer_compile.ir import ROWS, SCALE, Bank, bank_name
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import RESERVED_ROWS, SteerSpec


class TableSet:
    """Device tensors: one per bank, the token's row index (max_tokens,) int32 and the rows' scales (R,) fp32."""

    def __init__(self, spec: SteerSpec) -> None:
        self.spec = spec
        self.banks: tuple[Bank, ...] = ()
        self.tensors: list[torch.Tensor] = []
        self.device: torch.device | None = None
        self.rows: torch.Tensor = torch.empty(0)
        self.scale: torch.Tensor = torch.empty(0)

    def grow(self, banks: tuple[Bank, ...], device: torch.device) -> None:
        """Allocate the banks that are new. Existing tensors stay where they are."""
        if self.device is not None and device != self.device:
            raise VectorError(f"the spec's tables are on {self.device} but a graph runs on {device}; use one device")
        with torch.inference_mode(False):  # a model may be compiled inside inference mode; the tables change outside
            if self.device is None:
                self.device = device
                self.rows = torch.zeros(self.spec.max_tokens, dtype=torch.int32, device=device)
                self.scale = torch.ones(RESERVED_ROWS + self.spec.rows, dtype=torch.float32, device=device)
            for bank in banks[len(self.tensors) :]:
                shape = (len(bank.sites), bank.length, bank.width)
                self.tensors.append(torch.zeros(shape, dtype=bank.dtype, device=device))
        self.banks = banks

    def named(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Tensors by the buffer names of `passes.splice`."""
        known = {bank_name(i): t for i, t in enumerate(self.tensors)} | {ROWS: self.rows, SCALE: self.scale}
        return {name: known[name] for name in names}

    def width(self, key: SiteKey) -> int | None:
        """Width of a steered site, or None when no compiled graph has it."""
        return next((b.width for b in self.banks if b.kind == "table" and key in b.sites), None)

    def steered(self) -> list[SiteKey]:
        return [k for b in self.banks if b.kind == "table" for k in b.sites]

    def check(self, vectors: Mapping[SiteKey, torch.Tensor]) -> None:
        """Raise for a vector that no compiled site can take: unknown site or wrong width."""
        for (hook, layer), vector in vectors.items():
            width = self.width((hook, layer))
            if width is None:
                sites = sorted(self.steered(), key=lambda k: (k[1], k[0]))
                have = ", ".join(f"layers.{n}.{h}" for h, n in sites[:4]) + (", ..." if len(sites) > 4 else "")
                raise SiteNotFound(
                    f"no compiled graph has layers.{layer}.{hook}; {len(sites)} sites can be steered: {have or 'none'}"
                )
            if vector.numel() != width:
                raise VectorError(
                    f"the vector of layers.{layer}.{hook} has {vector.numel()} numbers but the site is {width} wide"
                )

    def contents(self, bank: Bank, vectors: Mapping[SiteKey, torch.Tensor]) -> torch.Tensor:
        """One row of a bank for every site, ``(sites, width)`` in the bank's dtype; zeros where there is no vector."""
        rows = torch.zeros(len(bank.sites), bank.width, dtype=torch.float32, device="cpu")
        for i, key in enumerate(bank.sites):
            if key in vectors:
                rows[i] = vectors[key]
        cast = rows.to(bank.dtype)
        if not bool(torch.isfinite(cast).all()):
            text = (
                f"a sum of vectors overflows the table's dtype {bank.dtype}; scale them down or set dtype in the spec"
            )
            raise VectorError(text)
        return cast

    def write(self, row: int, vectors: Mapping[SiteKey, torch.Tensor]) -> None:
        """Write one row of every table bank."""
        for bank, tensor in zip(self.banks, self.tensors, strict=True):
            if bank.kind == "table":
                tensor[:, row, :].copy_(self.contents(bank, vectors))

    def index(self, rows: npt.NDArray[np.int32]) -> None:
        """Set the row of the first ``rows.size`` tokens."""
        count = rows.size
        if self.device is not None and self.device.type == "cuda":
            staging = torch.empty(count, dtype=torch.int32, device="cpu", pin_memory=True)
            staging.numpy()[:] = rows.ravel()
            self.rows[:count].copy_(staging, non_blocking=True)
            return
        self.rows[:count].copy_(torch.from_numpy(rows.ravel()))

    def captured(self, tokens: int) -> dict[SiteKey, torch.Tensor]:
        """Views ``(tokens, width)`` of what the last call stored, by site."""
        found: dict[SiteKey, torch.Tensor] = {}
        for bank, tensor in zip(self.banks, self.tensors, strict=True):
            if bank.kind == "capture":
                for i, key in enumerate(bank.sites):
                    found[key] = tensor[i, :tokens]
        return found
