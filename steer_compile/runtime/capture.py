"""What a block of calls captured, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from steer_compile.errors import CaptureError, NotSteered, SiteNotFound
from steer_compile.hooks import parse_hook
from steer_compile.runtime.demand import Demand
from steer_compile.runtime.packed import PackedCall
from steer_compile.runtime.rows import Step
from steer_compile.runtime.vectors import SiteKey


class Sink(Protocol):
    """Takes what calls capture as they go on, as in `Calls.sinks`. What it raises ends the call.

    Attributes:
        demand: the tokens and sites that it wants, which are what packed captures store.
    """

    demand: Demand

    def begin(self, step: Step, names: tuple[str, ...], number: int) -> None:
        """In front of a call: its shape and phase, the names of its sequences, and how many calls were before."""

    def take(self, values: Mapping[SiteKey, torch.Tensor], token_ids: torch.Tensor | None, last: bool) -> None:
        """Behind a compiled graph: views ``(batch * length, width)`` that the next call writes to, and token ids.

        Args:
            last: no further graph runs in this call.
        """

    def take_packed(self, call: PackedCall, continued: bool) -> PackedCall:
        """Where captures are packed: begin a call, or go on with the last one; returns the one that takes values."""


class CaptureLog:
    """Captured values by site. ``log["post_block", 3]`` is (batch, tokens, width), the tokens of all calls in order.

    Attributes:
        demand: the tokens and sites to take where captures are packed, None where they are dense.
        steps: the values of each call by site, where captures are dense.
        packed: the chosen rows of each call, where they are packed.
        calls: phase and positions of each call, None where they are not known.
    """

    def __init__(self, demand: Demand | None = None) -> None:
        self.demand = demand
        self.steps: list[dict[SiteKey, torch.Tensor]] = []
        self.calls: list[Step | None] = []
        self.packed: list[PackedCall] = []

    def take(
        self,
        values: Mapping[SiteKey, torch.Tensor],
        shape: tuple[int, int],
        continued: bool,
        call: Step | None = None,
    ) -> None:
        """Copy the values of one graph, each ``(batch * length, width)``.

        Args:
            continued: the graph is a further part of the model, in the same call as the graph before it.
            call: phase and positions of the call.
        """
        copies = {key: value.clone().view(*shape, value.size(-1)) for key, value in values.items()}
        if continued and self.steps:
            self.steps[-1].update(copies)
        else:
            self.steps.append(copies)
            self.calls.append(call)

    def take_packed(self, call: PackedCall, continued: bool) -> PackedCall:
        """Begin a call, or go on with the last one where ``continued``; returns the one that takes the values."""
        if not (continued and self.packed and self.packed[-1].step == call.step):
            self.packed.append(call)
        return self.packed[-1]

    def __getitem__(self, site: SiteKey) -> torch.Tensor:
        key = (parse_hook(site[0]), site[1])
        if self.demand is not None:
            raise CaptureError(
                f"layers.{key[1]}.{key[0]} has rows of chosen tokens alone, as the spec has capture_rows; read "
                "log.rows, or leave capture_rows out and compile again"
            )
        if not self.steps:
            raise NotSteered(f"layers.{key[1]}.{key[0]} was not captured: no compiled graph ran inside the block yet")
        if key not in self.steps[0]:
            have = ", ".join(f"layers.{n}.{h}" for h, n in self.steps[0])
            raise SiteNotFound(f"layers.{key[1]}.{key[0]} is not captured; captured are {have}")
        batches = sorted({step[key].size(0) for step in self.steps})
        if len(batches) > 1:
            raise SiteNotFound(f"the calls had batches of {batches} sequences; read log.steps[i][{key!r}] call by call")
        return torch.cat([step[key] for step in self.steps], dim=1)

    def row(self, site: SiteKey, request: int | str, position: int) -> torch.Tensor:
        """The value (H,) of one token, as the last call that computed it stored it.

        Args:
            request: number of the batch element.
            position: absolute position in its sequence, padding left out.

        Raises:
            NotSteered: nothing was captured yet. SiteNotFound: the site is not captured. CaptureError: no such element
                or position.
        """
        key, element = (parse_hook(site[0]), site[1]), int(request) if str(request).isdecimal() else -1
        if not self.steps or key not in self.steps[0]:
            self[key]
        seen: list[int] = []
        for values, call in zip(reversed(self.steps), reversed(self.calls), strict=True):
            if key in values and call is not None and 0 <= element < call.batch:
                first, begin, end = call.span(element)
                if begin <= position < end:
                    return values[key][element, position - first]
                seen += [begin, end - 1] if begin < end else []
        if not seen:
            raise CaptureError(f"the log has no batch element {request!r}; it has {self.steps[0][key].size(0)} of them")
        raise CaptureError(
            f"position {position} of batch element {element} is not in the log of layers.{key[1]}.{key[0]}; it has "
            f"positions {min(seen)} to {max(seen)}; capture a call that computes it"
        )

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self.steps[0] if self.steps else self.packed[0].values if self.packed else {})

    def __len__(self) -> int:
        return len(self.steps) + len(self.packed)
