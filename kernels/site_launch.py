"""How the site template is launched: block, warps and programs for a width. Pure numbers, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROW = 16384
"""Widest row that is held in registers."""
MAX_WIDTH = 65536
"""Widest row that the template takes."""
CHUNK = 4096
"""Numbers of a wider row that are held at once."""


@dataclass(frozen=True)
class LaunchOptions:
    """Launch of one width.

    Attributes:
        block: power of two that holds a row, or the chunk of a row that is wider than `MAX_ROW`.
        warps: warps of a program.
        most: most programs; with more tokens than these, each program walks over several.
    """

    block: int
    warps: int
    most: int

    def programs(self, tokens: int) -> int:
        return tokens if self.most >= UNBOUNDED else min(tokens, self.most)


UNBOUNDED = 1 << 30


FEW_TOKENS = 256
"""Up to this many tokens a call waits for its loads rather than for bandwidth."""


def launch_options(width: int, reduces: bool = False, few: bool = False) -> LaunchOptions:
    """Options of a width, as measured (docs/performance.md).

    Args:
        reduces: whether a monitor or clamp reduces the row; fewer warps then have fewer partial sums to exchange.
        few: whether there are at most `FEW_TOKENS` tokens; more warps then have more loads under way.
    """
    if width > MAX_ROW:
        return LaunchOptions(CHUNK, 16 if few else 8, UNBOUNDED)
    block = 1 << max(width - 1, 15).bit_length()
    warps = min(max(block // 256, 4), 16 if few or block > 8192 else 8)
    if reduces and not few:
        warps = 4 if block <= 8192 else 8
    return LaunchOptions(block, warps, UNBOUNDED)
