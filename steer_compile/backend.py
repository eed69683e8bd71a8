"""`steer_backend`: the callable that ``torch.compile(model, backend=...)`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from steer_compile import torch_compat, watch
from steer_compile.dynamic.plain import DynamicRuntime
from steer_compile.errors import SiteNotFound, SpecError, SteerError
from steer_compile.ir import Dim, Plan, Site, SiteTable
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.lower_edits import lower_edits
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.passes.splice import attach, splice
from steer_compile.spec import SteerSpec

Inner = str | Callable[..., Any]


class SteerBackend:
    """A torch.compile backend that steers and captures. One backend serves one model.

    Attributes:
        runtime: vectors, rows, scales and captures.
        tables: sites and misses of each compiled graph.
        plans: what was spliced into each of them.
    """

    def __init__(self, spec: SteerSpec, inner: Inner, kwargs: dict[str, Any]) -> None:
        self._spec = spec
        self._inner = inner
        self._kwargs = kwargs
        self._partial = False
        self._compilers: list[Callable[..., Any]] = []
        self._launched: list[tuple[Plan, dict[str, torch.dtype], torch.device]] = []
        self.runtime = DynamicRuntime(spec)
        self.tables: list[SiteTable] = []
        self.plans: list[Plan] = []
        self.__name__ = "steer_backend"
        torch_compat.watch_recompile_limits()

    @property
    def spec(self) -> SteerSpec:
        """The spec; part of every compiled graph, so it cannot be changed."""
        return self._spec

    @spec.setter
    def spec(self, value: object) -> None:
        raise SpecError("the spec is compiled into the graphs; make a new backend with the new spec and compile again")

    @property
    def sites(self) -> SiteTable:
        """Sites of all compiled graphs together, each (layer, hook) once."""
        found: dict[tuple[int, str], Site] = {}
        misses = []
        for table in self.tables:
            for site in table.sites:
                found.setdefault((site.layer, site.hook), site)
            misses += [m for m in table.misses if m not in misses]
        layers = tuple(sorted({layer for layer, _ in found}))
        return SiteTable(tuple(found.values()), tuple(misses), layers, any(t.partial for t in self.tables))

    def __deepcopy__(self, memo: dict[int, Any]) -> SteerBackend:
        """A copied compiled model gets a backend of its own: the same spec, no vectors, no rows."""
        return SteerBackend(self._spec, self._inner, dict(self._kwargs))

    def reset(self) -> None:
        """Called by `torch._dynamo.reset`: forget compiled graphs, keep vectors and rows."""
        self.tables.clear()
        self.plans.clear()
        self._launched.clear()
        self._partial = False
        for compiler in self._compilers:
            torch_compat.reset_inductor(compiler)
        self._compilers.clear()
        self.runtime.functions.clear()
        torch_compat.forget_limits()

    def warm_up(self) -> int:
        """Compile the Triton kernels of the graphs compiled so far, so that no call waits for one.

        Each site that the template serves has a kernel for few tokens and one for many; sites with the same data share
        them. Vectors, monitors, clamps, rows and the number of tokens need no other. The backend does this itself for
        each graph that it hands to ``eager``, ``aot_eager`` or a callable, so there is something left to do only where
        Triton has dropped its kernels since. Inductor compiles them together with the graph.

        Returns:
            Number of kernels that were compiled, or loaded from Triton's cache on disk; 0 if this process has them
            all, with Inductor, and on a CPU.
        """
        return sum(self._warm(*launched) for launched in self._launched)

    def _warm(self, plan: Plan, weights: dict[str, torch.dtype], device: torch.device) -> int:
        if self._inner == "inductor" or device.type != "cuda":
            return 0
        count = 0
        if _has_template(plan):
            from steer_compile.kernels.site_warmup import warm_up  # needs Triton

            count += warm_up(plan, weights, device)
        if any("sae_full" in edit.ops for edit in plan.edits):
            from steer_compile.kernels import sae_full_warmup  # needs Triton

            count += sae_full_warmup.warm_up(plan, device)
        return count

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        self._partial |= torch_compat.is_partial(gm)
        partial = self._partial
        try:
            with opened_sums(gm):
                watch.show("find_sites", "before", gm)
                table = find_sites(gm, partial)
                watch.show("find_sites", "after", gm, table)
                run = self._instrument(gm, table, example_inputs)
        except SteerError as error:
            return _refusal(error)
        inner = self._compiler(kwargs)(gm, example_inputs)
        return inner if run is None else run(inner)

    def _instrument(
        self, gm: fx.GraphModule, table: SiteTable, inputs: Sequence[Any]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """Splice the plan into ``gm``; returns what wraps the compiled graph, or None for a part without sites."""
        if not table.sites:
            weighty = _computes_with_weights(gm)
            if not weighty or (table.partial and not table.unnumbered):
                return None
            reason = table.misses[0].reason if table.misses else "no residual stream"
            raise SiteNotFound(f"no site in this model: {reason}; see `steer-compile sites` for what exists")
        banks = self.runtime.tables.banks
        plan = plan_edits(self._spec, table, banks)
        if not plan.edits:
            return None
        watch.show("plan_edits", "after", gm, plan=plan)
        plan = lower_edits(plan, gm, self._spec.lowering)
        watch.show("lower_edits", "after", gm, plan=plan)
        device = _device(gm, plan, inputs)
        weights = _norm_dtypes(gm, plan)
        watch.show("splice", "before", gm, plan=plan)
        names = splice(gm, plan)
        watch.show("splice", "after", gm, plan=plan)
        self.runtime.bind(plan, table, device)
        self.runtime.functions.add(torch_compat.compiled_function(gm))
        attach(gm, self.runtime.tables.named(names))
        torch_compat.mark_static(gm, names)
        self.tables.append(table)
        self.plans.append(plan)
        self._launched.append((plan, weights, device))
        self._warm(plan, weights, device)
        shape = _TokenShape(gm, plan.edits[0].site)
        ids = _token_ids(gm)
        return lambda inner: self._wrap(inner, shape, plan, ids)

    def _wrap(self, inner: Callable[..., Any], shape: _TokenShape, plan: Plan, ids: int | None) -> Callable[..., Any]:
        runtime = self.runtime
        first_layer = min(e.site.layer for e in plan.edits)
        captured = tuple((e.site.hook, e.site.layer) for e in plan.edits if "capture" in e.ops)

        def steered_graph(*args: Any) -> Any:
            runtime.before_call(first_layer, *shape(args))
            result = inner(*args)
            runtime.after_call(captured, None if ids is None else args[ids])
            return result

        return steered_graph

    def _compiler(self, given: dict[str, Any]) -> Callable[..., Any]:
        """The inner compiler with the options of `steer_backend` and those that torch.compile passes on."""
        options = {**self._kwargs, **given}
        if self._inner == "inductor":
            mode, settings, dynamic = (options.pop(name, None) for name in ("mode", "options", "dynamic"))
            self._compilers.append(torch_compat.inductor_compiler(mode, settings, dynamic))
            return self._compilers[-1]
        compiler = torch_compat.named_backend(self._inner) if isinstance(self._inner, str) else self._inner
        return (lambda gm, inputs: compiler(gm, inputs, **options)) if options else compiler


def steer_backend(spec: SteerSpec, inner: Inner = "inductor", **kwargs: Any) -> SteerBackend:
    """Backend for ``torch.compile(model, backend=steer_backend(spec))``.

    Args:
        spec: what may be steered and captured.
        inner: compiler of the instrumented graph: ``inductor``, any backend name (``eager`` and ``aot_eager`` for
            debugging), or a backend callable.
        kwargs: options for the inner compiler (``mode``, ``options`` for Inductor); those given to torch.compile win.

    Raises:
        SpecError: ``spec`` is not a `SteerSpec`.
    """
    if not isinstance(spec, SteerSpec):
        raise SpecError(
            f"steer_backend takes a SteerSpec, not {type(spec).__name__}; build SteerSpec(steer=(...), ...)"
        )
    return SteerBackend(spec, inner, kwargs)


def _refusal(error: SteerError) -> Callable[..., Any]:
    """A compiled graph that raises the package's own error on every call, instead of running unsteered."""

    def refuse(*args: Any) -> Any:
        raise error.with_traceback(None)

    return refuse


def _computes_with_weights(gm: fx.GraphModule) -> bool:
    """Whether the graph could be a model: at least two projections. Masks and position tables are graphs too."""
    names = [
        str(n.target) if isinstance(n.target, str) else repr(n.target)
        for n in gm.graph.nodes
        if n.op.startswith("call")
    ]
    return sum("linear" in n or "matmul" in n or "conv" in n or "addmm" in n or "mm" in n for n in names) >= 2


def _device(gm: fx.GraphModule, plan: Plan, inputs: Sequence[Any]) -> torch.device:
    by_name = {n.name: n for n in gm.graph.nodes}
    devices = {by_name[e.site.node].meta["example_value"].device for e in plan.edits}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise SiteNotFound(f"the sites are on several devices ({names}); steer one device's layers with one backend")
    device: torch.device = devices.pop()
    return device


def _norm_dtypes(gm: fx.GraphModule, plan: Plan) -> dict[str, torch.dtype]:
    """Dtypes of the weights and biases of the norms that the template takes over, by the names of their nodes."""
    if not _has_template(plan):
        return {}
    from steer_compile.kernels.site_warmup import weight_nodes  # needs Triton

    names = weight_nodes(plan)
    return {n.name: n.meta["example_value"].dtype for n in gm.graph.nodes if n.name in names}


def _has_template(plan: Plan) -> bool:
    return any(edit.lowering == "template" for edit in plan.edits)


def _token_ids(gm: fx.GraphModule) -> int | None:
    """Place of the argument that the graph's first embedding looks up, None where it has no such."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.nn.functional.embedding:
            ids = node.args[0]
            while isinstance(ids, fx.Node) and ids.op == "call_method" and ids.target in ("view", "reshape", "to"):
                ids = ids.args[0]
            if ids in placeholders:
                return placeholders.index(ids)
    return None


class _TokenShape:
    """Batch and length of a call, read off the graph's arguments."""

    def __init__(self, gm: fx.GraphModule, site: Site) -> None:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        batch, length = _token_dims(site, placeholders)
        self._constant = (int(batch), int(length)) if isinstance(batch, int) and isinstance(length, int) else None
        if self._constant is None:
            symbols = sorted(sympy.sympify(batch).free_symbols | sympy.sympify(length).free_symbols, key=str)
            self._readers = [_symbol_reader(s, placeholders) for s in symbols]
            self._function = sympy.lambdify(symbols, [batch, length], "math")

    def __call__(self, args: Sequence[Any]) -> tuple[int, int]:
        if self._constant is not None:
            return self._constant
        batch, length = self._function(*(read(args) for read in self._readers))
        return int(batch), int(length)


def _token_dims(site: Site, placeholders: list[fx.Node]) -> tuple[Dim, Dim]:
    if site.layout in ("batch_first", "streams"):
        return site.shape[0], site.shape[1]
    if site.layout == "time_first":
        return site.shape[1], site.shape[0]
    for node in placeholders:
        dims = _sizes(node)
        if len(dims) >= 2 and sympy.simplify(dims[0] * dims[1] - site.shape[0]) == 0 and not _is_parameter(node):
            return dims[0], dims[1]
    return 1, site.shape[0]


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def _sizes(node: fx.Node) -> tuple[Dim, ...]:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(d.node.expr if isinstance(d, torch.SymInt) else int(d) for d in value.shape)


def _symbol_reader(symbol: sympy.Symbol, placeholders: list[fx.Node]) -> Callable[[Sequence[Any]], int]:
    """How to read a size symbol off the arguments: an integer argument, or a dimension of a tensor."""
    for i, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return lambda args, i=i: int(args[i])  # type: ignore[misc]
    for i, node in enumerate(placeholders):
        for dim, size in enumerate(_sizes(node)):
            if size == symbol:
                return lambda args, i=i, dim=dim: int(args[i].shape[dim])  # type: ignore[misc]
    raise SiteNotFound(f"the graph's size {symbol} is no argument of it, so the tokens of a call cannot be counted")
