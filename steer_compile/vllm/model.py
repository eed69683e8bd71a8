"""`SteeredModel`: the tables of one compiled model of vLLM, and the splice that leads them to its sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils.dlpack import from_dlpack

from steer_compile import torch_compat
from steer_compile.errors import LoweringError, SiteNotFound
from steer_compile.ir import DECODE, GAIN, ROWS, SCALE, Bank, Miss, Plan, Site, bank_name, slot_name
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.lower_edits import lower_edits
from steer_compile.passes.plan_edits import plan_edits, reserve_banks
from steer_compile.passes.splice import splice
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.tables import TableSet
from steer_compile.spec import SteerSpec
from steer_compile.vllm.anchor import anchored, raised


@dataclass(frozen=True)
class Shape:
    """What a model's stream looks like: width and dtype, the layers that this process has, and those of the model."""

    width: int
    dtype: torch.dtype
    layers: range
    n_layers: int


class SteeredModel:
    """Tables that are there before the model is traced, in the order that its graph will have.

    Attributes:
        registry: vectors and rows.
        plans: what was spliced; empty where vLLM loaded a compiled artifact, whose key vouches for it.
    """

    def __init__(self, spec: SteerSpec, shape: Shape, device: torch.device) -> None:
        self.spec = spec
        self.plans: list[Plan] = []
        self._n_layers = len(shape.layers)
        self.registry = Registry(spec)
        self.registry.reserve(expected_banks(spec, shape), device)
        self._tables = _parts(self.registry.tables)

    def attach(self, model: nn.Module) -> None:
        """Give the model its tables, before it is compiled."""
        anchored(model, self._tables)

    def splice(self, gm: fx.GraphModule) -> None:
        """Rewrite the model's graph in place.

        Raises:
            SiteNotFound: the graph lacks a site that the spec asks for. LoweringError: a site of another width or
                dtype than the model's stream.
        """
        nodes = raised(gm)
        with opened_sums(gm):
            table = find_sites(gm, False)
            banks = self.registry.tables.banks
            if len(table.layers) != self._n_layers:
                raise SiteNotFound(
                    f"{len(table.layers)} layers were found in the graph, and the model has {self._n_layers} here; "
                    "`steer-compile sites` shows what was found; this model cannot be steered in vLLM"
                )
            for hook, layer in dict.fromkeys(site for bank in banks for site in bank.sites):
                found = table.find(hook, layer)
                if isinstance(found, Miss):
                    raise SiteNotFound(
                        f"no site {found.name}: {found.reason}; leave it out of the spec, by the layers of {hook}"
                    )
            plan = lower_edits(plan_edits(self.spec, table, banks), gm, self.spec.lowering)
            if plan.banks != banks:
                raise LoweringError(f"a site is not what the model's configuration says: {_other(plan, banks)}")
            splice(gm, plan, dict(zip(self._tables, nodes, strict=True)))
        torch_compat.complete_examples(gm.graph)
        gm.graph.lint()
        gm.recompile()
        self.plans.append(plan)


def _parts(tables: TableSet) -> dict[str, Tensor]:
    """Tables by the names that the splice gives them: a tensor for each site, so that layers differ in their inputs
    alone; a capture's bank has one site. Each is the same memory as its part of the bank, as a storage of its own: the
    place in a storage is part of a compiled piece's key."""
    found: dict[str, Tensor] = {}
    for i, (bank, tensor) in enumerate(zip(tables.banks, tables.tensors, strict=True)):
        if bank.kind == "capture":
            found[bank_name(i)] = tensor
        else:
            found |= {slot_name(i, k): from_dlpack(tensor[k]) for k in range(len(bank.sites))}
    return found | tables.named((ROWS, SCALE, GAIN, DECODE))


def expected_banks(spec: SteerSpec, shape: Shape) -> tuple[Bank, ...]:
    """Banks of the sites that the spec names in this process's layers.

    Raises:
        SiteNotFound: it names none, or a layer that the model does not have.
    """
    hooks = {s.hook for s in (*spec.steer, *spec.capture)}
    for selection in (*spec.steer, *spec.capture):
        beyond = [n for n in selection.layers if isinstance(n, int) and not -shape.n_layers <= n < shape.n_layers]
        if beyond:
            raise SiteNotFound(
                f"no site layers.{beyond[0]}.{selection.hook}: the model has layers 0 to {shape.n_layers - 1}; "
                "name one of these in the spec"
            )
    wide = sorted(h for h in hooks if h.startswith("mhc_"))
    if wide:
        raise SiteNotFound(f"{wide[0]} is of parallel streams, which are not steered in vLLM; choose another hook")
    sites = [Site(n, hook, "", shape.width, shape.dtype, (), "flat") for hook in sorted(hooks) for n in shape.layers]
    return reserve_banks(spec, sites, shape.n_layers)


def _other(plan: Plan, banks: tuple[Bank, ...]) -> str:
    return next((bank.text() for bank in plan.banks if bank not in banks), "fewer sites than expected")
