"""Declarative gates of a request: what the front end makes of them for the engine.

Gates that are always on, or that a probe opens in the same forward, become part of the request's row. Those that are
decided between steps go to the engine's built-in controller, with the vectors that their names have now; only what a
conversation holds is sent by name, with its set, so that a change of the set is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from steer_compile.dynamic.codec import clamp_to_data, packed, site_name, text_of, vectors_to_data
from steer_compile.dynamic.declarative import DeclarativeGates
from steer_compile.dynamic.gate_program import GateProgram
from steer_compile.dynamic.gates import Add, Attenuate, ClampTo, Gate, gates_from_data
from steer_compile.errors import SpecError, TableFull
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.vectors import SiteKey, TokenSelection, scaled, vector_set
from steer_compile.spec import SteerSpec
from steer_compile.vllm.transport import sent_sets


@dataclass(frozen=True)
class GatesAsked:
    """A request's gates, and the name of what it belongs to, "" for nothing."""

    gates: tuple[Gate, ...] = ()
    conversation: str = ""

    @classmethod
    def taken(cls, data: dict[str, Any]) -> GatesAsked | None:
        """Those of a request's plain data, which are taken out of it; None where it has none.

        Raises:
            SpecError, VectorError: data of another form, bad numbers, or combinations that cannot be.
        """
        given, conversation = data.pop("gates", None), data.pop("conversation", None)
        if given is None and conversation is None:
            return None
        gates = gates_from_data(given if given is not None else ())
        return cls(gates, "" if conversation is None else text_of("the conversation", conversation))


def gated(
    registry: Registry, spec: SteerSpec, own: Contents, tokens: TokenSelection | None, asked: GatesAsked
) -> tuple[Contents, Contents, dict[str, Any]]:
    """What a request's decoded tokens get in its row, what they get at most, and plain data for the engine.

    Args:
        own: what the request itself adds to decoded tokens.

    Raises:
        SpecError, SiteNotFound, VectorError, UnknownName: gates that cannot be together, or that the spec has no sites
            or op families for. TableFull: the spec has no rows for overrides, by which gates of the host act.
    """
    program = DeclarativeGates(registry).declare("request", asked.gates)
    _check_tokens(tokens, asked)
    _check_room(program, spec, asked)
    _check_probes(program, spec, own)
    row, whole = (
        GateProgram(gates, ()).contents(own, registry.named) for gates in (program.row, (*program.row, *program.host))
    )
    names = {name for gate in asked.gates if gate.scope == "rest_of_conversation" for name, _ in _named(gate)}
    data = {
        "gates": [_to_data(_inlined(gate, registry)) for gate, _ in program.host],
        "conversation": asked.conversation,
        "sets": sent_sets({name: registry.named.get(name) for name in sorted(names)}),
    }
    return row, whole, data


def _check_tokens(tokens: TokenSelection | None, asked: GatesAsked) -> None:
    if asked.gates and tokens is not None and not tokens.generated:
        raise SpecError(
            "the request has gates, which are for generated tokens, and its tokens leave these out; give "
            "tokens.generated=true, or leave tokens or gates out"
        )


def _check_room(program: GateProgram, spec: SteerSpec, asked: GatesAsked) -> None:
    if (program.host or asked.conversation) and not spec.overrides:
        what = "a gate that is decided between steps" if program.host else "a conversation"
        raise TableFull(
            f"the request has {what}, which acts by rows for overrides, and the engine's spec has none; give "
            "SteerSpec(overrides=...), or gates of scope this_token"
        )
    held = [gate for gate in asked.gates if gate.scope == "rest_of_conversation"]
    if held and not asked.conversation:
        raise SpecError("a gate of scope rest_of_conversation needs the request's conversation; give its name")
    fades = any(isinstance(gate.apply, Attenuate) for gate, _ in program.host)
    if fades and any(isinstance(gate.apply, Add) for gate, _ in program.row):
        raise SpecError(
            "a gate attenuates between steps, and another one adds in the request's row, where it would be attenuated "
            "too; give the one that adds a probe and the scope next_step or rest_of_request"
        )


def _check_probes(program: GateProgram, spec: SteerSpec, own: Contents) -> None:
    """A probe in the graph gates all of the row's vectors, and is the site's only one of the row."""
    steered = {site for vectors, _ in own.parts for site, _ in vectors.items()}
    watched = {site for site, _ in own.monitors}
    for gate, _ in program.row:
        if gate.when is None:
            continue
        site = gate.when.site
        if site in watched:
            raise SpecError(
                f"the request has a monitor at {site_name(site)}, where a gate of scope this_token has its probe; "
                "leave one of them out"
            )
        reached = sorted(other for other in steered if _reaches(site, other, spec.cross_layer))
        if reached:
            raise SpecError(
                f"a gate of scope this_token has its probe at {site_name(site)}, and would gate the request's own "
                f"vectors at {site_name(reached[0])}; give them as what the gate adds, or the gate the scope next_step"
            )


def _reaches(probe: SiteKey, site: SiteKey, cross_layer: bool) -> bool:
    return probe == site or (cross_layer and site[1] >= probe[1])


def _named(gate: Gate) -> Iterable[tuple[str, float]]:
    return gate.apply.named if isinstance(gate.apply, Add) else ()


def _inlined(gate: Gate, registry: Registry) -> Gate:
    """The gate with vectors in place of names, but for what a conversation holds."""
    add = gate.apply
    if not isinstance(add, Add) or not add.named or gate.scope == "rest_of_conversation":
        return gate
    sets = [(registry.named.get(name), factor) for name, factor in add.named]
    return replace(gate, apply=Add(vector_set(scaled([(add.vectors, 1.0), *sets])), (), add.strength))


def _to_data(gate: Gate) -> dict[str, Any]:
    """Plain data that `gates_from_data` reads."""
    when: str | dict[str, Any] = "always"
    if gate.when is not None:
        monitor = gate.when.monitor
        numbers = {"threshold": monitor.threshold, "sharpness": monitor.sharpness}
        when = {"site": site_name(gate.when.site), "probe": packed(monitor.probe), **numbers}
    return {"when": when, "scope": gate.scope, "apply": _effect(gate.apply)}


def _effect(apply: Add | Attenuate | ClampTo) -> Mapping[str, Any]:
    if isinstance(apply, Attenuate):
        return {"attenuate": apply.strength}
    if isinstance(apply, ClampTo):
        return {"clamp": {site_name(site): [clamp_to_data(c) for c in each] for site, each in apply.clamps}}
    named = [list(item) for item in apply.named]
    return {"add": {"vectors": vectors_to_data(apply.vectors), "named": named, "strength": apply.strength}}
