"""How the site template is launched: block, warps and programs for a width. Pure numbers, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROW = 16384
"""Widest row that is held in registers; a site without monitors and clamps holds twice as much."""
MAX_WIDTH = 65536
"""Widest row that the template takes."""
MAX_CLAMPS = 16
"""Most clamps of a row."""
CHUNK = 4096
"""Numbers of a wider row that are held at once."""


@dataclass(frozen=True)
class LaunchOptions:
    """Launch of one width: one program for each token.

    Attributes:
        block: power of two that holds a row, or the chunk of a row that is wider than `MAX_ROW`.
        warps: warps of a program.
    """

    block: int
    warps: int


FEW_TOKENS = 256
"""Up to this many tokens a call waits for its loads rather than for bandwidth."""


def launch_options(
    width: int, monitors: bool = False, clamps: bool = False, few: bool = False, features: bool = False
) -> LaunchOptions:
    """Options of a width, as measured (docs/performance.md).

    Args:
        monitors: whether a probe reduces the row; at many tokens, wide rows then have fewer partial sums to exchange.
        clamps: whether clamps do, the same.
        few: whether there are at most `FEW_TOKENS` tokens; more warps then have more loads under way.
        features: whether there are clamped features; a chunk of a wide row then takes 16 warps.
    """
    if MAX_ROW < width <= 2 * MAX_ROW and not (monitors or clamps or features):
        return LaunchOptions(2 * MAX_ROW, 32)
    if width > MAX_ROW:
        return LaunchOptions(CHUNK, max(min(16 if few or features else 8, CHUNK // 256), 1))
    block = 1 << max(width - 1, 15).bit_length()
    warps = min(max(block // 256, 1), 16 if few or block > 8192 else 8)
    if (clamps or (monitors and block > 2048)) and not few:
        warps = min(warps, 4 if block <= 4096 else 8)
    return LaunchOptions(block, warps)
