"""A host of dynamic steering without a model: a bound registry, and requests whose phases a test sets."""

from typing import Any

import torch
from torch import Tensor

from steer_compile import SteerSpec
from steer_compile.dynamic.dynamics import Dynamics, Limits
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.ir import Site, SiteTable
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.vectors import SiteKey, vector_set

WIDTH, LAYERS = 4, 3
SITE: SiteKey = ("post_block", 1)
OPS = ("add", "tier", "monitor", "row_monitor", "clamp")


def unit(place: int, size: float = 1.0, layer: int = 1) -> dict[str, dict[int, Tensor]]:
    return {"post_block": {layer: size * torch.eye(WIDTH)[place]}}


def bound(spec: SteerSpec) -> Registry:
    """A registry with tables on the CPU."""
    registry = Registry(spec)
    sites = [Site(n, "post_block", f"v{n}", WIDTH, torch.float32, (2, 8), "batch_first") for n in range(LAYERS)]
    table = SiteTable(tuple(sites), layers=tuple(range(LAYERS)))
    registry.bind(plan_edits(spec, table, registry.tables.banks), table, torch.device("cpu"))
    return registry


class World:
    """Registry, host and control plane of a test."""

    def __init__(self, overrides: int = 2, limits: Limits | None = None, **options: Any) -> None:
        spec = SteerSpec(
            steer="post_block", capture="post_block", rows=4, max_tokens=16, ops=OPS, overrides=overrides, **options
        )
        self.registry = bound(spec)
        self.phases: dict[str, str] = {"a": "decode", "b": "decode", "c": "decode", "p": "prefill"}
        self.own: dict[str, Contents] = {}
        self.routes: dict[str, int] = {}
        self.dynamic = Dynamics(self.registry, self, limits)

    def phase(self, request: str) -> str | None:
        return self.phases.get(request)

    def admitted(self, request: str) -> Contents:
        return self.own.get(request, Contents())

    def row(self, request: str) -> int:
        return 2

    def route(self, request: str, row: int | None) -> None:
        if row is None:
            self.routes.pop(request, None)
        else:
            self.routes[request] = row

    def line(self, row: int, site: SiteKey = SITE) -> list[float]:
        """What a token of a row gets at a site."""
        found: list[float] = (self.registry.tables.view("table", site)[row] * self.registry.tables.scale[row]).tolist()
        return found

    def of(self, request: str, site: SiteKey = SITE) -> list[float]:
        """What a decoded token of a request gets at a site."""
        return self.line(self.routes.get(request, 2), site)

    def step(self, values: dict[str, list[float]] | None = None, phases: dict[str, str] | None = None) -> StepView:
        """One step in which each request has one token, with these values at the site."""
        self.dynamic.begin()
        shown = self.view(values or {}, phases or {})
        self.dynamic.end(shown)
        return shown

    def view(self, values: dict[str, list[float]], phases: dict[str, str]) -> StepView:
        rows = torch.tensor(list(values.values()), dtype=torch.float32).view(-1, WIDTH)
        requests = tuple(
            RequestView(name, i, i + 1, 5, phases.get(name, "decode"), 5, conversation=name.partition("@")[2])
            for i, name in enumerate(values)
        )
        return StepView(self.dynamic.step, {SITE: rows}, {}, requests)


def contents(vectors: Any, scale: float = 1.0) -> Contents:
    return Contents(((vector_set(vectors), scale),))
