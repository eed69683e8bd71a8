"""The Dynamo graphs of a model, and what each pass makes of copies of them. Nothing is compiled or allocated."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from steer_compile import torch_compat
from steer_compile.canon import canonical_text
from steer_compile.errors import SiteNotFound
from steer_compile.ir import Bank, Plan, SiteTable
from steer_compile.passes.dataflow import is_state, op_name
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.lower_edits import lower_edits
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.passes.splice import splice
from steer_compile.spec import SteerSpec

PASSES = ("dynamo", "find_sites", "plan_edits", "lower_edits", "splice")
"""What a graph went through, in order; only the last changes it."""


class _Traced(Exception):
    """Ends a call of shapes alone whose one graph is known."""


@dataclass(frozen=True)
class Traced:
    """One Dynamo graph of a model.

    Attributes:
        name: Dynamo's name of its compilation, such as ``0/0``.
        gm: the graph; never changed. Its nodes have stack traces where Dynamo gave them.
        partial: it is one of several of its function.
        table: its sites and misses.
        broken: why it ends before its function does, with the line of the user's code; "" where it does not.
    """

    name: str
    gm: fx.GraphModule
    partial: bool
    table: SiteTable
    broken: str = ""


@dataclass(frozen=True)
class Staged:
    """A copy of a graph behind the passes of a spec.

    Attributes:
        plan: None for a graph in which the spec names nothing.
        gm: the copy, spliced where there is a plan.
        planned: the plan in front of the choice of lowerings.
    """

    traced: Traced
    plan: Plan | None
    gm: fx.GraphModule
    planned: Plan | None = None

    def graph_after(self, step: str) -> fx.GraphModule:
        """The graph behind the pass ``step`` of `PASSES`."""
        return self.gm if step == "splice" else self.traced.gm

    def text_after(self, step: str) -> str:
        """Canonical text of the graph behind a pass, with what an analysis found in front of it."""
        return self._notes(step) + canonical_text(self.graph_after(step).graph)

    def report_after(self, step: str) -> str:
        """Everything that is known behind a pass: what the passes up to it found, and the graph by names of nodes."""
        known = PASSES[: PASSES.index(step) + 1]
        last = next((name for name in reversed(known) if name in ("plan_edits", "lower_edits")), "")
        notes = "".join(self._notes(name) for name in known if name in ("find_sites", last))
        return notes + canonical_text(self.graph_after(step).graph, True)

    def _notes(self, step: str) -> str:
        """What an analysis found, as comments."""
        found = {"find_sites": self.traced.table, "plan_edits": self.planned, "lower_edits": self.plan}.get(step)
        return "" if found is None else "".join(f"# {line}\n" for line in found.text().splitlines())


def trace(
    model: nn.Module, inputs: dict[str, Any], shapes: AbstractContextManager[Any] | None = None,
    dynamic: bool | None = None,
) -> list[Traced]:  # fmt: skip
    """All graphs of one call.

    The call runs the graphs as they are, so that code behind a graph break is traced as well; a model of shapes alone
    that is one graph is not run.

    Args:
        shapes: in what graphs of a model of shapes alone run (`torch_compat.shapes_only`).
        dynamic: as in `torch.compile`: True leaves sizes open from the first call on.
    """
    found: list[Traced] = []
    cut = False

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal cut
        cut |= torch_compat.is_partial(gm)
        with opened_sums(gm):
            found.append(Traced(torch_compat.compile_id(), gm, cut, find_sites(gm, cut), torch_compat.break_reason(gm)))

        def run(*args: Any) -> Any:
            if shapes is not None and whole:
                raise _Traced
            with shapes or nullcontext():
                return gm.forward(*args)

        whole = torch_compat.compile_id() == "0/0" and not cut

        return run

    with afresh(), torch_compat.quiet(), suppress(_Traced):
        torch.compile(model, backend=collect, dynamic=dynamic)(**inputs)
    return found


@contextmanager
def afresh() -> Iterator[None]:
    """Compile without gradients or warnings, with no graph of an earlier call, and leave none behind."""
    torch.compiler.reset()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compiler.reset()


def breaks(graphs: Iterable[Traced]) -> tuple[str, ...]:
    """Why graphs end before their function does, each reason once."""
    return tuple(dict.fromkeys(traced.broken for traced in graphs if traced.broken))


def stage(graphs: Sequence[Traced], spec: SteerSpec, device: str = "") -> list[Staged]:
    """Each graph behind the passes of a spec, in the order in which a backend would see them.

    Args:
        device: kind of device for which lowerings are chosen, "" for that of the graphs.

    Raises:
        SteerError: what the backend would raise: a site that is not there, or one that cannot be lowered.
    """
    banks: tuple[Bank, ...] = ()
    made = []
    for traced in graphs:
        gm = copied(traced.gm)
        plan = planned = None
        if traced.table.sites:
            with opened_sums(gm):
                plan = planned = plan_edits(spec, traced.table, banks)
                if plan.edits:
                    plan = lower_edits(plan, gm, spec.lowering, device)
                    splice(gm, plan)
                    banks = plan.banks
        there = plan is not None and bool(plan.edits)
        made.append(Staged(traced, plan if there else None, gm, planned if there else None))
    if not any(staged.plan for staged in made):
        reasons = (miss.reason for traced in graphs for miss in traced.table.misses)
        why = next(reasons, "no graph has a residual stream")
        raise SiteNotFound(f"the spec steers and captures nothing in this model: {why}; `steer-compile sites` lists it")
    return made


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own; nodes keep their names, and share values and metadata."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    return fx.GraphModule(gm, graph)


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operator is called."""
    calls = (n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr") and not is_state(n))
    return Counter(op_name(node) for node in calls)
