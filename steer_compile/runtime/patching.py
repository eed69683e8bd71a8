"""`SitePatches`: the patches of a block of calls, and the slots of the tables that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import NotSteered, SpecError, TableFull, VectorError
from steer_compile.runtime.patches import Cell, Patch
from steer_compile.runtime.rows import Step
from steer_compile.runtime.scope import Scope
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import SiteKey

Lines = Mapping[SiteKey, tuple[torch.Tensor, torch.Tensor]]
"""Rows and shares (n, H) of each site's slots from 1 on."""


@dataclass(frozen=True)
class _Placed:
    """A patched position, the slot of its row, and its sequence (None: every one)."""

    cell: Cell
    slot: int
    sequence: int | None

    def of(self, batch: int) -> range:
        return range(batch) if self.sequence is None else range(self.sequence, self.sequence + 1)


@dataclass
class _Block:
    """What one block of calls patches, and how far its calls got."""

    placed: tuple[_Placed, ...]
    slots: Mapping[SiteKey, tuple[Cell, ...]]
    sequences: int | None
    reached: set[tuple[int, int]] = field(default_factory=set)
    """Number of a patch and sequence in which it was applied."""
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First and last position that the calls computed of each sequence."""


class SitePatches:
    """Patches of the calls inside of a block. They hold as a whole or not at all."""

    def __init__(self, tables: TableSet, scope: Scope) -> None:
        self._tables = tables
        self._scope = scope
        self._block: _Block | None = None
        self._step: Step | None = None
        self._marked = False

    def begin(self, patches: Iterable[Patch], rows: Sequence[Iterable[Patch]] | None) -> None:
        """Patch from now on; see `Runtime.patch` for what it raises."""
        if self._block is not None:
            raise SpecError("a patch block is inside of another one; give all patches to one block")
        everyone = tuple(patches)
        if rows is not None and everyone:
            raise SpecError("both patches for all sequences and rows are given; give one of them")
        groups = [(None, everyone)] if rows is None else list(enumerate(map(tuple, rows)))
        block = self._placed(groups, None if rows is None else len(groups))
        self._check(block)
        lines = self._lines(block)
        self._block, self._step = block, None
        self._write(lines)

    def end(self) -> None:
        """Patch no longer."""
        self._block = self._step = None
        self._unmark()

    def _placed(self, groups: Sequence[tuple[int | None, tuple[Patch, ...]]], sequences: int | None) -> _Block:
        """Give each distinct row of a site a slot of its own."""
        slots: dict[SiteKey, dict[object, tuple[int, Cell]]] = {}
        placed: dict[tuple[SiteKey, int | None, int], _Placed] = {}
        for sequence, patches in groups:
            for patch in patches:
                if not isinstance(patch, Patch):
                    raise SpecError(f"{patch!r} is no patch; give Patch(site, position, source)")
                for cell in patch.cells():
                    own = slots.setdefault(cell.site, {})
                    slot, _ = own.setdefault(cell.content, (len(own) + 1, cell))
                    place = (cell.site, sequence, cell.position)
                    if place in placed:
                        raise SpecError(f"{cell.name} is given twice for a sequence; give each value one patch")
                    placed[place] = _Placed(cell, slot, sequence)
        lines = {site: tuple(cell for _, cell in own.values()) for site, own in slots.items()}
        return _Block(tuple(placed.values()), lines, sequences)

    def _check(self, block: _Block, whole: bool = False) -> None:
        most = self._tables.spec.patches
        for site, cells in block.slots.items():
            for cell in cells:
                self._scope.check("patch", site, None if cell.values is None else cell.values.numel(), whole)
            if len(cells) > most:
                raise TableFull(
                    f"layers.{site[1]}.{site[0]} is patched with {len(cells)} distinct rows at once but the spec has "
                    f"patches={most}; raise it and compile again, or patch in several calls"
                )
            if site not in self._tables.sites("patch"):
                for cell in cells:
                    _check_finite(cell.name, cell.values)

    def check_all(self, whole: bool = False) -> None:
        """Raise for patches that do not fit the compiled sites (``whole``: all parts of the model ran).

        Raises:
            SiteNotFound, VectorError: as in `Runtime.patch`.
        """
        if self._block is not None:
            self._check(self._block, whole)

    def check_batch(self, batch: int) -> None:
        """Raise `NotSteered` for a call of another number of sequences than were given patches."""
        wanted = None if self._block is None else self._block.sequences
        if wanted is not None and wanted != batch:
            raise NotSteered(
                f"{wanted} rows of patches are given but the call has {batch} sequences; give a list, which may be "
                "empty, for each"
            )

    def check_reached(self) -> None:
        """Raise `NotSteered` for a patch that no call inside the block applied."""
        block = self._block
        for number, placed in enumerate(block.placed if block is not None else ()):
            assert block is not None
            for sequence in placed.of(1 + max(block.seen, default=0)):
                if (number, sequence) not in block.reached:
                    first, last = block.seen.get(sequence, (0, -1))
                    have = f"positions {first} to {last}" if first <= last else "no position"
                    raise NotSteered(
                        f"{placed.cell.name} of sequence {sequence} was never applied: the calls inside the block "
                        f"computed {have} of it; give a position that they compute"
                    )

    def bind(self) -> None:
        """Write everything into tables that have grown, in the middle of a call if need be."""
        if self._block is not None:
            self._write(self._lines(self._block))
            self._mark()

    def before_call(self, step: Step) -> None:
        """Say which slot each token of the call reads at each site."""
        if self._block is not None:
            self._step = step
            self._mark()

    def _lines(self, block: _Block) -> Lines:
        """What the slots of compiled sites hold, checked."""
        known = set(self._tables.sites("patch"))
        return {site: self._site_lines(site, cells) for site, cells in block.slots.items() if site in known}

    def _site_lines(self, site: SiteKey, cells: Sequence[Cell]) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._tables.view("patch", site)
        width = table.size(1)
        shares = torch.zeros(len(cells), width, dtype=torch.float32, device="cpu")
        none = torch.zeros(width, dtype=table.dtype, device=table.device)
        for share, cell in zip(shares, cells, strict=True):
            if cell.dims is not None and max(cell.dims) >= width:
                raise VectorError(
                    f"{cell.name} has dimension {max(cell.dims)} but the site is {width} wide; give dims below that"
                )
            share[slice(None) if cell.dims is None else list(cell.dims)] = cell.alpha
        rows = torch.stack([none if c.values is None else c.values.to(table.device, table.dtype) for c in cells])
        if not bool(torch.isfinite(rows).all()):
            for cell in cells:
                _check_finite(cell.name, cell.values)
            raise VectorError(f"a source of layers.{site[1]}.{site[0]} overflows the table's dtype {table.dtype}")
        return rows, shares

    def _write(self, lines: Lines) -> None:
        with torch.no_grad():
            for site, (rows, shares) in lines.items():
                self._tables.view("patch", site)[1 : len(rows) + 1].copy_(rows)
                self._tables.view("patch_alpha", site)[1 : len(rows) + 1].copy_(shares)

    def _mark(self) -> None:
        """Write the slot of each token of the call, and note which patches it applies."""
        block, step = self._block, self._step
        if block is None or step is None:
            return
        slots: dict[SiteKey, npt.NDArray[np.int32]] = {}
        spans = [step.span(element) for element in range(step.batch)]
        for element, (_, begin, end) in enumerate(spans):
            first, last = block.seen.get(element, (begin, end - 1))
            block.seen[element] = (min(first, begin), max(last, end - 1))
        for number, placed in enumerate(block.placed):
            for element in placed.of(step.batch):
                first, begin, end = spans[element]
                if begin <= placed.cell.position < end:
                    empty = np.zeros((step.batch, step.length), np.int32)
                    slots.setdefault(placed.cell.site, empty)[element, placed.cell.position - first] = placed.slot
                    block.reached.add((number, element))
        self._send(slots, step.batch * step.length)

    def _send(self, slots: Mapping[SiteKey, npt.NDArray[np.int32]], tokens: int) -> None:
        if not slots:
            self._unmark()
            return
        idle = np.zeros(tokens, np.int32)
        with torch.no_grad():
            for bank, tensor in zip(self._tables.banks, self._tables.tensors, strict=True):
                if bank.kind == "patch_slot":
                    lines = torch.from_numpy(np.stack([slots.get(s, idle).reshape(-1) for s in bank.sites]))
                    lines = lines.pin_memory() if tensor.is_cuda else lines
                    tensor[:, :tokens, 0].copy_(lines, non_blocking=True)
        self._marked = True

    def _unmark(self) -> None:
        """Let every token pass through, unless it does already."""
        if self._marked:
            with torch.no_grad():
                for bank, tensor in zip(self._tables.banks, self._tables.tensors, strict=True):
                    if bank.kind == "patch_slot":
                        tensor.zero_()
            self._marked = False


def _check_finite(name: str, values: torch.Tensor | None) -> None:
    if values is not None and not bool(torch.isfinite(values).all()):
        raise VectorError(f"the source of {name} holds NaN or infinity; fix the vector")
