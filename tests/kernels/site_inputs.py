"""Random arguments of the site template, for tests in the interpreter and on a GPU, and for benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer_compile.kernels.site import SiteArgs

FAMILIES = ("branch", "capture", "add", "tier", "monitor", "row_monitor", "clamp", "sae")
GATED = ("gates", "score")
"""What is there beside other families only."""
PACKED = "packed"
"""In the place of ``capture``: chosen tokens are stored."""
ROWS, CLAMPS, GROUPS, FEATURES = 5, 3, 4, 11


@dataclass
class _Draw:
    tokens: int
    width: int
    dtype: torch.dtype
    table: torch.dtype
    device: str
    generator: torch.Generator

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype).to(self.device)

    def pick(self, values: Iterable[float], count: int) -> Tensor:
        given = torch.tensor(list(values))
        return given[torch.randint(0, len(given), (count,), generator=self.generator)].to(self.device)

    def rows(self) -> Tensor:
        drawn = torch.randint(0, ROWS, (self.tokens,), generator=self.generator, dtype=torch.int32)
        return drawn.to(self.device)

    def branch(self) -> dict[str, Tensor]:
        return {"branch": self.randn(self.tokens, self.width, dtype=self.dtype)}

    def capture(self) -> dict[str, Tensor]:
        shape = (1, self.tokens + 3, self.width)
        return {"capture": torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)}

    def packed(self) -> dict[str, Tensor]:
        """Each token has a row of its own or none, and a group of which some are stored."""
        rows = torch.randperm(self.tokens + 2, generator=self.generator)[: self.tokens]
        rows = torch.where(torch.rand(self.tokens, generator=self.generator) < 0.3, -1, rows)
        groups = torch.randint(0, GROUPS, (self.tokens,), generator=self.generator)
        choice = self.pick((0.0, 1.0), GROUPS).to(torch.int32).view(GROUPS, 1)
        return self.capture() | {"capture_rows": torch.stack([rows, groups], 1).int().to(self.device), "choice": choice}

    def add(self) -> dict[str, Tensor]:
        table = self.randn(ROWS, self.width, dtype=self.table)
        table[0] = 0
        return {"rows": self.rows(), "table": table, "scale": self.randn(ROWS)}

    def tier(self) -> dict[str, Tensor]:
        return {"tier": self.randn(1, self.width), "gain": self.pick((0.0, 1.5), self.tokens)}

    def monitor(self) -> dict[str, Tensor]:
        settings = torch.tensor([[0.1, 0.3, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]], device=self.device)
        decode = self.pick((0.0, 1.0), self.tokens)
        return {"decode": decode, "probe": self.randn(1, self.width), "probe_set": settings}

    def row_monitor(self) -> dict[str, Tensor]:
        settings = torch.zeros(ROWS, 8, device=self.device)
        settings[:, 0], settings[:, 1] = self.randn(ROWS), self.randn(ROWS).abs() * 0.2
        settings[:, 2] = torch.arange(ROWS) % 3  # each kind
        settings[:, 3:] = torch.tensor([-0.5, 0.75, 1.0, 1.0, 1.0])
        settings[0] = 0
        decode, rows = self.pick((0.0, 1.0), self.tokens), self.rows()
        return {"decode": decode, "rows": rows, "rowprobe": self.randn(ROWS, self.width), "rowprobe_set": settings}

    def gates(self) -> dict[str, Tensor]:
        return {"gates": self.randn(self.tokens, 4)}

    def score(self) -> dict[str, Tensor]:
        return {"score": torch.full((1, self.tokens + 3, 2), float("nan"), device=self.device)}

    def clamp(self) -> dict[str, Tensor]:
        directions = torch.nn.functional.normalize(self.randn(ROWS * CLAMPS, self.width), dim=-1)
        low = self.randn(ROWS * CLAMPS)
        high = torch.where(self.pick((0.0, 1.0), ROWS * CLAMPS) > 0, low + 0.5, torch.inf)
        settings = torch.stack([low, high, self.pick((0.0, 1.0, 0.5), ROWS * CLAMPS)], 1)
        settings[:CLAMPS, 2] = 0
        return {"rows": self.rows(), "clamp": directions.to(self.table), "clamp_set": settings}

    def sae(self) -> dict[str, Tensor]:
        """Features of every kind; row 0 has no code, and row 1 one in the last place."""
        weights = torch.nn.functional.normalize(self.randn(2 * FEATURES, self.width), dim=-1).to(self.table)
        settings = torch.zeros(FEATURES, 8, device=self.device)
        settings[:, 0], settings[:, 1] = self.randn(FEATURES), self.randn(FEATURES).abs() * 0.3
        settings[:, 2], settings[:, 3] = self.randn(FEATURES).abs(), self.randn(FEATURES)
        settings[:, 4], settings[:, 7] = self.pick((0.5, 1.0), FEATURES), self.pick((1.0, 2.0), FEATURES)
        settings[:, 5], settings[:, 6] = weights[:FEATURES].float().sum(-1), self.pick((-1.0, 0.01), FEATURES)
        codes = self.pick((0.0, 1.0, 2.0), ROWS * FEATURES).view(ROWS, FEATURES)
        codes[0], codes[1, :-1], codes[1, -1] = 0, 0, 2
        values = self.randn(ROWS, FEATURES)
        return {"rows": self.rows(), "sae": weights, "sae_set": settings, "sae_clamp": torch.cat([codes, values], 1)}


def site_args(
    tokens: int, width: int, dtype: torch.dtype, families: tuple[str, ...] = FAMILIES, norm: str = "rms", seed: int = 0,
    device: str = "cpu", table: torch.dtype | None = None,
) -> SiteArgs:  # fmt: skip
    """Arguments with the stages ``families`` and a norm. Row 0 is neutral, and some clamps are off."""
    draw = _Draw(tokens, width, dtype, table or dtype, device, torch.Generator().manual_seed(seed))
    given: dict[str, Any] = {"stream": draw.randn(tokens, width, dtype=dtype)}
    parts = {name: getattr(draw, name) for name in (*FAMILIES, *GATED, PACKED)}
    for family in families:
        given |= parts[family]()
    if norm:
        given["weight"] = draw.randn(width, dtype=dtype)
    if norm == "layer":
        given["bias"] = draw.randn(width, dtype=dtype)
    offset = 1.0 if norm == "rms_wide" else 0.0
    return SiteArgs(**given, clamps=CLAMPS if "clamp" in families else 0, norm=norm, eps=1e-6, offset=offset)
