"""Who looks on while passes run, such as a dump of every graph. Nobody does unless `looking_on` is entered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx

from steer_compile import torch_compat
from steer_compile.ir import Plan, SiteTable


@dataclass(frozen=True)
class Seen:
    """A graph in front of a pass, or behind it.

    Attributes:
        step: name of the pass.
        when: ``before`` or ``after``.
        compile_id: Dynamo's name of the compilation.
        gm: the graph, which is not to be changed.
        table: what `find_sites` found.
        plan: what is planned, as far as the passes have come.
    """

    step: str
    when: str
    compile_id: str
    gm: fx.GraphModule
    table: SiteTable | None = None
    plan: Plan | None = None


Onlooker = Callable[[Seen], None]
_ONLOOKERS: list[Onlooker] = []


def look_on(onlooker: Onlooker) -> None:
    """Show every pass of this process to ``onlooker`` from now on."""
    _ONLOOKERS.append(onlooker)


@contextmanager
def looking_on(onlooker: Onlooker) -> Iterator[None]:
    """Show the passes that run inside of the block."""
    _ONLOOKERS.append(onlooker)
    try:
        yield
    finally:
        _ONLOOKERS.remove(onlooker)


def show(step: str, when: str, gm: fx.GraphModule, table: SiteTable | None = None, plan: Plan | None = None) -> None:
    """Called by what runs the passes, in front of each and behind it."""
    for onlooker in tuple(_ONLOOKERS):
        onlooker(Seen(step, when, torch_compat.compile_id(), gm, table, plan))
