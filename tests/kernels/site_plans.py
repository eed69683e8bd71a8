"""Plans of template sites with real tables, and the calls that a graph makes of them, for tests of the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer_compile import SteerSpec
from steer_compile.ir import Edit, Fusion, Norm, Plan, Site, SiteTable
from steer_compile.kernels.site import SiteArgs
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.runtime.tables import TableSet
from steer_compile.spec import OP_FAMILIES
from tests.kernels.site_inputs import FAMILIES, PACKED

SITES, ROWS, CLAMPS, CHOSEN = 3, 2, 3, 5
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FORMS = ("whole", "misaligned", "strided")
"""How a value of the stream may lie in memory."""


@dataclass(frozen=True)
class Setup:
    """One kind of template site. ``families``: what is done there, some of `FAMILIES`; ``norm``: a kind or nothing."""

    families: tuple[str, ...] = FAMILIES
    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    table: torch.dtype = torch.bfloat16
    norm: str = "rms"
    weight: torch.dtype | None = torch.bfloat16
    bias: torch.dtype | None = None
    max_tokens: int = 4096

    def weights(self) -> dict[str, torch.dtype]:
        """Dtypes by the names of the nodes in `plan`."""
        found = {"weight": self.weight, "bias": self.bias}
        return {name: dtype for name, dtype in found.items() if dtype is not None}

    def plan(self) -> Plan:
        """A plan of `SITES` sites, each lowered to the template."""
        ops = tuple(op for op in OP_FAMILIES if op in self.families)
        stored = {"capture", PACKED} & set(self.families)
        hooks: dict[str, Any] = {"capture": ("post_block",)} if stored else {}
        hooks |= {"capture_rows": CHOSEN} if PACKED in stored else {}
        hooks |= {"steer": ("post_block",), "ops": ops} if ops else {}
        dtype, room = DTYPE_NAMES[self.table], {"rows": ROWS, "clamps": CLAMPS, "max_tokens": self.max_tokens}
        spec = SteerSpec(**hooks, dtype=dtype, **room)  # type: ignore[arg-type]
        sites = tuple(
            Site(n, "post_block", f"v{n}", self.width, self.dtype, (1, 7), "batch_first") for n in range(SITES)
        )
        plan = plan_edits(spec, SiteTable(sites, (), tuple(range(SITES))))
        return replace(plan, edits=tuple(self._lowered(plan, site) for site in sites))

    def _lowered(self, plan: Plan, site: Site) -> Edit:
        edits = [edit for edit in plan.edits if edit.site == site]
        ops = tuple(op for edit in edits for op in edit.ops)
        slots = tuple(slot for edit in edits for slot in edit.slots)
        return Edit(site, ops, slots, "template", self._fusion())

    def _fusion(self) -> Fusion:
        weight, bias = (name if name in self.weights() else None for name in ("weight", "bias"))
        norm = Norm(self.norm, "n", "v", (), weight, bias, eps=1e-6) if self.norm else None
        return Fusion("r", "b", norm) if "branch" in self.families else Fusion(norm=norm)


def tables_of(plan: Plan, device: str = "cpu") -> TableSet:
    """The runtime's own tensors for a plan."""
    room = {"rows": ROWS, "clamps": CLAMPS, "max_tokens": plan.max_tokens, "capture_rows": CHOSEN}
    tables = TableSet(SteerSpec(capture=("post_block",), **room))  # type: ignore[arg-type]
    tables.grow(plan.banks, torch.device(device))
    return tables


def value(tokens: int, width: int, dtype: torch.dtype, form: str, device: str = "cpu") -> Tensor:
    """A value (tokens, width) of zeros that lies in memory in one of `FORMS`."""
    if form == "misaligned":
        return torch.zeros(tokens * width + 1, dtype=dtype, device=device)[1:].view(tokens, width)
    if form == "strided":
        return torch.zeros(tokens, 2 * width, dtype=dtype, device=device)[:, 1::2]
    return torch.zeros(tokens, width, dtype=dtype, device=device)


def run_args(setup: Setup, plan: Plan, tables: TableSet, edit: Edit, tokens: int, form: str = "whole") -> SiteArgs:
    """What the graph hands to the op at a site: views of the runtime's tensors, and values of the stream."""
    device = str(tables.device)
    given: dict[str, Any] = {"stream": value(tokens, setup.width, setup.dtype, form, device)}
    if "branch" in setup.families:
        given["branch"] = value(tokens, setup.width, setup.dtype, form, device)
    for slot in edit.slots:
        whole = tables.tensors[slot.bank]
        given["capture" if slot.kind == PACKED else slot.kind] = (
            whole if slot.kind in ("capture", PACKED) else whole[slot.index]
        )
    if "choice" in given:
        given["capture_rows"] = tables.chosen.narrow(0, 0, tokens)
    if given.keys() & {"table", "rowprobe", "clamp", "sae"}:
        given["rows"] = tables.rows.narrow(0, 0, tokens)
    if "table" in given:
        given["scale"] = tables.scale
    if "tier" in given:
        given["gain"] = tables.gain.narrow(0, 0, tokens)
    if given.keys() & {"probe", "rowprobe"}:
        given["decode"] = tables.decode.narrow(0, 0, tokens)
    if setup.norm:
        for name, dtype in setup.weights().items():
            given[name] = torch.zeros(setup.width, dtype=dtype, device=device)
        given |= {"norm": setup.norm, "eps": 1e-6, "offset": 0.0}
    return SiteArgs(**given, clamps=CLAMPS if "clamp" in setup.families else 0)


def run_time_calls(setup: Setup, counts: tuple[int, ...], device: str = "cpu") -> Iterator[SiteArgs]:
    """Calls of every site, with each number of tokens and each form of the stream."""
    plan = setup.plan()
    tables = tables_of(plan, device)
    for edit in plan.edits:
        for tokens in counts:
            for form in FORMS:
                yield run_args(setup, plan, tables, edit, tokens, form)
