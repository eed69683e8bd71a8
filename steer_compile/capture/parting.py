"""Rows of one step, parted by request."""

from __future__ import annotations

import torch

from steer_compile.capture.copies import pieces
from steer_compile.capture.rows import Rows


def parted(rows: Rows) -> list[Rows]:
    """The rows of each request that has some, which is then the only one that is named; copies, not views."""
    if len(rows.requests) == 1:
        return [rows] if len(rows) else []
    request = rows.request
    if bool((request[1:] < request[:-1]).any()):
        rows = rows.take(torch.argsort(request, stable=True))
    counts = rows.request.bincount(minlength=len(rows.requests)).tolist()
    labels = [label.split(counts) for label in (rows.positions, rows.token_ids, rows.steps)]
    values = {key: pieces(value, counts) for key, value in rows.values.items()}
    found = []
    for i, (name, count) in enumerate(zip(rows.requests, counts, strict=True)):
        if count:
            none = torch.zeros(count, dtype=torch.int32)
            positions, ids, steps = (parts[i].clone() for parts in labels)
            own = {key: parts[i] for key, parts in values.items()}
            found.append(Rows((name,), none, positions, ids, steps, own))
    return found
