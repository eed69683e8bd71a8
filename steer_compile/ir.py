"""Frozen values that passes exchange: sites, misses, edits, plans and layouts. None holds a tensor or a node."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

Dim: TypeAlias = int | sympy.Expr
ROWS = "steer_rows"
SCALE = "steer_scale"
"""Buffer names of the token's row index and of the rows' scales in every instrumented graph."""


def bank_name(index: int) -> str:
    """Buffer name of a bank."""
    return f"steer_bank_{index}"


@dataclass(frozen=True)
class Site:
    """One value of the residual stream (or of a branch) in one graph.

    Attributes:
        node: name of the FX node that holds the value.
        width: size of the last dimension.
        shape: leading dimensions, ints or sympy expressions, last dimension excluded.
        layout: ``batch_first`` (B, T, H), ``time_first`` (T, B, H), ``flat`` (B*T, H) or ``streams`` (B, T, m, H) with
            width m*H.
        users: names of the nodes whose reads an edit redirects; ``None`` means every later read.
        skip_users: of these, the reads on the skip path (what ``placement="after_norm"`` redirects).
    """

    layer: int
    hook: str
    node: str
    width: int
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    layout: str
    users: tuple[str, ...] | None = None
    skip_users: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.hook}"

    def text(self) -> str:
        """One line: ``layers.3.post_block = add_7 : bf16[s0, s1, 4096] batch_first``."""
        dims = ", ".join(str(d) for d in (*self.shape, self.width))
        return f"{self.name} = {self.node} : {dtype_text(self.dtype)}[{dims}] {self.layout}"


@dataclass(frozen=True)
class Miss:
    """Why a hook has no value. ``layer`` is None when the reason holds for the whole graph."""

    layer: int | None
    hook: str
    reason: str
    near: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{'*' if self.layer is None else self.layer}.{self.hook}"

    def text(self) -> str:
        near = f" (nearest: {', '.join(self.near)})" if self.near else ""
        return f"{self.name} : {self.reason}{near}"


@dataclass(frozen=True)
class SiteTable:
    """Every site of a graph and the reason for each hook without a value. ``layers`` are the block numbers."""

    sites: tuple[Site, ...] = ()
    misses: tuple[Miss, ...] = ()
    layers: tuple[int, ...] = ()
    partial: bool = False
    """Whether the graph is one of several of a model (a graph break cut it)."""
    unnumbered: bool = False
    """Whether the graph writes a stream whose layer numbers are unknown."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def find(self, hook: str, layer: int) -> Site | Miss:
        """The site, or the miss that says why there is none."""
        for site in self.sites:
            if site.hook == hook and site.layer == layer:
                return site
        for miss in self.misses:
            if miss.hook in (hook, "*") and miss.layer in (layer, None):
                return miss
        if layer not in self.layers:
            span = f"layers {self.layers[0]} to {self.layers[-1]}" if self.layers else "no layers"
            return Miss(layer, hook, f"the graph has {span}")
        have = sorted({s.hook for s in self.sites if s.layer == layer})
        return Miss(layer, hook, f"this block has no such value; it has {', '.join(have) or 'none'}")

    def where(self, keep: Callable[[Site], bool]) -> SiteTable:
        """The table with only the sites that ``keep`` accepts."""
        return SiteTable(tuple(s for s in self.sites if keep(s)), self.misses, self.layers, self.partial)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def text(self) -> str:
        """One line for each site, then one for each miss."""
        return "\n".join([*(s.text() for s in self.sites), *(m.text() for m in self.misses)])


@dataclass(frozen=True)
class Slot:
    """Place of a site in a backing tensor: bank number and index in it."""

    bank: int
    index: int


@dataclass(frozen=True)
class Bank:
    """One backing tensor ``(sites, rows or tokens, width)``: all steered sites of a width and dtype, or one capture."""

    kind: str
    width: int
    dtype: torch.dtype
    sites: tuple[tuple[str, int], ...]
    length: int

    def text(self) -> str:
        return f"{self.kind}: {dtype_text(self.dtype)}[{len(self.sites)}, {self.length}, {self.width}]"


@dataclass(frozen=True)
class Edit:
    """One operation at one site. ``op`` is ``capture`` or ``add_rows``."""

    site: Site
    op: str
    slot: Slot

    def text(self) -> str:
        readers = "" if self.site.users is None else f" -> {', '.join(self.site.users)}"
        return f"{self.op} {self.site.text()} <- bank {self.slot.bank}[{self.slot.index}]{readers}"


@dataclass(frozen=True)
class Plan:
    """Edits of one graph in the order in which they are spliced, and the banks that they use."""

    edits: tuple[Edit, ...]
    banks: tuple[Bank, ...]
    max_tokens: int

    def text(self) -> str:
        """Golden text, debug print and compile-cache key at once."""
        banks = [f"bank {i} {bank.text()}" for i, bank in enumerate(self.banks)]
        return "\n".join([f"tokens: {self.max_tokens}", *banks, *(edit.text() for edit in self.edits)])

    def digest(self) -> str:
        """Hex digest of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def dtype_text(dtype: torch.dtype) -> str:
    """Short dtype name: ``bf16``, ``f32``."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
