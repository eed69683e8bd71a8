"""Checks that values of autoencoders and their files share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_compile.errors import SAEError

KEPT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which tensors stay; fp64 is rounded to fp32."""


def checked_tensor(where: str, name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous copy on the CPU.

    Args:
        where: what the error texts begin with, a file or a name.
        shape: what its shape must be.

    Raises:
        SAEError: another shape, integers, or NaN or infinity.
    """
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        found = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise SAEError(f"{where}: {name} is {found}, not floating-point numbers; give a tensor of fp32, bf16 or fp16")
    if tuple(value.shape) != tuple(shape):
        raise SAEError(f"{where}: {name} has shape {tuple(value.shape)}, not {tuple(shape)}; give tensors of one size")
    dtype = value.dtype if value.dtype in KEPT_DTYPES else torch.float32
    with torch.inference_mode(False):
        copy = value.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(torch.isfinite(copy).all()):
        count = int((~torch.isfinite(copy)).sum())
        raise SAEError(f"{where}: {name} holds NaN or infinity in {count} of {copy.numel()} places; get the file again")
    return copy


def whole(where: str, name: str, value: object) -> int:
    """A whole number.

    Raises:
        SAEError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise SAEError(f"{where}: {name} is {value!r}, not a whole number; give one")
    return value
