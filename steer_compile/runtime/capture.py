"""What a block of calls captured, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from steer_compile.errors import NotSteered, SiteNotFound
from steer_compile.hooks import parse_hook
from steer_compile.runtime.vectors import SiteKey


class CaptureLog:
    """Captured values by site. ``log["post_block", 3]`` is (batch, tokens, width), the tokens of all calls in order."""

    def __init__(self) -> None:
        self.steps: list[dict[SiteKey, torch.Tensor]] = []

    def take(self, values: dict[SiteKey, torch.Tensor], batch: int, length: int) -> None:
        """Copy the values of one call, each ``(batch * length, width)``."""
        self.steps.append({k: v.clone().view(batch, length, -1) for k, v in values.items()})

    def __getitem__(self, site: SiteKey) -> torch.Tensor:
        key = (parse_hook(site[0]), site[1])
        if not self.steps:
            raise NotSteered(f"layers.{key[1]}.{key[0]} was not captured: no compiled graph ran inside the block yet")
        if key not in self.steps[0]:
            have = ", ".join(f"layers.{n}.{h}" for h, n in self.steps[0])
            raise SiteNotFound(f"layers.{key[1]}.{key[0]} is not captured; captured are {have}")
        return torch.cat([step[key] for step in self.steps], dim=1)

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self.steps[0] if self.steps else {})

    def __len__(self) -> int:
        return len(self.steps)
