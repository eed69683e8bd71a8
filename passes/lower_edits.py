"""Plan -> Plan: for each site, the compiler's own fusion or the template of `kernels/site.py`.

::

    compiler   plain operators behind the value; Inductor folds pointwise work into its own kernels
    template   one kernel: residual add + edits + norm; the add and the norm leave the graph

A site is fit for the template when the value is in a layout and dtype that the kernel takes, on a CUDA device, outside
of autograd. ``auto`` takes it where it replaces the kernel that Inductor would write for the add and the norm, so that
nothing is launched in addition, and where the measured cost table (kernels/site_costs.py) says that it is faster. Where
it cannot replace that kernel, it stands behind the value (unfused) if reductions cost the compiler more than that.
Every choice says why in ``Edit.why``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import fx

from steer_compile import torch_compat
from steer_compile.errors import LoweringError
from steer_compile.ir import Edit, Fusion, Norm, Plan, Site, dtype_text
from steer_compile.kernels.site_costs import site_costs
from steer_compile.kernels.site_launch import MAX_CLAMPS, MAX_ROW, MAX_WIDTH
from steer_compile.passes.dataflow import Dataflow, build_dataflow, dtype_of, is_inplace, op_name, same_dims
from steer_compile.passes.norms import match_norms, norm_of_sum

DEVICES = ("cuda",)
"""Devices that run Triton kernels."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY_CALLS = ("linear", "matmul", "bmm", "mm", "addmm", "conv1d", "embedding")
"""Operators whose result lies in memory in any case, so that reading it in the template costs no kernel."""
REDUCTIONS = frozenset(("monitor", "row_monitor", "clamp", "sae"))
UNFUSED = 1.5
"""What an unfused template costs by the cost table's time of a fused one: it reads and writes the row once more."""
VIEWS = ("view", "reshape", "contiguous", "transpose", "squeeze", "unsqueeze", "flatten", "unflatten", "dropout")


def lower_edits(plan: Plan, gm: fx.GraphModule, lowering: str, device: str = "") -> Plan:
    """Choose the lowering of each edit.

    Args:
        lowering: ``auto``, or the one lowering to use.
        device: kind of device that the graph is for, "" for that of its values.

    Raises:
        LoweringError: ``template`` was asked for at a site that it cannot serve.
    """
    nodes, flow = {n.name: n for n in gm.graph.nodes}, build_dataflow(gm.graph)
    plan = _gated(plan, nodes, flow)
    if lowering == "compiler":
        return plan
    choice = _Choice(nodes, flow, match_norms(gm.graph), plan, device)
    groups: dict[str, list[Edit]] = {}
    edits = [replace(edit, why=_APART[edit.detects]) for edit in plan.edits if _is_apart(edit)]
    for edit in plan.edits:
        if not _is_apart(edit):
            groups.setdefault(edit.site.node, []).append(edit)
    for group in groups.values():
        edits += choice.lower(group, forced=lowering == "template")
    place = {(edit.site, edit.detects, _is_apart(edit)): i for i, edit in enumerate(plan.edits)}
    ordered = sorted(edits, key=lambda edit: place[edit.site, edit.detects, _is_apart(edit)])
    return replace(plan, edits=tuple(ordered))


_APART = {True: "gates for the sites behind are plain operators", False: "decoding from features has its own kernels"}


def _is_apart(edit: Edit) -> bool:
    """Whether an edit is neither plain operators at its value nor part of the template."""
    return edit.detects or edit.decodes


def _gated(plan: Plan, nodes: Mapping[str, fx.Node], flow: Dataflow) -> Plan:
    """Mark the edits that steer behind the first monitor that opens gates for others."""
    values = {edit: nodes[edit.site.node] for edit in plan.edits}
    places = {edit: flow.order[flow.writers.get(value, [value])[-1]] for edit, value in values.items()}
    first = min((places[edit] for edit in plan.edits if edit.detects), default=math.inf)
    return replace(plan, edits=tuple(
        replace(edit, gated=True) if not edit.detects and edit.ops != ("capture",) and places[edit] >= first else edit
        for edit in plan.edits
    ))  # fmt: skip


@dataclass
class _Choice:
    nodes: Mapping[str, fx.Node]
    flow: Dataflow
    norms: Mapping[str, tuple[Norm, ...]]
    plan: Plan
    device: str = ""

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
        fusion, extra = self._fusion(merged)
        template, compiler = site_costs(merged.ops, _tokens(merged.site), merged.site.width)
        if extra and not forced:
            template, fusion = UNFUSED * template, Fusion(norm=fusion.norm)
        text = f"template {template:.1f} us, compiler {compiler:.1f} us by the cost table"
        text = f"unfused: {extra}; {text}" if extra else text
        # An unfused template reads the rounded sum, which will not do for a norm of the unrounded one.
        exact = fusion.norm is not None and fusion.norm.exact
        kept = extra and (exact or not REDUCTIONS & set(merged.ops))
        if (kept or compiler <= template) and not forced:
            return [replace(edit, why=text) for edit in group]
        return [replace(merged, lowering="template", fusion=fusion, why=text)]

    def _unfit(self, group: list[Edit]) -> str:
        """Why the template cannot serve these edits, or nothing."""
        site, value = group[0].site, self.nodes[group[0].site.node].meta["example_value"]
        device = self.device or value.device.type
        tables = {self.plan.banks[s.bank].dtype for e in group for s in e.slots if s.kind in ("table", "clamp", "sae")}
        reasons = {
            "it can be patched, and the kernel has no stage for that": any("patch" in e.ops for e in group),
            "Triton is not installed": find_spec("triton") is None,
            "the graph is trained through, and the kernel has no backward": value.requires_grad
            and torch.is_grad_enabled(),
            f"it is on {device}, and Triton kernels run on {', '.join(DEVICES)}": device not in DEVICES,
            f"its dtype is {dtype_text(site.dtype)}": site.dtype not in DTYPES or not tables <= set(DTYPES),
            f"its rows of {site.width} numbers are wider than {MAX_WIDTH}": site.width > MAX_WIDTH,
            f"it has {self.plan.clamps} clamps for each row, more than {MAX_CLAMPS}": self.plan.clamps > MAX_CLAMPS
            and any("clamp" in e.ops for e in group),
            "its tokens are time first": site.layout == "time_first",
            "a monitor for the sites behind it reads its value": any(
                edit.detects and edit.site.node == site.node for edit in self.plan.edits
            ),
            "several hooks are at this value": len({e.site.hook for e in group}) > 1 or len(group) > 2,
            "it is written in place": site.node in {n.name for n in self.flow.hazards},
        }
        return next((reason for reason, holds in reasons.items() if holds), self._unrounded(group))

    def _unrounded(self, group: list[Edit]) -> str:
        """Why the template cannot keep the unrounded sum for the norm that reads it, or nothing."""
        site, value = group[0].site, self.nodes[group[0].site.node]
        if site.dtype == torch.float32 or all(reader.target is not norm_of_sum for reader in value.users):
            return ""
        taken = self._is_add(value, site) and all(self._norm(edit.site, value) is not None for edit in group)
        return "" if taken else "its norm reads the unrounded sum, and the template cannot take that norm over"

    def _merged(self, group: list[Edit]) -> Edit:
        ordered = sorted(group, key=lambda e: "capture" not in e.ops)
        ops = tuple(op for edit in ordered for op in edit.ops)
        return replace(ordered[-1], ops=ops, slots=tuple(slot for edit in ordered for slot in edit.slots))

    def _fusion(self, edit: Edit) -> tuple[Fusion, str]:
        """What the template takes over, and what keeps it from replacing the compiler's kernel (or nothing)."""
        value = self.nodes[edit.site.node]
        norm = self._norm(edit.site, value)
        if not self._is_add(value, edit.site):
            return Fusion(norm=norm), "no add of two values makes it"
        first, second = (node for node in value.args[:2] if isinstance(node, fx.Node))
        for residual, operand in ((first, second), (second, first)):
            fusion = self._branch(residual, operand, value, norm)
            if fusion is not None and self._in_memory(residual):
                return fusion, "" if norm or fusion.branch_norm else "no norm that the template knows reads it"
        fusion = Fusion(first.name, second.name, norm, operand=second.name)
        if not self._in_memory(first) and not self._in_memory(second):
            return fusion, "both operands of the add are computed by pointwise operators, which Inductor fuses with it"
        return fusion, "an operand of the add is computed by pointwise operators, which Inductor fuses with it"

    def _branch(self, residual: fx.Node, operand: fx.Node, add: fx.Node, norm: Norm | None) -> Fusion | None:
        """The fusion with a branch that lies in memory, its norm and its multiplier on the way to the add."""
        if self._in_memory(operand):
            return Fusion(residual.name, operand.name, norm, operand=operand.name)
        node, scale, reader = operand, 1.0, add
        factor = self._multiplier(node, reader)
        if factor is not None:
            scale, reader, node = factor[1], node, factor[0]
        own = self._own_norm(node, reader)
        node = self.nodes[own.value] if own is not None else node
        # What is read at the add must be what the norm read: neither steered nor written in place on the way.
        edited = {edit.site.node for edit in self.plan.edits}
        changed = node.name in edited or any(is_inplace(user) and user.args[0] is node for user in node.users)
        if residual is operand or changed or node in self.flow.hazards or not self._in_memory(node):
            return None
        return Fusion(residual.name, node.name, norm, own, scale, operand.name)

    def _multiplier(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, float] | None:
        """Node and number of a product that only ``reader`` reads, in the dtype of the node."""
        if op_name(node) != "mul" or is_inplace(node) or node.kwargs or not self._between(node, reader):
            return None
        for value, number in (node.args[:2], node.args[1::-1]):
            plain = isinstance(number, int | float) and not isinstance(number, bool)
            if isinstance(value, fx.Node) and plain and dtype_of(value) == dtype_of(node):
                return value, float(number)  # type: ignore[arg-type]
        return None

    def _own_norm(self, node: fx.Node, reader: fx.Node) -> Norm | None:
        """The norm whose result is ``node``, which only ``reader`` reads."""
        found = [norm for norms in self.norms.values() for norm in norms if norm.node == node.name]
        return found[0] if found and not found[0].exact and self._between(node, reader) else None

    def _between(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether a node may go: no site is at it, and nothing but ``reader`` reads it."""
        edited = {edit.site.node for edit in self.plan.edits}
        return list(node.users) == [reader] and node.name not in edited and node not in self.flow.hazards

    def _norm(self, site: Site, value: fx.Node) -> Norm | None:
        """The one norm of the value, unless another edit is at its result or only some readers are steered."""
        found = self.norms.get(value.name, ())
        edited = {edit.site.node for edit in self.plan.edits}
        if len(found) != 1 or site.users is not None or found[0].node in edited:
            return None
        if any(edit.decodes and edit.site.node == value.name for edit in self.plan.edits):
            return None  # what the norm reads is made behind the template
        if any(_quantises(reader) for reader in self.nodes[found[0].node].users):
            return None  # the compiler writes norm and quantisation in one kernel, or the engine has one for both
        weights = [self.nodes[name] for name in (found[0].weight, found[0].bias) if name is not None]
        early = all(self.flow.order[weight] < self.flow.order[value] for weight in weights)
        early &= not found[0].exact or site.width <= MAX_ROW
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
        return stored or op_name(node) in LIBRARY_CALLS or _is_opaque(node)


def _is_opaque(node: fx.Node) -> bool:
    """Whether a node, or the call whose result it picks, is an operator that Inductor knows nothing of."""
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    library = str(node.target).partition(".")[0]
    return torch_compat.overload_name(node.target) is not None and library not in ("aten", "prims", "vllm_ir")


def _quantises(node: fx.Node) -> bool:
    """Whether a node turns numbers into ones of 8 bits."""
    made = node.meta.get("example_value")
    results = made if isinstance(made, tuple | list) else (made,)
    numbers = [t.dtype for t in results if isinstance(t, torch.Tensor) and t.dtype != torch.bool]
    return any(dtype.itemsize == 1 for dtype in numbers) or "quant" in op_name(node)


def _tokens(site: Site) -> int | None:
    """Tokens of a call, None where the graph serves any number."""
    sizes = [dim for dim in site.shape if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(site.shape) else None
