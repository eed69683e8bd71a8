"""Rows that say who they are: the values of a row are made from its request, position and site."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steer_compile.capture.consumer import Began, Consumer, Ended, Kept, Meta
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.capture.rows import Rows

KEYS = ("layers.0.post_block", "layers.1.post_block")
WIDTH = 8
META = Meta("model", "spec", 3)


def value(name: str, position: int, key: str, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    """What a row holds."""
    start = (sum(map(ord, name)) * 7 + position * 3 + KEYS.index(key)) % 101
    return (torch.arange(width) + start).to(dtype)


def rows(
    spans: Sequence[tuple[str, int, int]], step: int = 0, dtype: torch.dtype = torch.float32, width: int = WIDTH,
    keys: Sequence[str] = KEYS,
) -> Rows:  # fmt: skip
    """Rows of requests, each from one position up to another."""
    names = tuple(dict.fromkeys(name for name, _, _ in spans))
    each = [(name, position) for name, first, stop in spans for position in range(first, stop)]
    positions = torch.tensor([position for _, position in each], dtype=torch.int64)
    empty = torch.empty(0, width, dtype=dtype)
    return Rows(
        names,
        torch.tensor([names.index(name) for name, _ in each], dtype=torch.int32),
        positions,
        positions * 2 + 1,
        torch.full((len(each),), step, dtype=torch.int64),
        {key: torch.stack([value(n, p, key, dtype, width) for n, p in each]) if each else empty for key in keys},
    )


def assert_rows(found: Rows, name: str, positions: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """The rows of a request are those of these positions, with the right labels and values."""
    own = found.of(name)
    assert own.positions.tolist() == list(positions)
    assert own.token_ids.tolist() == [2 * p + 1 for p in positions]
    for key, got in own.values.items():
        assert got.dtype == dtype
        assert all(
            torch.equal(row, value(name, p, key, dtype, got.size(1))) for row, p in zip(got, positions, strict=True)
        )


def submit(pipeline: Pipeline, given: Rows) -> int:
    """Rows as if they were the tensors of a step."""
    index = np.arange(len(given))
    of = StepRows(given.requests, given.request.numpy(), index, int(given.steps[0]))
    return pipeline.submit(of, given.positions, given.values, given.token_ids)


def feed(consumer: Consumer, *parts: Rows, tag: str = "", dropped: int = 0) -> dict[str, Kept]:
    """Tell a consumer that requests begin, have rows, and end; what it says of each."""
    names = list(dict.fromkeys(name for part in parts for name in part.requests))
    for name in names:
        consumer.began(Began(name, tag, META))
    for part in parts:
        consumer.rows(part)
    found: dict[str, Kept] = {}
    for name in names:
        kept = consumer.ended(Ended(name, tag, dropped, META))
        assert not hasattr(kept, "__await__")
        found[name] = kept
    return found
