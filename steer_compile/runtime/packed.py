"""`PackedRows`: which tokens of a call packed captures store, in which rows, and what they stored.

Rows are those of the chosen tokens in the order of the batch, one for each token at all sites. A group is a set of
sites; its tokens are stored there. A token that several readers choose has one row, at the sites of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import CaptureError, SiteNotFound, TableFull
from steer_compile.ir import HookSchema
from steer_compile.runtime.demand import NO_TOKENS, Choice, Demand, Sites
from steer_compile.runtime.rows import Step
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import CAPTURE_GROUPS, SteerSpec

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is stored of one call of ``tokens`` tokens.

    Attributes:
        step: the call.
        rows: row of each token, -1 for none, and its group (tokens, 2) int32.
        groups: sites of each group.
        readers: who asked, and which tokens of the call each gets (tokens,).
        sites: sites that any of them asked for.
    """

    step: Step
    rows: npt.NDArray[np.int32]
    groups: tuple[Sites, ...]
    readers: tuple[tuple[Demand, Mask], ...]
    sites: Sites

    @property
    def used(self) -> int:
        """Rows in use."""
        return int(self.rows[:, 0].max(initial=-1)) + 1


@dataclass(eq=False)
class PackedCall:
    """Rows of one call for one reader.

    Attributes:
        names: names of the sequences.
        sites: sites that the reader wants of each sequence.
        step: number of the call.
        request, positions, tokens, rows: of each of the reader's rows its sequence, its position there (padding left
            out), its token's number in the call, and its place in ``values``.
        values: by site (used, \\*logical shape), on the device; complete when all parts of the model ran.
        token_ids: ids of all tokens of the call (batch * length,) on the device, None where no graph has them.
    """

    names: tuple[str, ...]
    sites: tuple[Sites, ...]
    step: int
    request: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    values: dict[SiteKey, torch.Tensor] = field(default_factory=dict)
    token_ids: torch.Tensor | None = None

    def add(self, values: Mapping[SiteKey, torch.Tensor], token_ids: torch.Tensor | None) -> None:
        """Add what a part of the model stored at the reader's sites."""
        wanted = united(self.sites)
        self.values.update({site: value for site, value in values.items() if site in wanted})
        self.token_ids = token_ids if self.token_ids is None else self.token_ids


def choose(step: Step, demands: Sequence[Demand], capacity: int) -> Chosen:
    """Give each token that somebody wants a row. Nothing changes on a device.

    Raises:
        TableFull: more tokens than ``capacity``, or more sets of sites than there are groups.
        NotSteered: tokens or sites for another number of sequences.
        CaptureError: a choice whose mask has another length.
    """
    each = [one.of(step.batch) for one in demands]
    wanted = np.stack([_wanted(step, of_sequences) for of_sequences in each]) & _real(step)
    some = wanted.any(0)
    count = int(some.sum())
    if count > capacity:
        raise TableFull(
            f"the call has {count} chosen tokens of {step.batch} x {step.length} but packed captures have room for "
            f"capture_rows={capacity}; choose fewer, split the call, or raise it in the spec and compile again"
        )
    groups, group = _grouped(wanted, [[sites for _, sites in of_sequences] for of_sequences in each])
    place = np.where(some, np.cumsum(some).reshape(some.shape) - 1, -1)
    rows = np.stack([place, np.where(some, group, 0)], -1).astype(np.int32).reshape(-1, 2)
    readers = tuple((one, wanted[d].ravel()) for d, one in enumerate(demands))
    return Chosen(step, rows, groups, readers, united(sites for of_sequences in each for _, sites in of_sequences))


def united(sites: Iterable[Sites]) -> Sites:
    """All sites of several sets."""
    return reduce(or_, set(sites), Sites(frozenset()))


def _wanted(step: Step, of_sequences: Sequence[tuple[Choice, Sites]]) -> Mask:
    """The tokens (batch, length) that one reader wants; sequences that are alike are asked for once."""
    masks: dict[tuple[int, int, int], Mask] = {}
    keys = []
    for (choice, sites), pad, prompt in zip(of_sequences, step.pads, step.prompts, strict=True):
        keys.append((id(choice if sites else NO_TOKENS), pad, prompt))
        if keys[-1] not in masks:
            masks[keys[-1]] = _mask(choice if sites else NO_TOKENS, step, pad, prompt)
    number = {key: i for i, key in enumerate(masks)}
    return np.stack(list(masks.values()))[[number[key] for key in keys]]


def _mask(choice: Choice, step: Step, pad: int, prompt: int) -> Mask:
    mask = np.asarray(choice.mask(step.start - pad, step.length, prompt), np.bool_)
    if mask.shape != (step.length,):
        raise CaptureError(
            f"{type(choice).__name__}.mask gave {mask.shape} for {step.length} tokens; give one truth value for each"
        )
    return mask


def _positions(step: Step) -> npt.NDArray[np.int64]:
    """Position of each token in its sequence (batch, length), below 0 for padding in front."""
    pads = np.asarray(step.pads, np.int64).reshape(-1, 1)
    return step.start - pads + np.arange(step.length)


def _real(step: Step) -> Mask:
    """The tokens (batch, length) that are no padding."""
    positions = _positions(step)
    prompts = np.asarray(step.prompts, np.int64).reshape(-1, 1)
    return (positions >= 0) & ((step.phase != "prefill") | (positions < prompts))


def _grouped(wanted: Mask, sites: Sequence[Sequence[Sites]]) -> tuple[tuple[Sites, ...], npt.NDArray[np.int64]]:
    """The sets of sites that tokens have, and each token's one (batch, length).

    Raises:
        TableFull: more sets than there are groups.
    """
    known: dict[Sites, int] = {}
    key = np.zeros(wanted.shape[1:], np.int64)
    for by_sequence, mask in zip(sites, wanted, strict=True):
        number = np.array([known.setdefault(one, len(known) + 1) for one in by_sequence]).reshape(-1, 1)
        _, key = np.unique(key * (len(known) + 1) + np.where(mask, number, 0), return_inverse=True)
        key = key.reshape(mask.shape)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    unions: list[int] = []
    found: dict[Sites, int] = {}
    for at in first:
        b, t = divmod(int(at), wanted.shape[2])
        wants = [of[b] for of, mask in zip(sites, wanted, strict=True) if mask[b, t]]
        unions.append(found.setdefault(united(wants), len(found)) if wants else 0)
    if len(found) > CAPTURE_GROUPS:
        raise TableFull(
            f"the call has tokens of {len(found)} sets of sites but packed captures have room for {CAPTURE_GROUPS}; "
            "give more sequences the same sites, or split the call"
        )
    return tuple(found), np.asarray(unions, np.int64)[group.reshape(key.shape)]


class PackedRows:
    """Writes what a call stores to the tables, and reads what it stored.

    Attributes:
        schemas: what a row of each site is.
        chosen: what the current call stores, None where nobody reads.
    """

    def __init__(self, spec: SteerSpec, tables: TableSet) -> None:
        self.schemas: dict[SiteKey, HookSchema] = {}
        self.chosen: Chosen | None = None
        self._spec = spec
        self._tables = tables
        self._written: tuple[npt.NDArray[np.int32], tuple[Sites, ...], int] | None = None

    def check(self, wanted: Demand, whole: bool) -> None:
        """Raise for sites that are not captured.

        Args:
            whole: all graphs of the model are compiled.

        Raises:
            SiteNotFound: the spec captures no such hook, or no graph has the site.
        """
        hooks, have = {s.hook for s in self._spec.capture}, self._tables.sites("packed")
        known = {*have, *((hook, None) for hook, _ in have)}
        for hook, layer in wanted.named():
            here = (hook, layer) in known
            if hook not in hooks or (whole and not here):
                name = hook if layer is None else f"layers.{layer}.{hook}"
                near = ", ".join(f"layers.{n}.{h}" for h, n in have) or ", ".join(sorted(hooks))
                raise SiteNotFound(f"{name} is not captured; captured are {near}; choose one, or add it to the spec")

    def write(self, chosen: Chosen | None) -> None:
        """Make the graphs store what is chosen; tables that hold just that are left alone."""
        self.chosen = chosen
        if chosen is None:
            if self._written is not None:
                self._tables.chosen[:, 0].fill_(-1)
            self._written = None
            return
        rows, groups, places = self._written or (None, (), 0)
        if rows is None or not np.array_equal(rows, chosen.rows):
            self._tables.choose(chosen.rows)
        sites = self._tables.sites("choice")
        if groups != chosen.groups or places != len(sites):
            lines = {site: numbers([[float(site in group)] for group in chosen.groups]) for site in sites}
            self._tables.put("choice", (0,), CAPTURE_GROUPS, lines if chosen.groups else {})
        self._written = (chosen.rows, chosen.groups, len(sites))

    def refresh(self) -> None:
        """Let sites of a later part of the model, compiled since the call began, store what is chosen."""
        if self.chosen is not None:
            self.write(self.chosen)

    def stored(self, sites: Collection[SiteKey]) -> dict[SiteKey, torch.Tensor]:
        """Copies of the rows that the call stored, (used, \\*logical shape) on the device, at those of ``sites`` that
        somebody wants."""
        if self.chosen is None:
            return {}
        used, wanted = self.chosen.used, self.chosen.sites
        found = self._tables.captured(used, "packed")
        kept = [site for site in sites if site in found and site in wanted]
        return {site: found[site].clone().view(used, *self.schemas[site].logical_shape) for site in kept}

    def call(self, reader: Demand, names: tuple[str, ...], number: int) -> PackedCall | None:
        """The current call for one of its readers, without values yet; None for who did not read when it began."""
        mask = next((m for d, m in self.chosen.readers if d is reader), None) if self.chosen is not None else None
        if self.chosen is None or mask is None:
            return None
        step, tokens = self.chosen.step, np.flatnonzero(mask)
        request = tokens // max(step.length, 1)
        positions = _positions(step).ravel()[tokens]
        sites = tuple(of_sequence for _, of_sequence in reader.of(step.batch))
        rows = self.chosen.rows[tokens, 0].astype(np.int64)
        return PackedCall(names, sites, number, request, positions, tokens, rows)
