"""Rewrite: put the plan's operations behind the values that they act on.

::

    %v = add(%r, %b)                       %v  = add(%r, %b)
    %n = norm(%v)                  ->      store_rows(%v, %capture0[slot], n)
    %s = add(%v, ...)                      %v' = steer_rows(%v, %table0[slot], %rows, %scale)
                                           %n  = norm(%v')
                                           %s  = add(%v', ...)

or, where the plan says template, ``%v', %n = site(%r, %b, ...)``: one kernel for the add, the edits and the norm.

The backing tensors are buffers of the graph module; nothing else of its signature changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from steer_compile import torch_compat
from steer_compile.errors import LoweringError
from steer_compile.ir import DECODE, GAIN, ROWS, SCALE, SLOT, Edit, Fusion, Plan, Site, bank_name
from steer_compile.kernels.detect import DetectArgs, detect
from steer_compile.kernels.gates import FACTORS
from steer_compile.kernels.patch_rows import PatchArgs, patch_rows
from steer_compile.kernels.steer_rows import SteerArgs, score_rows, steer_rows
from steer_compile.kernels.store_rows import store_packed, store_rows
from steer_compile.passes.buffers import Buffers
from steer_compile.passes.dataflow import Dataflow, build_dataflow, dtype_of
from steer_compile.passes.norms import norm_of_sum

CAPTURED = ("capture", "packed", "choice")
"""Kinds of banks that a capture has."""


def splice(gm: fx.GraphModule, plan: Plan, inputs: Mapping[str, fx.Node] | None = None) -> tuple[str, ...]:
    """Apply the plan to ``gm`` in place; returns the names of the buffers that the graph now reads.

    Args:
        inputs: nodes that hold the buffers by name, where the graph has them as inputs. Nothing but these is then
            shared between sites, so that a graph that is cut into pieces has equal pieces for equal layers.

    Raises:
        LoweringError: a planned value is not in this graph, or the graph is spliced already.
    """
    graph = gm.graph
    by_name = {n.name: n for n in graph.nodes}
    if any(n.op == "get_attr" and n.target == bank_name(0) for n in graph.nodes):
        raise LoweringError("another steer_backend has instrumented this graph; give one spec with the hooks of both")
    missing = [e.site for e in plan.edits if e.site.node not in by_name]
    if missing:
        raise LoweringError(f"{missing[0].name} is planned at {missing[0].node}, which this graph does not have")
    flow = build_dataflow(graph)
    _read_written_values(flow)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    splicer = _Splicer(plan, graph, flow, by_name, first, Buffers(graph, first, dict(inputs or {}), inputs is not None))
    for edit in sorted(plan.edits, key=lambda e: flow.order[_made(flow, by_name[e.site.node])]):
        splicer.apply(edit)
    splicer.finish()
    return tuple(splicer.buffers.nodes)


def _made(flow: Dataflow, value: fx.Node) -> fx.Node:
    """The node behind which a value is there."""
    return flow.writers.get(value, [value])[-1]


def attach(gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the graph module its buffers and compile its Python code anew."""
    for name, tensor in tensors.items():
        gm.register_buffer(name, tensor, persistent=False)
    gm.graph.lint()
    gm.recompile()


def _read_written_values(flow: Dataflow) -> None:
    """Make readers of a tensor that was written in place read the write's result: the same memory, but named."""
    for node, reads in flow.resolved.items():
        for argument, value in reads.items():
            if value is not argument and value not in flow.hazards:
                node.replace_input_with(argument, value)


@dataclass
class _Splicer:
    plan: Plan
    graph: fx.Graph
    flow: Dataflow
    by_name: Mapping[str, fx.Node]
    first: fx.Node
    buffers: Buffers
    current: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What a value's next capture sees: the value behind all edits so far that every reader sees."""
    reads: dict[fx.Node, dict[fx.Node, fx.Node]] = field(default_factory=dict)
    """``value -> {reader: node that it reads in its place}``."""
    following: dict[fx.Node, fx.Node] = field(default_factory=dict)
    gates: fx.Node | None = None
    """Factors of each token (T, 4), behind the monitors so far."""
    sums: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Unrounded form of sums, and of steered sums, by the node that holds the rounded one."""

    def _proxy(self, node: fx.Node) -> Any:
        """The node as a value that takes any operator."""
        return self.buffers.proxy(node)

    def apply(self, edit: Edit) -> None:
        value = self.by_name[edit.site.node]
        with self.graph.inserting_before(self._following(value)):
            if edit.detects:
                self._detect(edit, value)
            elif edit.lowering == "template":
                self._template(edit, value)
            elif edit.decodes:
                _decode(self, edit, value)
            elif "capture" in edit.ops:
                self._capture(edit, value)
            else:
                self._steer(edit, value)

    def finish(self) -> None:
        """Make norms of steered sums read the unrounded ones."""
        for rounded, unrounded in self.sums.items():
            for reader in list(rounded.users):
                if reader.target is norm_of_sum:
                    reader.replace_input_with(rounded, unrounded)

    def _capture(self, edit: Edit, value: fx.Node) -> None:
        h: Any = self._proxy(self.current.get(value, value))
        given = self.buffers.stored(edit, h)
        bank = given["capture"] if "choice" in given else self.buffers.part(edit.slot("capture"))
        lines, count = _batch_order(edit.site, _flat(edit.site, h)), self._proxy(self.buffers.count(edit.site, h))
        if "choice" in given:
            store_packed(lines, bank, given["capture_rows"], given["choice"], count)
        else:
            store_rows(lines, bank, count)

    def _detect(self, edit: Edit, value: fx.Node) -> None:
        """Open gates for the sites behind, of one line for each token in the order of the batch."""
        site = edit.site
        h: Any = self._proxy(self.current.get(value, value))
        given = self._data(edit, h, False)
        gates = (
            None if self.gates is None else self._proxy(self.buffers.lined_up(self.gates, site, h, False, (FACTORS,)))
        )
        args = DetectArgs(**{n: given[n] for n in DetectArgs._fields if n in given}, gates=gates)
        opened, found = detect(_flat(site, h), args, site.dtype)
        count = self._proxy(self.buffers.count(site, h))
        if "score" in edit.ops:
            store_rows(_batch_order(site, found), given["score"], count)
        self.gates = _batch_order(site, opened).reshape(count, FACTORS).node
        if self.buffers.apart:
            torch_compat.rename(self.gates, "steer_gates")

    def _steer(self, edit: Edit, value: fx.Node) -> None:
        """Steer what each of the site's readers reads; readers that see different values get operations each."""
        if "score" in edit.ops:
            h: Any = self._proxy(self.current.get(value, value))
            found = score_rows(_flat(edit.site, h), self._steer_args(edit, h), edit.site.dtype)
            count = self._proxy(self.buffers.count(edit.site, h))
            store_rows(_batch_order(edit.site, found), self.buffers.part(edit.slot("score")), count)
        for source, group in self._sources(edit.site, value).items():
            h = self._proxy(source)
            args, clamps, total = self._steer_args(edit, h), _clamps(self.plan, edit), self._unrounded(source, group)
            steered: Any
            if total is not None:  # rounded once, behind the edit; the norm reads what is rounded there
                whole = self._proxy(total)
                unrounded: Any = steer_rows(whole, args, torch.float32, clamps, self._patched(edit, whole))
                steered = unrounded.to(edit.site.dtype)
                self.sums[steered.node] = unrounded.node
            elif edit.site.layout == "streams":
                flat = _flat(edit.site, h)
                steered = steer_rows(flat, args, edit.site.dtype, clamps, self._patched(edit, flat)).view_as(h)
            else:
                steered = steer_rows(h, args, edit.site.dtype, clamps, self._patched(edit, h))
            self._redirect(edit.site, value, source, group, steered.node)

    def _patched(self, edit: Edit, h: Any) -> Any:
        """What the edit's patch makes of a value with one dimension of numbers for each token, or None."""
        if "patch" not in edit.ops:
            return None
        own = {kind: self.buffers.part(edit.slot(kind)) for kind in ("patch", "patch_alpha", "patch_slot")}
        tokens = own["patch_slot"].narrow(0, 0, self._proxy(self.buffers.count(edit.site, h)))
        slots = self._proxy(self.buffers.lined_up(tokens.select(-1, 0).node, edit.site, h, False))
        return patch_rows(h, PatchArgs(own["patch"], own["patch_alpha"], slots), edit.site.dtype)

    def _unrounded(self, source: fx.Node, group: list[fx.Node]) -> fx.Node | None:
        """The sum behind a rounded value whose norm reads it unrounded, None where no reader of the group does."""
        if not any(n.target is norm_of_sum and n.args[3] != torch.float32 for n in group):
            return None
        if source not in self.sums:
            left, right = (self._proxy(n).to(torch.float32) for n in source.args if isinstance(n, fx.Node))
            self.sums[source] = (left + right).node
        return self.sums[source]

    def _sources(self, site: Site, value: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """What the site's readers read now, and who reads it."""
        reads = self.reads.setdefault(value, {})
        readers = self.flow.users[value] if site.users is None else [self.by_name[name] for name in site.users]
        sources: dict[fx.Node, list[fx.Node]] = {}
        for reader in readers:
            sources.setdefault(reads.get(reader, value), []).append(reader)
        return sources

    def _redirect(self, site: Site, value: fx.Node, source: fx.Node, group: list[fx.Node], steered: fx.Node) -> None:
        if self.buffers.apart:  # an operator's own name would count on in a piece that has this value as an input
            torch_compat.rename(steered, "steered")
        for reader in group:
            reader.replace_input_with(source, steered)
            self.reads[value][reader] = steered
        if site.users is None and source is self.current.get(value, value):
            self.current[value] = steered

    def _template(self, edit: Edit, value: fx.Node) -> None:
        """One kernel for the edit, the add that makes the value, and the norm that reads it."""
        from steer_compile.kernels.site import SiteArgs  # needs Triton, which no other lowering does

        _check(edit, self.plan, self.by_name)
        add, norm = edit.fusion.branch is not None, edit.fusion.norm
        operands = _operands(edit.fusion, value, self.by_name)
        stream: Any = self._proxy(operands[0])
        rows = [self._proxy(n).reshape(-1, edit.site.width) for n in operands]
        steering = self._steer_args(edit, stream, flat=True) if edit.ops != ("capture",) else SteerArgs()
        score = self.buffers.bank(edit.slot("score")) if "score" in edit.ops else None
        given: dict[str, Any] = {**self.buffers.stored(edit, stream), "score": score}
        given |= steering._asdict() | _norm_args(edit.fusion, self.by_name)
        given |= dict(zip(("stream", "branch"), rows, strict=False)) | {"clamps": _clamps(self.plan, edit)}
        args = tuple(a.node if isinstance(a, fx.Proxy) else a for a in SiteArgs(**given))
        made = self._proxy(self.graph.call_function(torch.ops.steer_compile.site.default, args))
        if not add and edit.ops == ("capture",):
            return
        steered = made[0].view_as(stream).node
        for source, group in self._sources(edit.site, value).items():
            self._redirect(edit.site, value, source, group, steered)
        if norm is not None:
            normed = self.by_name[norm.node]
            normed.replace_all_uses_with(made[1].view_as(stream).node)
        self._erase(edit.fusion, value)

    def _erase(self, fusion: Fusion, value: fx.Node) -> None:
        """Drop what the template took over, results before what they are computed from."""
        norms = [norm for norm in (fusion.norm, fusion.branch_norm) if norm is not None]
        taken = [self.by_name[n] for norm in norms for n in (norm.node, *norm.inner)]
        taken += [value] if fusion.branch is not None else []
        taken += [self.by_name[fusion.operand]] if fusion.branch_scale != 1 and fusion.operand else []
        for node in sorted(set(taken), key=lambda n: self.flow.order[n], reverse=True):
            if not node.users and node is not self.first:  # buffers are read in front of the first node
                self.graph.erase_node(node)

    def _steer_args(self, edit: Edit, h: Any, flat: bool = False) -> SteerArgs:
        """Data of the edit as proxies; per-token data has the leading dimensions of the value, or one if ``flat``."""
        found = self._data(edit, h, flat)
        if edit.gated:
            found["gates"] = self._gates(edit.site, h, flat)
        return SteerArgs(**{name: found[name] for name in SteerArgs._fields if name in found})

    def _gates(self, site: Site, h: Any, flat: bool) -> Any:
        return None if self.gates is None else self._proxy(self.buffers.lined_up(self.gates, site, h, flat, (FACTORS,)))

    def _data(self, edit: Edit, h: Any, flat: bool) -> dict[str, Any]:
        """The edit's banks by kind, and what each token reads of the step, as proxies."""
        site, kinds = edit.site, {slot.kind for slot in edit.slots}
        # In the order of the slots: the graph's text, and with it every compile cache's key, must not vary.
        found = {slot.kind: self.buffers.part(slot) for slot in edit.slots if slot.kind not in CAPTURED}
        tokens: dict[str, str] = {}
        if kinds & {"table", "rowprobe", "clamp", "sae"}:
            tokens["rows"] = ROWS
        if "tier" in kinds:
            tokens["gain"] = GAIN
        if kinds & {"probe", "rowprobe"}:
            tokens["decode"] = DECODE
        if "state" in kinds:
            tokens["slot"] = SLOT
        found |= {name: self._proxy(self.buffers.per_token(buffer, site, h, flat)) for name, buffer in tokens.items()}
        if "table" in kinds:
            found["scale"] = self.buffers.read(SCALE)
        return found

    def _following(self, value: fx.Node) -> fx.Node:
        """The node in front of which operations at ``value`` go, so that they stand in the order of the plan."""
        if value.op == "placeholder":
            return self.first
        return self.following.setdefault(value, _made(self.flow, value).next)


def _decode(splicer: _Splicer, edit: Edit, value: fx.Node) -> None:
    """Decode the values of opted-in tokens from features, behind all other edits."""
    from steer_compile.kernels.sae_full import SaeFullArgs

    slots = [slot for slot in edit.slots if slot.kind != "full_log"]
    own = {slot.kind.removeprefix("full_"): splicer.buffers.part(slot) for slot in slots}
    own["log"] = splicer.buffers.bank(edit.slot("full_log")) if "sae_log" in edit.ops else None
    own["row_set"], own["row_clamp"], own["sae_set"] = own.pop("row"), own.pop("clamp"), own.pop("sae")
    own["settings"] = own.pop("set")
    for source, group in splicer._sources(edit.site, value).items():
        total = splicer._unrounded(source, group)
        h: Any = splicer._proxy(source if total is None else total)
        work = h.reshape(-1, edit.site.width).clone(memory_format=torch.contiguous_format)
        rows = splicer._proxy(splicer.buffers.per_token(ROWS, edit.site, h, flat=False)).reshape(-1)
        gates = splicer._gates(edit.site, h, flat=False) if edit.gated else None
        gates = None if gates is None else gates.reshape(-1, FACTORS).to(torch.float32)  # of fp64 streams they are fp64
        args = SaeFullArgs(h=work, rows=rows, **own, gates=gates, capacity=splicer.plan.sae_tokens)
        given = tuple(a.node if isinstance(a, fx.Proxy) else a for a in args)
        splicer.graph.call_function(torch.ops.steer_compile.sae_full.default, given)
        steered = work.view_as(h)
        if total is not None:
            unrounded, steered = steered, steered.to(edit.site.dtype)
            splicer.sums[steered.node] = unrounded.node
        splicer._redirect(edit.site, value, source, group, steered.node)


def _clamps(plan: Plan, edit: Edit) -> int:
    return plan.clamps if "clamp" in edit.ops else 0


def _check(edit: Edit, plan: Plan, by_name: Mapping[str, fx.Node]) -> None:
    """Hold what the kernel will be given against its record, before anything is made.

    Raises:
        LoweringError: names the site and the tensor.
    """
    from steer_compile.kernels.site import check
    from steer_compile.kernels.site_warmup import site_args, weight_nodes

    weights = {name: dtype_of(by_name[name]) for name in weight_nodes(plan)}
    known = {name: dtype for name, dtype in weights.items() if dtype is not None}
    try:
        check(site_args(edit, plan, known, 1))
    except LoweringError as error:
        raise LoweringError(f"{edit.site.name}: {error}") from error


def _norm_args(fusion: Fusion, by_name: Mapping[str, fx.Node]) -> dict[str, Any]:
    from steer_compile.kernels.site_warmup import norm_options, norms_of

    given = norm_options(fusion)
    for prefix, norm in norms_of(fusion).items():
        names = {"weight": norm.weight, "bias": norm.bias}
        given |= {prefix + key: by_name[name] for key, name in names.items() if name is not None}
    return given


def _operands(fusion: Fusion, value: fx.Node, by_name: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
    """Stream and branch, or the value itself. An edit at one of them has redirected the add by now."""
    given = tuple(n for n in value.args[:2] if isinstance(n, fx.Node)) if fusion.branch is not None else (value,)
    if fusion.operand is None or fusion.operand == fusion.branch:
        return given
    return (*(n for n in given if n.name != fusion.operand), by_name[fusion.branch or ""])


def _flat(site: Site, h: Any) -> Any:
    """The value with one dimension of numbers for each token."""
    return h.flatten(-2) if site.layout == "streams" else h


def _batch_order(site: Site, h: Any) -> Any:
    """Numbers of the tokens in batch order."""
    return h.transpose(0, 1) if site.layout == "time_first" else h
