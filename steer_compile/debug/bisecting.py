"""Which pass or which site makes a steered model's numbers wrong: parts are turned off until the rest agrees.

The judge runs the model's Dynamo graphs node by node, in plain PyTorch, and adds the vectors to the values of the sites
itself. It shares the finder with the backend, and neither the splice, nor the lowering, nor a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from steer_compile import torch_compat
from steer_compile.backend import steer_backend
from steer_compile.debug.tracing import Traced, afresh, trace
from steer_compile.errors import SpecError
from steer_compile.hooks import is_stream_hook
from steer_compile.ir import Site
from steer_compile.passes.plan_edits import select_sites
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, SteerSpec

INNERS = ("eager", "aot_eager", "inductor")
"""Compilers behind the splice, each with more passes than the one before."""
EPSILON = 0.1
"""Length of the vectors relative to the mean length of a token's value at the site."""
Logits = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Trial:
    """One configuration and how far its logits are from the judge's, relative to the largest of these.

    Attributes:
        difference: infinite where it raised.
        error: what it raised.
    """

    inner: str
    lowering: str
    sites: tuple[SiteKey, ...]
    difference: float
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        culprit: name of the pass, "" where all agrees.
        sites: the fewest sites with which it goes wrong.
        trials: all that was run, in order.
    """

    culprit: str
    sites: tuple[SiteKey, ...]
    trials: tuple[Trial, ...]
    text: str


def difference_of(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest number; infinite where other places are infinite or NaN."""
    finite = wanted.isfinite()
    if got.shape != wanted.shape or not torch.equal(got.isfinite(), finite):
        return float("inf")
    odd = got[~finite].nan_to_num(7.0, 8.0, 9.0), wanted[~finite].nan_to_num(7.0, 8.0, 9.0)
    if not torch.equal(*odd):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((got[finite] - wanted[finite]).abs().max() / wanted[finite].abs().max().clamp_min(1e-12))


def run_once(model: nn.Module, inputs: dict[str, Any], spec: SteerSpec, inner: str) -> None:
    """Compile a model with a spec, and call it once with nothing steered."""
    with afresh():
        torch.compile(model, backend=steer_backend(spec, inner=inner))(**inputs)


class Bisection:
    """Runs one model under one spec in many configurations.

    Args:
        logits: picks the numbers to compare from the model's result.
        tolerance: largest difference that counts as agreement.
        tell: called with a line about each trial in front of it.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], spec: SteerSpec, logits: Logits, tolerance: float,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self._model, self._inputs, self._spec, self._logits = model, inputs, spec, logits
        self._tolerance, self._tell = tolerance, tell
        self._graphs = trace(model, inputs)
        self._found = _steered(self._graphs, spec)
        if not self._found:
            raise SpecError(
                "the spec steers nothing in this model, so there is nothing to bisect; give it a steer hook"
            )
        self._vectors = self._draw()
        self._judgements: dict[tuple[SiteKey, ...], Tensor] = {}
        self.trials: list[Trial] = []

    @property
    def sites(self) -> tuple[SiteKey, ...]:
        """Sites that the spec steers."""
        return tuple(self._found)

    def run(self, inner: str = "inductor") -> Verdict:
        """Find the culprit, beginning with everything on."""
        every, lowering = self.sites, self._spec.lowering
        if self._agrees(inner, lowering, every):
            return self._verdict("", (), f"all {len(every)} sites agree with the judge under {inner}")
        if not self._agrees(inner, lowering, ()):
            text = f"the model itself differs under {inner}, with no site steered: the compiler's own numbers"
            return self._verdict(inner, (), text)
        for smaller in reversed(INNERS[: INNERS.index(inner)]):
            if self._agrees(smaller, lowering, every):
                stage = INNERS[INNERS.index(smaller) + 1]
                fewest = self._fewest(stage, lowering, every)
                return self._verdict(stage, fewest, f"it agrees under {smaller}, and no longer under {stage}")
        if lowering != "compiler" and self._agrees("eager", "compiler", every):
            fewest = self._fewest("eager", lowering, every)
            return self._verdict("lower_edits", fewest, "it agrees by plain operators, and not by the template")
        fewest = self._fewest("eager", lowering, every)
        return self._verdict("splice", fewest, "it differs without any compiler: what was spliced in is wrong")

    def _verdict(self, culprit: str, sites: tuple[SiteKey, ...], text: str) -> Verdict:
        return Verdict(culprit, sites, tuple(self.trials), text)

    def _fewest(self, inner: str, lowering: str, sites: tuple[SiteKey, ...]) -> tuple[SiteKey, ...]:
        """A smallest set of sites that still goes wrong, by halves, then by quarters and so on (Zeller's ddmin)."""
        parts = 2
        while len(sites) > 1:
            size = -(-len(sites) // parts)
            chunks = [sites[i : i + size] for i in range(0, len(sites), size)]
            rests = [tuple(s for s in sites if s not in chunk) for chunk in chunks] if parts > 2 else []
            wrong = next((some for some in (*chunks, *rests) if some and not self._agrees(inner, lowering, some)), None)
            if wrong is not None:
                sites, parts = wrong, 2 if wrong in chunks else max(parts - 1, 2)
            elif parts < len(sites):
                parts = min(2 * parts, len(sites))
            else:
                break
        return sites

    def _agrees(self, inner: str, lowering: str, sites: tuple[SiteKey, ...]) -> bool:
        self._tell(f"{inner}, {lowering}, {len(sites)} sites")
        try:
            difference, error = self._difference(inner, lowering, sites), ""
        except (RuntimeError, AssertionError) as raised:  # what is refused is no wrong number: a SteerError passes
            lines = str(raised).strip().splitlines()
            difference, error = float("inf"), f"{type(raised).__name__}: {lines[0] if lines else 'no message'}"
        self.trials.append(Trial(inner, lowering, sites, difference, error))
        return difference <= self._tolerance

    def _difference(self, inner: str, lowering: str, sites: tuple[SiteKey, ...]) -> float:
        vectors = {site: self._vectors[site] for site in sites}
        if sites not in self._judgements:
            self._judgements[sites] = self._judged(vectors)
        return difference_of(self._compiled(inner, lowering, vectors), self._judgements[sites])

    def _compiled(self, inner: str, lowering: str, vectors: dict[SiteKey, Tensor]) -> Tensor:
        with afresh():
            if not vectors:
                return self._logits(torch.compile(self._model, backend=inner)(**self._inputs)).clone()
            steer = tuple(HookSelection(hook, [layer]) for hook, layer in vectors)
            spec = SteerSpec(steer=steer, rows=2, max_tokens=self._spec.max_tokens, lowering=lowering,
                             placement=self._spec.placement)  # fmt: skip
            backend = steer_backend(spec, inner=inner)
            compiled = torch.compile(self._model, backend=backend)
            given: dict[str, dict[int, Tensor]] = {}
            for (hook, layer), vector in vectors.items():
                given.setdefault(hook, {})[layer] = vector
            compiled(**self._inputs)  # binds the tables
            with backend.runtime.steer(given):
                return self._logits(compiled(**self._inputs)).clone()

    def _judged(self, vectors: dict[SiteKey, Tensor]) -> Tensor:
        def judge(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            name = torch_compat.compile_id()
            sites = [s for key, found in self._found.items() if key in vectors for graph, s in found if graph == name]
            adds: dict[str, list[tuple[Site, Tensor]]] = {}
            for site in sites:  # two hooks may be at one value, such as the end of a block and the entry of the next
                adds.setdefault(site.node, []).append((site, vectors[site.hook, site.layer]))
            return lambda *args: Judge(gm, adds).run(*args)

        with afresh():
            return self._logits(torch.compile(self._model, backend=judge)(**self._inputs)).clone()

    def _draw(self) -> dict[SiteKey, Tensor]:
        """A random vector for each site, of a length that moves the logits and saturates nothing."""
        lengths: dict[str, float] = {}

        def measure(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return lambda *args: Judge(gm, {}, lengths).run(*args)

        with afresh():
            torch.compile(self._model, backend=measure)(**self._inputs)
        drawn = {}
        for (hook, layer), found in self._found.items():
            site = found[0][1]
            vector = torch.randn(site.width, generator=torch.Generator().manual_seed(layer))
            drawn[hook, layer] = EPSILON * lengths.get(site.node, 1.0) * vector / vector.norm()
        return drawn


class Judge(fx.Interpreter):
    """Runs a graph node by node, and adds vectors to the values of sites.

    Args:
        adds: by node, its sites and what is added for each: for every later read, or for those of the site's users.
        lengths: gets the mean length of the rows of each value.
    """

    def __init__(
        self, gm: fx.GraphModule, adds: dict[str, list[tuple[Site, Tensor]]], lengths: dict[str, float] | None = None
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._adds, self._lengths = adds, lengths
        self._edited: dict[str, dict[fx.Node, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        changed = {node: value for node, value in self._edited.get(n.name, {}).items() if node in n.all_input_nodes}
        pristine = {node: self.env[node] for node in changed}
        self.env.update(changed)
        result = super().run_node(n)
        self.env.update(pristine)
        if self._lengths is not None and isinstance(result, Tensor) and result.is_floating_point() and result.dim():
            self._lengths[n.name] = float(result.detach().float().norm(dim=-1).mean())
        if n.name not in self._adds:
            return result
        given = [(site.users, vector.to(result.device)) for site, vector in self._adds[n.name]]
        for_all = sum((vector for users, vector in given if users is None), torch.zeros_like(given[0][1]))
        wide = result.float() + for_all
        if any(users is None for users, _ in given):
            result.copy_(wide)  # aliases of it read the new value as well
        for user in {user for users, _ in given for user in users or ()}:
            own = sum((vector for users, vector in given if users and user in users), torch.zeros_like(for_all))
            self._edited.setdefault(user, {})[n] = (wide + own).to(result.dtype)
        return result


def _steered(graphs: Sequence[Traced], spec: SteerSpec) -> dict[SiteKey, list[tuple[str, Site]]]:
    """Graphs and sites of everything that a spec steers."""
    found: dict[SiteKey, list[tuple[str, Site]]] = {}
    for traced in graphs:
        for selection in spec.steer if traced.table.sites else ():
            for site in select_sites(selection, traced.table):
                if spec.placement == "after_norm" and is_stream_hook(site.hook):
                    site = replace(site, users=site.skip_users)
                found.setdefault((site.hook, site.layer), []).append((traced.name, site))
    return found
