"""`Reduction`: what of the captured values is kept, computed where the values are, so that little leaves the device.

    rows     h                     (n, H)   in the stream's dtype
    norm     |h|                   (n,)     fp32
    project  h . d for each d      (n, D)   fp32
    mean     sum h / n             (1, H)   fp32, over all chosen tokens of a request

Sums are of fp32 products, in the precision that torch is told to multiply fp32 matrices with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.vectors import SiteKey, by_site, checked_vector

KINDS = ("rows", "norm", "project", "mean")
MOST_DIRECTIONS = 256
"""Most directions of a projection at one site."""


class Reduction:
    """What is kept of a site's values at the chosen tokens. Equal ones compare equal.

    Attributes:
        kinds: some of `KINDS`; ``mean`` stands alone, as it has one row for a request: the last token's labels, and
            beside the means the number of tokens in them, ``tokens`` (1,) int64.
        directions: by site (D, H) fp32 on the CPU, for ``project``.

    Raises:
        SpecError: unknown kinds, ``mean`` beside others, or directions without ``project``.
        VectorError: directions that are no such vectors.
    """

    def __init__(self, kinds: str | Iterable[str] = ("rows",), directions: Mapping[Any, Any] | None = None) -> None:
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(dict.fromkeys(kinds))
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SpecError(
                f"{unknown[0] if unknown else 'nothing'!r} is no reduction; give some of {', '.join(KINDS)}"
            )
        if "mean" in self.kinds and len(self.kinds) > 1:
            raise SpecError(f"mean stands beside {', '.join(k for k in self.kinds if k != 'mean')}; capture it alone")
        if ("project" in self.kinds) != bool(directions):
            raise SpecError("a projection needs directions, and nothing else has any; give {site: [vectors]}")
        self.directions = {site: _directions(site, given) for site, given in by_site(directions or {}, "list").items()}
        digest = hashlib.sha256(repr(self.kinds).encode())
        for site, rows in sorted(self.directions.items()):
            digest.update(f"{site}{tuple(rows.shape)}".encode() + rows.numpy().tobytes())
        self._digest = digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reduction) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Reduction({', '.join(self.kinds)})"

    @property
    def mean(self) -> bool:
        return self.kinds == ("mean",)

    def check_top(self, top: object) -> None:
        """Raise `SpecError` for a mean of the tokens of a `Selection.top`."""
        if self.mean and top is not None:
            raise SpecError("a mean of the tokens of top is not kept; capture their rows, or a mean by position")

    def check(self, widths: Mapping[SiteKey, int]) -> None:
        """Raise unless each of the sites can be reduced.

        Raises:
            SpecError: a site without directions, or directions of a site that is not captured.
            VectorError: directions of another width.
        """
        if "project" not in self.kinds:
            return
        other = sorted(self.directions.keys() ^ widths.keys())
        if other:
            name = f"layers.{other[0][1]}.{other[0][0]}"
            have = "has no directions" if other[0] in widths else "is not captured and has directions"
            raise SpecError(f"{name} {have}; give the projection directions for each captured site, and for no other")
        for (hook, layer), rows in self.directions.items():
            width = widths[hook, layer]
            if rows.size(1) != width:
                raise VectorError(
                    f"the directions of layers.{layer}.{hook} have {rows.size(1)} numbers and its values {width}; "
                    f"give {width}"
                )

    def keys(self, site: SiteKey) -> tuple[str, ...]:
        """Names of what it makes of a site's values: ``layers.3.post_block``, ``layers.3.post_block.norm``."""
        name = f"layers.{site[1]}.{site[0]}"
        return tuple(name if kind == "rows" else f"{name}.{kind}" for kind in self.kinds)

    def of(self, values: Tensor, directions: Tensor | None = None) -> tuple[Tensor, ...]:
        """What it keeps of values (..., n, H), kind by kind and on their device; of a mean's, the values themselves.

        Args:
            directions: (..., D, H) fp32 on the values' device, for ``project``.
        """
        wide = values.float() if {"norm", "project"} & set(self.kinds) else values
        return tuple(values if kind in ("rows", "mean") else _one(kind, wide, directions) for kind in self.kinds)


def _one(kind: str, values: Tensor, directions: Tensor | None) -> Tensor:
    if kind == "norm":
        norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return norms
    assert directions is not None  # `Reduction.check` has seen to it
    return values @ directions.mT


def _directions(site: SiteKey, given: object) -> Tensor:
    name = f"the direction of layers.{site[1]}.{site[0]}"
    rows = list(given) if isinstance(given, Sequence | Tensor) and not isinstance(given, str) else [given]
    if isinstance(given, Tensor) and given.dim() == 1:
        rows = [given]
    if not 1 <= len(rows) <= MOST_DIRECTIONS:
        raise VectorError(f"{name} is one of {len(rows)}; give 1 to {MOST_DIRECTIONS}")
    vectors = [checked_vector(name, row) for row in rows]
    if len({v.numel() for v in vectors}) > 1:
        raise VectorError(f"{name} has another width than the others of its site; give all the site's width")
    return torch.stack(vectors)


def reference(kind: str, values: Tensor, directions: Tensor | None = None) -> Tensor:
    """The same in fp64 for values (n, H): what `Reduction.of` is tested against, and the mean (1, H)."""
    wide = values.double()
    if kind == "norm":
        return (wide * wide).sum(-1).sqrt()
    if kind == "project":
        assert directions is not None
        return (wide[:, None, :] * directions.double()[None]).sum(-1)
    return wide.mean(0, keepdim=True) if kind == "mean" else wide
