"""`SteeredModel`: the tables of one compiled model of vLLM, and the splice that leads them to its sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.utils.dlpack import from_dlpack

from steer_compile import torch_compat, watch
from steer_compile.errors import LoweringError, SiteNotFound
from steer_compile.ir import DECODE, GAIN, ROWS, SCALE, SLOT, Bank, Miss, Plan, Site, bank_name, slot_name
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.lower_edits import lower_edits
from steer_compile.passes.plan_edits import plan_edits, reserve_banks
from steer_compile.passes.splice import splice
from steer_compile.passes.stages import summed_end
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, SteerSpec
from steer_compile.vllm.anchor import anchored, raised
from steer_compile.vllm.autoencoders import SAESpec


@dataclass(frozen=True)
class Shape:
    """What a model's stream looks like: width and dtype, the layers that this process has, and those of the model."""

    width: int
    dtype: torch.dtype
    layers: range
    n_layers: int

    @property
    def whole(self) -> Shape:
        """The same with all of the model's layers."""
        return replace(self, layers=range(self.n_layers))

    @property
    def cut(self) -> bool:
        """Whether this process has a stage of a pipeline."""
        return len(self.layers) < self.n_layers

    def owns(self, site: SiteKey) -> bool:
        """Whether the site's value is in this process's graph. The stream between two layers is that of the process
        with the later one, which forms it: a stage hands it on in two parts."""
        hook, layer = site
        behind = hook == "post_block" and layer != self.n_layers - 1
        return layer + behind in self.layers

    def elsewhere(self, site: SiteKey) -> bool:
        """Whether the site's value is in another process's graph."""
        return site[1] in range(self.n_layers) and not self.owns(site)


class SteeredModel:
    """Tables that are there before the model is traced, in the order that its graph will have.

    Attributes:
        registry: vectors and rows.
        plans: what was spliced; empty where vLLM loaded a compiled artifact, whose key vouches for it.
    """

    def __init__(self, spec: SteerSpec, shape: Shape, device: torch.device, saes: Iterable[SAESpec] = ()) -> None:
        self.spec = spec
        self.plans: list[Plan] = []
        self._shape = shape
        self.registry = Registry(spec, shape.elsewhere)
        self.registry.reserve(expected_banks(spec, shape), device)
        for sae in saes:
            sae.attach(self.registry)
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
        sites = [site for bank in self.registry.tables.banks for site in bank.sites]
        if sites:  # else all that the spec steers is in other stages
            with opened_sums(gm), self._end(gm) as end:
                plan = self._planned(gm, list(dict.fromkeys(sites)))
                _check_end(plan, end)
                watch.show("splice", "before", gm, plan=plan)
                splice(gm, plan, dict(zip(self._tables, nodes, strict=True)))
                watch.show("splice", "after", gm, plan=plan)
            self.plans.append(plan)
        torch_compat.complete_examples(gm.graph)
        gm.graph.lint()
        gm.recompile()

    @contextmanager
    def _end(self, gm: fx.GraphModule) -> Iterator[str]:
        """The graph with the sum that it hands on, by name, where it is no last stage."""
        if self._shape.layers.stop == self._shape.n_layers:
            yield ""
            return
        with summed_end(gm) as name:
            yield name

    def _planned(self, gm: fx.GraphModule, sites: list[SiteKey]) -> Plan:
        """The plan of the graph, whose sites are in the banks that were made for them.

        Raises:
            SiteNotFound, LoweringError: as in `splice`.
        """
        shape, banks = self._shape, self.registry.tables.banks
        watch.show("find_sites", "before", gm)
        table = find_sites(gm, cut=shape.layers if shape.cut else None)
        watch.show("find_sites", "after", gm, table)
        if len(table.layers) != len(shape.layers):
            why = table.misses[0].reason if table.misses and not table.layers else "`steer-compile sites` shows which"
            raise SiteNotFound(
                f"{len(table.layers)} layers were found in the graph, and the model has {len(shape.layers)} here: "
                f"{why}; this model cannot be steered in vLLM" + " with pipeline_parallel_size > 1" * shape.cut
            )
        for hook, layer in sites:
            found = table.find(hook, layer)
            if isinstance(found, Miss):
                raise SiteNotFound(
                    f"no site {found.name}: {found.reason}; leave it out of the spec, by the layers of {hook}"
                )
        spec = own_part(self.spec, shape) if shape.cut else self.spec
        plan = plan_edits(spec, table, banks)
        watch.show("plan_edits", "after", gm, plan=plan)
        plan = lower_edits(plan, gm, spec.lowering)
        watch.show("lower_edits", "after", gm, plan=plan)
        if plan.banks != banks:
            raise LoweringError(f"a site is not what the model's configuration says: {_other(plan, banks)}")
        return plan


def own_part(spec: SteerSpec, shape: Shape) -> SteerSpec:
    """The spec with the sites of this process alone, by the numbers of their layers. It must have some."""

    def own(selections: tuple[HookSelection, ...]) -> list[HookSelection]:
        found = []
        for selection in selections:
            given = range(shape.n_layers) if isinstance(selection.layers, str) else selection.layers
            numbers = sorted({int(n) % shape.n_layers for n in given})
            layers = [n for n in numbers if shape.owns((selection.hook, n))]
            found += [HookSelection(selection.hook, layers, selection.ops)] if layers else []
        return found

    given = {name: [s.to_dict() for s in own(vars(spec)[name])] for name in ("steer", "capture")}
    return SteerSpec.from_dict({**spec.to_dict(), **given})


def _check_end(plan: Plan, end: str) -> None:
    """Raise `SiteNotFound` for an edit of the sum that another stage forms."""
    beyond = [edit.site for edit in plan.edits if edit.site.node == end]
    if beyond:
        raise SiteNotFound(
            f"no site {beyond[0].name}: behind the last layer of a pipeline stage the stream is in two parts, which "
            f"the next stage adds up; name it post_block, and leave the layer out of those of {beyond[0].hook}"
        )


def _parts(tables: TableSet) -> dict[str, Tensor]:
    """Tables by the names that the splice gives them: a tensor for each site, so that layers differ in their inputs
    alone; the bank of a capture or a log has one site. Each is the same memory as its part of the bank, as a storage of
    its own: the place in a storage is part of a compiled piece's key."""
    found: dict[str, Tensor] = {}
    for i, (bank, tensor) in enumerate(zip(tables.banks, tables.tensors, strict=True)):
        if bank.kind in ("capture", "score", "full_log"):
            found[bank_name(i)] = tensor
        if bank.kind not in ("capture", "full_log"):
            found |= {slot_name(i, k): from_dlpack(tensor[k]) for k in range(len(bank.sites))}
    remembers = any(bank.kind == "state" for bank in tables.banks)
    return found | tables.named((ROWS, SCALE, GAIN, DECODE, *(SLOT,) * remembers))


def expected_banks(spec: SteerSpec, shape: Shape) -> tuple[Bank, ...]:
    """Banks of the sites that the spec names in this process's graph, none where other stages have all of them.

    Raises:
        SiteNotFound: it names a layer that the model does not have.
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
        raise SiteNotFound(
            f"{wide[0]} is of parallel streams, and in vLLM these are neither steered nor captured: it runs such "
            "models without a graph on GPUs, and by operators of its own on CPUs; run the model in plain PyTorch, or "
            "choose another hook"
        )
    own = [(hook, n) for hook in sorted(hooks) for n in range(shape.n_layers) if shape.owns((hook, n))]
    sites = [Site(n, hook, "", shape.width, shape.dtype, (), "flat") for hook, n in own]
    return reserve_banks(spec, sites, shape.n_layers)


def _other(plan: Plan, banks: tuple[Bank, ...]) -> str:
    return next((bank.text() for bank in plan.banks if bank not in banks), "fewer sites than expected")
