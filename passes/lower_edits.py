"""Plan -> Plan: for each site, the compiler's own fusion or the template of `kernels/site.py`.

::

    compiler   plain operators behind the value; Inductor folds pointwise work into its own kernels
    template   one kernel: residual add + edits + norm; the add and the norm leave the graph

A site is fit for the template when the value is in a layout and dtype that the kernel takes, on a CUDA device, outside
of autograd. ``auto`` takes it where it replaces the kernel that Inductor would write for the add and the norm, so that
nothing is launched in addition, and where the measured cost table (kernels/site_costs.py) says that it is faster.
Every choice says why in ``Edit.why``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import fx

from steer_compile.errors import LoweringError
from steer_compile.ir import Edit, Fusion, Norm, Plan, Site, dtype_text
from steer_compile.kernels.site_costs import site_costs
from steer_compile.kernels.site_launch import MAX_WIDTH
from steer_compile.passes.dataflow import Dataflow, build_dataflow, is_inplace, op_name, same_dims
from steer_compile.passes.norms import match_norms

DEVICES = ("cuda",)
"""Devices that run Triton kernels."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY_CALLS = ("linear", "matmul", "bmm", "mm", "addmm", "conv1d", "embedding")
"""Operators whose result lies in memory in any case, so that reading it in the template costs no kernel."""
VIEWS = ("view", "reshape", "contiguous", "transpose", "squeeze", "unsqueeze", "flatten", "unflatten", "dropout")


def lower_edits(plan: Plan, gm: fx.GraphModule, lowering: str) -> Plan:
    """Choose the lowering of each edit.

    Args:
        lowering: ``auto``, or the one lowering to use.

    Raises:
        LoweringError: ``template`` was asked for at a site that it cannot serve.
    """
    if lowering == "compiler":
        return plan
    choice = _Choice({n.name: n for n in gm.graph.nodes}, build_dataflow(gm.graph), match_norms(gm.graph), plan)
    groups: dict[str, list[Edit]] = {}
    for edit in plan.edits:
        groups.setdefault(edit.site.node, []).append(edit)
    edits: list[Edit] = []
    for group in groups.values():
        edits += choice.lower(group, forced=lowering == "template")
    return replace(plan, edits=tuple(edits))


@dataclass
class _Choice:
    nodes: Mapping[str, fx.Node]
    flow: Dataflow
    norms: Mapping[str, tuple[Norm, ...]]
    plan: Plan

    def lower(self, group: list[Edit], forced: bool) -> list[Edit]:
        """The edits at one value, merged into one where the template takes them."""
        unfit = self._unfit(group)
        if unfit and forced:
            raise LoweringError(
                f"{group[0].site.name} cannot be lowered to the template: {unfit}; the lowerings are auto, compiler "
                "and template; use lowering='auto', which takes the compiler's own fusion there"
            )
        if unfit:
            return [replace(edit, why=unfit) for edit in group]
        merged = self._merged(group)
        fusion, extra = self._fusion(merged, forced)
        if extra and not forced:
            return [replace(edit, why=extra) for edit in group]
        template, compiler = site_costs(merged.ops, _tokens(merged.site))
        text = f"template {template:.1f} us, compiler {compiler:.1f} us by the cost table"
        if compiler <= template and not forced:
            return [replace(edit, why=text) for edit in group]
        return [replace(merged, lowering="template", fusion=fusion, why=extra or text)]

    def _unfit(self, group: list[Edit]) -> str:
        """Why the template cannot serve these edits, or nothing."""
        site, value = group[0].site, self.nodes[group[0].site.node].meta["example_value"]
        tables = {self.plan.banks[s.bank].dtype for e in group for s in e.slots if s.kind in ("table", "clamp")}
        reasons = {
            "Triton is not installed": find_spec("triton") is None,
            "the graph is trained through, and the kernel has no backward": value.requires_grad
            and torch.is_grad_enabled(),
            f"it is on {value.device.type}, and Triton kernels run on {', '.join(DEVICES)}": value.device.type
            not in DEVICES,
            f"its dtype is {dtype_text(site.dtype)}": site.dtype not in DTYPES or not tables <= set(DTYPES),
            f"its rows of {site.width} numbers are wider than {MAX_WIDTH}": site.width > MAX_WIDTH,
            "its tokens are time first": site.layout == "time_first",
            "several hooks are at this value": len({e.site.hook for e in group}) > 1 or len(group) > 2,
            "it is written in place": site.node in {n.name for n in self.flow.hazards},
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _merged(self, group: list[Edit]) -> Edit:
        ordered = sorted(group, key=lambda e: "capture" not in e.ops)
        ops = tuple(op for edit in ordered for op in edit.ops)
        return replace(ordered[-1], ops=ops, slots=tuple(slot for edit in ordered for slot in edit.slots))

    def _fusion(self, edit: Edit, forced: bool) -> tuple[Fusion, str]:
        """What the template takes over, and why Inductor would do better (or nothing)."""
        value = self.nodes[edit.site.node]
        norm = self._norm(edit.site, value)
        add = self._is_add(value, edit.site)
        if not add:
            return Fusion(norm=norm), "no add of two values makes it"
        residual, branch = (node.name for node in value.args[:2] if isinstance(node, fx.Node))
        fusion = Fusion(residual, branch, norm)
        if not self._in_memory(value.args[1]) and not self._in_memory(value.args[0]):
            return fusion, "both operands of the add are computed by pointwise operators, which Inductor fuses with it"
        if not (self._in_memory(value.args[0]) and self._in_memory(value.args[1])):
            return fusion, "an operand of the add is computed by pointwise operators, which Inductor fuses with it"
        return fusion, "" if norm is not None else "no norm that the template knows reads it"

    def _norm(self, site: Site, value: fx.Node) -> Norm | None:
        """The one norm of the value, unless another edit is at its result or only some readers are steered."""
        found = self.norms.get(value.name, ())
        edited = {edit.site.node for edit in self.plan.edits}
        if len(found) != 1 or site.users is not None or found[0].node in edited:
            return None
        weights = [self.nodes[name] for name in (found[0].weight, found[0].bias) if name is not None]
        early = all(self.flow.order[weight] < self.flow.order[value] for weight in weights)
        return found[0] if early else None  # the template stands where the value is made

    def _is_add(self, value: fx.Node, site: Site) -> bool:
        """Whether the value is a plain sum of two values of its own shape and dtype, all of whose readers follow."""
        plain = op_name(value) == "add" and not is_inplace(value)
        operands = [n for n in value.args if isinstance(n, fx.Node)]
        if not plain or value.kwargs or len(operands) != 2 or len(value.args) != 2 or site.users is not None:
            return False
        shape, dtype = value.meta["example_value"].shape, value.meta["example_value"].dtype
        examples = [n.meta.get("example_value") for n in operands]
        return all(isinstance(e, torch.Tensor) and same_dims(e.shape, shape) and e.dtype == dtype for e in examples)

    def _in_memory(self, node: object) -> bool:
        """Whether a value lies in memory without the add asking for it."""
        while isinstance(node, fx.Node) and op_name(node) in VIEWS:
            node = node.args[0]
        if not isinstance(node, fx.Node):
            return False
        edited = {edit.site.node for edit in self.plan.edits}
        stored = node.op == "placeholder" or node.name in edited or node.name in self.norms
        return stored or op_name(node) in LIBRARY_CALLS


def _tokens(site: Site) -> int | None:
    """Tokens of a call, None where the graph serves any number."""
    sizes = [dim for dim in site.shape if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(site.shape) else None
