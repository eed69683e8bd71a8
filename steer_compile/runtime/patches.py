"""`Patch`: one row in place of the value of a token, and where that row comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import SiteLike
from steer_compile.runtime.vectors import SiteKey, finite, site_key

ZEROS = "zeros"
"""The source that is all zeros, of whatever width the site has."""


@runtime_checkable
class RowSource(Protocol):
    """What captured rows are read from: `CaptureLog`, `steer_compile.capture.rows.Rows`."""

    def row(self, site: SiteKey, request: int | str, position: int) -> Tensor:
        """The captured value (H,) of one token."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured row as the source of a patch.

    Attributes:
        rows: what was captured.
        request: batch element of a log, or name or number of a request of rows.
        position: absolute position; None is the position that is patched.
        site: hook and layer; None is the site that is patched.

    Raises:
        SpecError: ``rows`` holds no captured rows, or a site that is none.
    """

    rows: RowSource
    request: int | str = 0
    position: int | None = None
    site: SiteLike | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, RowSource):
            raise SpecError(f"{type(self.rows).__name__} holds no captured rows; give a CaptureLog or Rows")
        if self.site is not None:
            object.__setattr__(self, "site", site_key(self.site))


Source: TypeAlias = Any
"""A vector (H,), ``"zeros"``, `Captured`, or captured rows as `Captured` takes them."""


@dataclass(frozen=True, eq=False)
class Patch:
    """``(1 - alpha) * h + alpha * source`` in place of the value h of some tokens (kernels/patch_rows.py).

    Attributes:
        site: ``("post_block", 3)`` or ``"layers.3.post_block"``.
        position: absolute position in the sequence, or several; prompt and generated tokens are counted together, and
            padding is left out.
        source: a vector (H,), ``"zeros"``, `Captured`, or a log or rows of which request 0 is taken.
        alpha: share of the source; 1 replaces, 0 leaves, anything else mixes.
        dims: the dimensions that are patched; None is all.

    Raises:
        SpecError: a site, position or dimension that cannot be meant. VectorError: a source or alpha that is no
            finite number.
    """

    site: SiteLike
    position: int | Iterable[int]
    source: Source
    alpha: float = 1.0
    dims: Iterable[int] | None = None

    def __post_init__(self) -> None:
        given = {
            "site": site_key(self.site),
            "position": _whole("position", self.position),
            "source": _source(self.source),
            "alpha": finite(self.alpha, "alpha"),
            "dims": None if self.dims is None else _whole("dims", self.dims),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def cells(self) -> Iterator[Cell]:
        """What is done at each position.

        Raises:
            SteerError: of captured rows that do not hold the site, request or position.
        """
        site, dims = site_key(self.site), None if self.dims is None else _whole("dims", self.dims)
        for position in _whole("position", self.position):
            if isinstance(self.source, Captured):
                there = self.source.position if self.source.position is not None else position
                where = site_key(self.source.site) if self.source.site is not None else site
                values: Tensor | None = self.source.rows.row(where, self.source.request, there)
                origin: object = (id(self.source.rows), where, self.source.request, there)
            else:
                values, origin = self.source, id(self.source)
            yield Cell(site, position, values, self.alpha, dims, (origin, self.alpha, dims))


@dataclass(frozen=True, eq=False)
class Cell:
    """One patched position. ``values``: (H,) or None for zeros; equal ``content`` may share a slot."""

    site: SiteKey
    position: int
    values: Tensor | None
    alpha: float
    dims: tuple[int, ...] | None
    content: object

    @property
    def name(self) -> str:
        return f"the patch of layers.{self.site[1]}.{self.site[0]} at position {self.position}"


def _whole(what: str, given: object) -> tuple[int, ...]:
    numbers = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    plain = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if not numbers or len(plain) < len(numbers) or len(set(plain)) < len(plain):
        raise SpecError(f"{what}={given!r} of a patch: give whole numbers from 0 on, each once, and at least one")
    return tuple(plain)


def _source(given: Any) -> Tensor | Captured | None:
    """The source in its plain form, None for zeros."""
    if isinstance(given, Captured) or (isinstance(given, str) and given == ZEROS):
        return given if isinstance(given, Captured) else None
    if isinstance(given, RowSource):
        return Captured(given)
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VectorError(
            f"the source of a patch is {given!r}; give a vector, {ZEROS!r}, or captured rows (Captured)"
        ) from error
    if not tensor.dtype.is_floating_point or tensor.dim() != 1 or not tensor.numel():
        raise VectorError(
            f"the source of a patch has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; give floating-point "
            "numbers in one dimension of the site's width"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise VectorError("the source of a patch holds NaN or infinity; fix the vector")
    return tensor.detach().clone()
