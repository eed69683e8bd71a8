"""`GateProgram`: a request's gates, taken apart into what a row holds and what is decided between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from steer_compile.dynamic.codec import digest_of, site_name
from steer_compile.dynamic.gates import Add, Attenuate, ClampTo, Effect, Gate
from steer_compile.dynamic.steering_controller import Decision
from steer_compile.errors import SpecError
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.gates import Clamp
from steer_compile.runtime.named import NamedVectors
from steer_compile.runtime.vectors import SiteKey, VectorSet, scaled, vector_set


@dataclass(frozen=True)
class Held:
    """An effect that holds, and the digests that its names had when that began."""

    apply: Effect
    expect: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        return digest_of(self.apply.digest, self.expect)


@dataclass(frozen=True)
class GateProgram:
    """Gates of one request. Their effects compose in this order, whatever order the gates are in:

    1. factors of ``attenuate`` multiply, and act on the vectors that the request brought, not on what gates add;
    2. vectors of ``add`` are summed;
    3. clamps are appended behind the request's own, in the order of the gates.

    Attributes:
        row: effects that always hold, with their probes where these are in the graph.
        host: gates that are decided between steps.
    """

    row: tuple[tuple[Gate, Held], ...]
    host: tuple[tuple[Gate, Held], ...]

    @property
    def probes(self) -> tuple[Gate, ...]:
        """Gates whose scores the host needs."""
        return tuple(gate for gate, _ in self.host if gate.when is not None)

    def decision(self, more: Iterable[Held], score: float | None = None) -> Decision | None:
        """What the row's effects and some more come to; None for nothing."""
        held = [*(effect for _, effect in self.row), *more]
        if not held:
            return None
        adds = [effect.apply for effect in held if isinstance(effect.apply, Add)]
        monitors = {g.when.site: g.when.monitor for g, _ in self.row if g.when is not None}
        clamps: dict[SiteKey, tuple[Clamp, ...]] = {}
        for effect in held:
            for site, each in effect.apply.clamps if isinstance(effect.apply, ClampTo) else ():
                clamps[site] = (*clamps.get(site, ()), *each)
        return Decision(
            _sum(adds),
            score=score,
            named=[(name, factor * add.strength) for add in adds for name, factor in add.named],
            monitors=monitors,
            clamps=clamps,
            compose=True,
            admitted=_factor(held),
            expect=dict(pair for effect in held for pair in effect.expect),
        )

    def contents(self, own: Contents, named: NamedVectors) -> Contents:
        """A request's own decode contents with the row's effects, for a host that can give the request such a row.

        Raises:
            UnknownName: a set is not registered any more.
        """
        held = [effect for _, effect in self.row]
        parts: list[tuple[VectorSet, float]] = []
        for effect in held:
            if isinstance(effect.apply, Add):
                add = effect.apply
                parts += [(add.vectors, add.strength)] if add.vectors else []
                parts += [(named.get(name), factor * add.strength) for name, factor in add.named]
        whole = own.scaled(_factor(held)) + Contents(tuple(parts))
        for gate, effect in self.row:
            monitors = ((gate.when.site, gate.when.monitor),) if gate.when is not None and not gate.on_host else ()
            clamps = effect.apply.clamps if isinstance(effect.apply, ClampTo) else ()
            whole = whole + Contents((), monitors, clamps)
        return whole


def _factor(held: Sequence[Held]) -> float:
    return reduce(lambda a, b: a * b, (h.apply.strength for h in held if isinstance(h.apply, Attenuate)), 1.0)


def _sum(adds: Sequence[Add]) -> VectorSet:
    own = [add for add in adds if add.vectors]
    if len(own) == 1 and own[0].strength == 1.0:
        return own[0].vectors
    return vector_set(scaled([(add.vectors, add.strength) for add in own]))


def compile_gates(gates: Sequence[Gate], named: NamedVectors, cross_layer: bool = False) -> GateProgram:
    """Take gates apart.

    Args:
        named: vector sets by name; the digests that they have now are what the gates mean.
        cross_layer: as in the spec.

    Raises:
        UnknownName: a name that is not registered. SpecError: gates that would gate one another's vectors.
    """
    held = [(gate, Held(gate.apply, _digests(gate.apply, named))) for gate in gates]
    _check_gated(gates, named, cross_layer)
    return GateProgram(
        tuple((g, h) for g, h in held if not g.on_host), tuple((g, h) for g, h in held if g.on_host)
    )  # fmt: skip


def _digests(apply: Effect, named: NamedVectors) -> tuple[tuple[str, str], ...]:
    names = [name for name, _ in apply.named] if isinstance(apply, Add) else []
    return tuple((name, named.get(name).digest) for name in dict.fromkeys(names))


def _sites(gate: Gate, named: NamedVectors) -> set[SiteKey]:
    """Where a gate adds something."""
    if not isinstance(gate.apply, Add):
        return set()
    sets = [gate.apply.vectors, *(named.get(name) for name, _ in gate.apply.named)]
    return {site for vectors in sets for site, _ in vectors.items()}


def _check_gated(gates: Sequence[Gate], named: NamedVectors, cross_layer: bool) -> None:
    """A probe in the graph gates all of the row's vectors at its site, so it must be about one gate's alone."""
    for gate in gates:
        if gate.when is None or gate.scope != "this_token":
            continue
        probe = gate.when
        beyond = sorted(site for site in _sites(gate, named) if not _reaches(probe.site, site, cross_layer))
        if beyond:
            reach = (
                "and the sites of later layers" if cross_layer else "alone; cross_layer in the spec reaches later ones"
            )
            raise SpecError(
                f"a gate of scope this_token adds at {site_name(beyond[0])}, and its probe at {site_name(probe.site)} "
                f"gates that site {reach}"
            )
        for other in gates:
            same = other.when is not None and other.scope == "this_token" and other.when == probe
            shared = sorted(site for site in _sites(other, named) if _reaches(probe.site, site, cross_layer))
            if other is not gate and not same and shared:
                raise SpecError(
                    f"two gates add at {site_name(shared[0])}, and the probe of one would gate both; give them other "
                    "sites, or the same probe and scope"
                )


def _reaches(probe: SiteKey, site: SiteKey, cross_layer: bool) -> bool:
    return probe == site or (cross_layer and site[1] > probe[1])
