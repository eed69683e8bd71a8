"""`TableSet`: the backing tensors of a compiled model. They never move, so CUDA graphs keep their addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import SiteNotFound, VectorError
from steer_compile.ir import CAPTURE, DECODE, GAIN, ROWS, SCALE, SLOT, Bank, bank_name
from steer_compile.kernels.sae_delta import NO_FEATURE
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import SteerSpec

_NEUTRAL = {
    "clamp_set": (-torch.inf, torch.inf, 0.0),
    "sae_set": NO_FEATURE,
    "full_set": NO_FEATURE,
}
"""What each line of a bank of settings holds while nothing is set; other banks hold zeros."""

KINDS = {
    "patch": "patch", "add": "table", "tier": "tier", "monitor": "probe", "row_monitor": "rowprobe", "clamp": "clamp",
    "sae": "sae", "sae_full": "full_encoder", "sae_log": "full_log", "score": "score", "memory": "state", "mlp": "mlp",
}  # fmt: skip
"""Kind of the bank that holds the vectors of each op family."""

ALIGNMENT = 16
"""Bytes: each site's part of a bank begins at a multiple of them."""

_NOUNS = {
    "patch": "source",
    "add": "vector",
    "tier": "tier vector",
    "monitor": "probe",
    "row_monitor": "probe",
    "clamp": "direction",
    "mlp": "hidden unit",
    "sae": "autoencoder",
    "sae_full": "autoencoder",
}


class TableSet:
    """Device tensors: one per bank; each token's row (T,) int32, tier gain and decode mask (T,); rows' scales (R,); row
    and group of each token in packed captures (T, 2) int32."""

    def __init__(self, spec: SteerSpec) -> None:
        self.spec = spec
        self.banks: tuple[Bank, ...] = ()
        self._views: dict[tuple[str, SiteKey], torch.Tensor] = {}
        self._families: dict[SiteKey, tuple[str, ...]] = {}
        self.tensors: list[torch.Tensor] = []
        self.device: torch.device | None = None
        self.rows: torch.Tensor = torch.empty(0)
        self.scale: torch.Tensor = torch.empty(0)
        self.gain: torch.Tensor = torch.empty(0)
        self.decode: torch.Tensor = torch.empty(0)
        self.slot: torch.Tensor = torch.empty(0)
        self.chosen: torch.Tensor = torch.empty(0)

    def grow(self, banks: tuple[Bank, ...], device: torch.device) -> None:
        """Allocate the banks that are new. Existing tensors stay where they are."""
        if self.device is not None and device != self.device:
            raise VectorError(f"the spec's tables are on {self.device} but a graph runs on {device}; use one device")
        with torch.inference_mode(False):  # a model may be compiled inside inference mode; the tables change outside
            if self.device is None:
                self.device = device
                most = self.spec.max_tokens
                self.rows, self.slot = (torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2))
                self.gain, self.decode = (torch.zeros(most, dtype=torch.float32, device=device) for _ in range(2))
                if self.spec.capture_rows:
                    none = torch.tensor((-1, 0), dtype=torch.int32, device=device)
                    self.chosen = none.repeat(most, 1)
                self.scale = torch.ones(self.spec.all_rows, dtype=torch.float32, device=device)
            for bank in banks[len(self.tensors) :]:
                line = torch.tensor(_NEUTRAL.get(bank.kind, (0.0,)), dtype=bank.dtype, device=device)
                self.tensors.append(_room(bank, device).copy_(line))
        self.banks = banks
        for bank, tensor in zip(banks, self.tensors, strict=True):
            for site, part in zip(bank.sites, tensor.unbind(), strict=True):
                self._views.setdefault((bank.kind, site), part)
        sites = dict.fromkeys(site for bank in banks for site in bank.sites)
        self._families = {s: tuple(f for f, kind in KINDS.items() if (kind, s) in self._views) for s in sites}

    def named(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Tensors by the buffer names of `passes.splice`."""
        known = {bank_name(i): t for i, t in enumerate(self.tensors)} | {
            ROWS: self.rows, SCALE: self.scale, GAIN: self.gain, DECODE: self.decode, SLOT: self.slot,
            CAPTURE: self.chosen,
        }  # fmt: skip
        return {name: known[name] for name in names}

    def steered(self) -> list[SiteKey]:
        """Sites that hold data of some op family, each once."""
        return list(dict.fromkeys(site for kind in KINDS.values() for site in self.sites(kind)))

    def width(self, key: SiteKey) -> int | None:
        """Width of a steered site, or None when no compiled graph has it."""
        return next((b.width for b in self.banks if b.kind in KINDS.values() and key in b.sites), None)

    def sites(self, kind: str) -> list[SiteKey]:
        """Sites that have a place in banks of a kind."""
        return [site for bank in self.banks if bank.kind == kind for site in bank.sites]

    def families(self, site: SiteKey) -> tuple[str, ...]:
        """Op families that are compiled in at a site."""
        return self._families.get(site, ())

    def view(self, kind: str, site: SiteKey) -> torch.Tensor:
        """A site's part of a bank, ``(length, width)`` in the bank's dtype.

        Raises:
            SiteNotFound: no bank of this kind holds the site.
        """
        found = self._views.get((kind, site))
        if found is not None:
            return found
        raise SiteNotFound(self._absent(kind, site))

    def _absent(self, what: str, site: SiteKey) -> str:
        name, have = f"layers.{site[1]}.{site[0]}", self.families(site)
        if have:
            return (
                f"{name} was compiled without {what!r}; it has {', '.join(have)}; "
                f"add {what!r} to its ops in the spec and compile again"
            )
        sites = sorted(self.steered(), key=lambda k: (k[1], k[0]))
        near = ", ".join(f"layers.{n}.{h}" for h, n in sites[:4]) + (", ..." if len(sites) > 4 else "")
        return f"no compiled graph has {name}; {len(sites)} sites can be steered: {near or 'none'}; choose one of these"

    def check(self, family: str, site: SiteKey, numbers: int | None = None) -> None:
        """Raise for data of an op family that a compiled site cannot take.

        Args:
            numbers: how many numbers the vector has, None for no vector.

        Raises:
            SiteNotFound: the site or the family there is not compiled. VectorError: the site has another width.
        """
        if family not in self.families(site):
            raise SiteNotFound(self._absent(family, site))
        width = self.view(KINDS[family], site).size(-1)
        if numbers is not None and numbers != width:
            raise VectorError(
                f"the {_NOUNS[family]} of layers.{site[1]}.{site[0]} has {numbers} numbers but the site is {width} "
                "wide; give one number for each"
            )

    def put(self, kind: str, starts: Sequence[int], count: int, values: Mapping[SiteKey, torch.Tensor]) -> None:
        """Write ``count`` lines from each of ``starts`` on, of every site in the banks of a kind.

        Args:
            values: fp32 lines ``(n, width)`` with n <= count, or one line ``(width,)``; what they do not name becomes
                neutral.

        Raises:
            VectorError: a number overflows the bank's dtype.
        """
        for bank, tensor in zip(self.banks, self.tensors, strict=True):
            if bank.kind == kind:
                parts = [tensor[:, start : start + count] for start in starts]
                if any(site in values for site in bank.sites):
                    block = _block(bank, count, values)
                    source = block.pin_memory() if tensor.is_cuda else block
                    for part in parts:
                        part.copy_(source, non_blocking=True)
                else:
                    for part in parts:
                        _clear(part, kind)

    def index(self, rows: npt.NDArray[np.int32]) -> None:
        """Set the row of the first ``rows.size`` tokens."""
        self._send(rows.ravel(), self.rows)

    def slots(self, slots: npt.NDArray[np.int32]) -> None:
        """Set the memory line of the first ``slots.size`` tokens."""
        self._send(slots.ravel(), self.slot)

    def choose(self, rows: npt.NDArray[np.int32]) -> None:
        """Set the row, -1 for none, and the group of the first tokens in packed captures, given as (T, 2)."""
        self._send(rows.ravel(), self.chosen.view(-1))

    def mask(self, decoded: npt.NDArray[np.bool_], gain: float) -> None:
        """Set the decode mask and the tier's gain of the first ``decoded.size`` tokens."""
        mask = decoded.astype(np.float32)
        self._send(mask, self.decode)
        self._send(mask * np.float32(gain), self.gain)

    def _send(self, values: npt.NDArray[np.generic], target: torch.Tensor) -> None:
        """Copy to the head of a device tensor of the same dtype, without waiting for the device."""
        source = torch.from_numpy(np.ascontiguousarray(values))
        if target.is_cuda:
            source = torch.empty_like(source, pin_memory=True).copy_(source)
        target[: source.numel()].copy_(source, non_blocking=True)

    def captured(self, tokens: int, kind: str = "capture") -> dict[SiteKey, torch.Tensor]:
        """Views of the first ``tokens`` rows ``(tokens, width)`` that the last call stored in banks of a kind:
        ``capture`` or ``score``, or ``packed``, whose rows are those of chosen tokens."""
        found: dict[SiteKey, torch.Tensor] = {}
        for bank, tensor in zip(self.banks, self.tensors, strict=True):
            if bank.kind == kind:
                for i, key in enumerate(bank.sites):
                    found[key] = tensor[i, :tokens]
        return found


def numbers(given: Sequence[Any]) -> torch.Tensor:
    """fp32 numbers on the CPU, whatever the default dtype and device are, as they may be another model's."""
    return torch.tensor(given, dtype=torch.float32, device="cpu")


def _clear(part: torch.Tensor, kind: str) -> None:
    """Make lines of a bank neutral, without waiting for the device."""
    for column, number in enumerate(_NEUTRAL.get(kind, ())):
        part[..., column].fill_(number)
    if kind not in _NEUTRAL:
        part.zero_()


def _room(bank: Bank, device: torch.device) -> torch.Tensor:
    """An unwritten bank ``(sites, length, width)``: each site's part is in one piece and begins at an aligned address.

    Kernels are compiled for aligned tensors; a part that began elsewhere would be copied in every call.
    """
    numbers = bank.length * bank.width
    step = ALIGNMENT // bank.dtype.itemsize
    pitch = -(-numbers // step) * step if len(bank.sites) > 1 else numbers
    shape, strides = (len(bank.sites), bank.length, bank.width), (pitch, bank.width, 1)
    return torch.empty_strided(shape, strides, dtype=bank.dtype, device=device)


def _block(bank: Bank, count: int, values: Mapping[SiteKey, torch.Tensor]) -> torch.Tensor:
    """Lines of every site of a bank, ``(sites, count, width)`` on the CPU in the bank's dtype."""
    lines = [torch.atleast_2d(values[site]) if site in values else None for site in bank.sites]
    neutral = torch.tensor(_NEUTRAL.get(bank.kind, (0.0,)), dtype=torch.float32, device="cpu")
    if all(part is not None and part.size(0) == count for part in lines):
        block = torch.stack([part for part in lines if part is not None])
    else:
        block = neutral.expand(len(bank.sites), count, bank.width).clone()
        for i, part in enumerate(lines):
            if part is not None:
                block[i, : part.size(0)] = part
    cast = block.to(bank.dtype)
    if not bank.kind.endswith("_set") and not bool(torch.isfinite(cast).all()):
        raise VectorError(
            f"a sum of vectors overflows the table's dtype {bank.dtype}; scale them down or set dtype in the spec"
        )
    return cast
