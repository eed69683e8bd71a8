"""`RowDataset`: one site's rows of many files as a map-style dataset, read from the disk as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from steer_compile.capture.codec import Mapped
from steer_compile.capture.read import Sidecar, Source, published
from steer_compile.errors import CaptureError


class _Block(NamedTuple):
    path: Path
    name: str
    rows: int


class RowDataset(Dataset[Tensor]):
    """Rows of one site, memory-mapped, for a `torch.utils.data.DataLoader` with any number of workers.

    Rows of all files follow one another in the order of the files' names; a loader shuffles them. It is pickled as
    paths alone, and each process maps the files for itself. A batch is one gather from the maps:
    ``dataset.batch(indices)``, which `__getitems__` uses.

    Args:
        source: sidecars, or folders of them, as `read` takes them; parquet is not mapped.
        key: the site, ``layers.3.post_block``.

    Raises:
        CaptureError: nothing there, a damaged or parquet file, or files that do not have the site in one form.
    """

    def __init__(self, source: Source, key: str) -> None:
        self.key = key
        self._blocks: list[_Block] = []
        kinds: dict[Any, Path] = {}
        seen: set[str] = set()
        for path in published(source):
            if path.suffix == ".parquet":
                raise CaptureError(f"{path} cannot be mapped; capture to the files consumer, or use read()")
            side = Sidecar.read(path)
            seen |= set(side.sites)
            if key not in side.sites:
                continue
            kinds.setdefault(side.sites[key], path)
            blocks = zip(side.prefixes, side.counts, strict=True)
            self._blocks += [_Block(side.path, f"{prefix}{key}", rows) for prefix, rows in blocks if rows]
        if not kinds:
            raise CaptureError(f"no file holds {key}; there are {', '.join(sorted(seen))}")
        if len(kinds) > 1:
            texts = ", ".join(f"{path.name} {dtype} {shape}" for (dtype, shape), path in kinds.items())
            raise CaptureError(f"{key} has several forms ({texts}); give files of one model")
        ((self.dtype, self.row_shape),) = kinds
        self._ends = np.cumsum([block.rows for block in self._blocks], dtype=np.int64)
        self._maps: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Tensor:
        """One row (\\*row shape), a copy."""
        return self.batch([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Rows, which a loader's collate function stacks."""
        return list(self.batch(indices).unbind())

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Rows by number (n, \\*row shape), a copy; negative numbers count from the end.

        Raises:
            IndexError: there is no such row.
        """
        index = np.asarray(indices, np.int64)
        index = np.where(index < 0, index + len(self), index)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"row {index.max()} is asked for of {len(self)}")
        found = torch.empty((len(index), *self.row_shape), dtype=self.dtype)
        block = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(block).tolist():
            where = np.flatnonzero(block == number)
            first = int(self._ends[number]) - self._blocks[number].rows
            found[torch.from_numpy(where)] = self._mapped(number)[torch.from_numpy(index[where] - first)]
        return found

    def _mapped(self, number: int) -> Tensor:
        if number not in self._maps:
            path, name, _ = self._blocks[number]
            self._maps[number] = Mapped(path).tensor(name)
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}
