"""One site's operation in both of its lowerings, and the same numbers worked out token by token in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile.kernels.gates import SETTINGS
from steer_compile.kernels.site import SiteArgs, launch
from steer_compile.kernels.steer_rows import SteerArgs, steer_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, TOKENS, ROWS = 24, 5, 4


def plain(h: Tensor, clamps: int = 0, **data: Any) -> Tensor:
    """By operators of PyTorch, which the compiler fuses."""
    return steer_rows(h, SteerArgs(**data), h.dtype, clamps)


def kernel(h: Tensor, clamps: int = 0, **data: Any) -> Tensor:
    """By the Triton kernel, in its interpreter where there is no GPU."""
    return launch(SiteArgs(h, **data, clamps=clamps))[0]


LOWERINGS = pytest.mark.parametrize("op", [plain, kernel])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tensor(*values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def index(*rows: int) -> Tensor:
    return tensor(*rows, dtype=torch.int32)


def vectors(seed: int = 1, rows: int = ROWS) -> Tensor:
    """Vectors of rows, of which row 0 is zeros."""
    made = drawn(rows, WIDTH, seed=seed)
    made[0] = 0
    return made


def settings(active: bool = True, **fields: float) -> list[float]:
    """A monitor's line, by the names of its numbers."""
    given = {"threshold": 0.0, "sharpness": 1.0, **fields, "active": float(active)}
    return [given.get(name, 0.0) for name in SETTINGS]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
