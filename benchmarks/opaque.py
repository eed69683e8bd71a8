"""What an opaque operator at each site costs: the lowering that this package avoids, for comparison in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from steer_compile.kernels.site import SiteArgs, launch
from steer_compile.kernels.steer_rows import SteerArgs
from steer_compile.passes import splice


@torch.library.custom_op("steer_benchmarks::opaque_add_rows", mutates_args=())
def opaque_add_rows(h: Tensor, rows: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """The additive stage alone as an operator that Inductor cannot look into."""
    args = SiteArgs(h.reshape(-1, h.size(-1)), rows=rows.reshape(-1), table=table, scale=scale)
    return launch(args)[0].view(h.shape)


@opaque_add_rows.register_fake
def _(h: Tensor, rows: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(h)


@contextmanager
def opaque_sites() -> Iterator[None]:
    """Graphs that are compiled inside get an opaque operator at each site in place of plain operators."""

    def proxied(h: Any, args: SteerArgs, dtype: torch.dtype, clamps: int = 0) -> fx.Proxy:
        target = torch.ops.steer_benchmarks.opaque_add_rows.default
        made: fx.Proxy = h.tracer.create_proxy("call_function", target, (h, args.rows, args.table, args.scale), {})
        return made

    original, splice.steer_rows = splice.steer_rows, proxied  # type: ignore[assignment]
    try:
        yield
    finally:
        splice.steer_rows = original
