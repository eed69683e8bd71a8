"""How the full SAE is launched: tiles, programs and room for what is in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from steer_compile.kernels.sae_full import SaeFullArgs
from steer_compile.kernels.sae_full_decode import decode, finish
from steer_compile.kernels.sae_full_kernels import META, compact, encode
from steer_compile.kernels.sae_full_keys import GROUP, LISTED, PICKS
from steer_compile.kernels.sae_full_select import select

CHUNK = 4096
"""Tokens that are listed at once, of more than `FEW_TOKENS`."""
FEW_TOKENS = 256
"""Up to this many are listed at once."""
TOKEN_STEPS = (16, 32, 64, 512)
"""Numbers of tokens up to which a call has the same tiles."""
FEATURES = 4096
"""Features that are chosen among at once."""


@dataclass(frozen=True)
class Tiles:
    """Tile of a matmul: its columns, warps and stages, and how many programs a multiprocessor has room for."""

    columns: int
    warps: int
    stages: int
    programs: int = 2


@dataclass(frozen=True)
class Plan:
    """Tokens of a tile, depth of a step, the tiles of both matmuls, into how many parts the features are split at most,
    and the warps that write a token: of many tokens, fewer warps each leave room for more at once."""

    tokens: int
    depth: int
    encode: Tiles
    decode: Tiles
    parts: int = 32
    writing: int = 8


def plan_of(capacity: int, width: int, itemsize: int) -> Plan:
    """Tiles for at most ``capacity`` tokens, rows of ``width`` numbers and weights of ``itemsize`` bytes."""
    tokens = next((min(step, 64) for step in TOKEN_STEPS if capacity <= step), 128)
    depth = min(64 if itemsize < 4 else 32, max(16, 1 << (width - 1).bit_length()))
    if itemsize == 4:
        return Plan(tokens, depth, Tiles(64, 4, 3), Tiles(64, 4, 3))
    if tokens == 128:
        return Plan(tokens, depth, Tiles(128, 4, 3), Tiles(256, 8, 3, 1), writing=4)
    return Plan(tokens, depth, Tiles(128, 4, 4 if capacity > 64 else 5), Tiles(128, 4, 4))


def launch(a: SaeFullArgs, wrap: Callable[[Any], Any] = lambda kernel: kernel) -> None:
    """Run the kernels on ``a``; ``wrap`` is put around each kernel function."""
    tokens, width = a.h.shape
    if isinstance(tokens, int) and not tokens:
        return
    slots = a.sae_set.size(0)
    count, clamps = a.encoder.size(0) // slots, a.row_clamp.size(1) // 3
    capacity = min(a.capacity, tokens) if isinstance(tokens, int) else a.capacity
    tiles, processors = plan_of(capacity, width, a.encoder.element_size()), _multiprocessors(a.h.device)
    programs, decoding = 2 * processors, tiles.decode.programs * processors
    filled = capacity + slots * tiles.tokens
    filled = -(-filled // tiles.tokens) * tiles.tokens
    room = filled + capacity
    device, fp32 = a.h.device, torch.float32
    order = torch.empty(room, dtype=torch.int32, device=device)
    meta = torch.empty(slots + META, dtype=torch.int32, device=device)
    narrow = torch.empty((filled, count), dtype=a.encoder.dtype, device=device)
    wide = torch.empty((filled, count), dtype=fp32, device=device)
    columns = -(-width // tiles.decode.columns)
    sums = torch.empty((max(filled, -(-decoding // columns) * tiles.tokens), width), dtype=fp32, device=device)
    block = 1 << max(width - 1, 15).bit_length()
    precision = "ieee" if a.encoder.dtype == fp32 or device.type != "cuda" else "tf32"
    shape: dict[str, Any] = {"S": slots, "BM": tiles.tokens}
    matmul: dict[str, Any] = {
        "H": width, "F": count, **shape, "BK": tiles.depth, "PRECISION": precision,
    }  # fmt: skip
    most = max(1 << (count - 1).bit_length(), GROUP.value)
    groups, top = most // GROUP.value, 0 if a.log is None else a.log.size(-1) // 2
    notes = torch.empty((filled, groups + LISTED.value), dtype=torch.int32, device=device)
    picks = torch.empty((filled, 2 * PICKS.value), dtype=fp32, device=device)
    listed = (order, meta)
    chunk = FEW_TOKENS if isinstance(tokens, int) and tokens <= FEW_TOKENS else CHUNK
    gates, gated = (a.row_set if a.gates is None else a.gates), a.gates is not None
    wrap(compact)[(1,)](
        a.rows, a.row_set, a.sae_set, gates, *listed, tokens, capacity, room, **shape, BT=chunk,
        ALL=isinstance(tokens, int) and capacity >= tokens, GATED=gated,
        num_warps=16 if chunk > FEW_TOKENS else 4,
    )  # fmt: skip
    wrap(encode)[(tiles.encode.programs * processors,)](
        a.h, a.encoder, a.settings, a.rows, a.row_set, a.sae_set, *listed, narrow, wide, notes, **matmul,
        G=groups, L=top, BN=tiles.encode.columns, num_warps=tiles.encode.warps, num_stages=tiles.encode.stages,
    )  # fmt: skip
    wrap(select)[(min(4 * programs, filled),)](
        a.h, a.settings, a.rows, a.row_set, a.sae_set, *listed, narrow, wide, wide if a.log is None else a.log, notes,
        picks, H=width, BLOCK=block, F=count, **shape, BF=min(FEATURES, most), G=groups, L=top,
        LP=1 << max(top - 1, 0).bit_length(), num_warps=4,
    )  # fmt: skip
    wrap(decode)[(decoding,)](
        a.decoder, a.rows, a.row_set, a.sae_set, *listed, narrow, sums, **matmul, BN=tiles.decode.columns,
        PARTS=tiles.parts, num_warps=tiles.decode.warps, num_stages=tiles.decode.stages,
    )  # fmt: skip
    wrap(finish)[(min(4 * programs, room),)](
        a.h, a.encoder, a.decoder, a.settings, a.bias, a.rows, a.row_set, a.row_clamp, a.sae_set, gates, *listed,
        narrow, wide, picks, sums, decoding, H=width, F=count, **shape, K=clamps, BN=tiles.decode.columns,
        BLOCK=block, PARTS=tiles.parts, GATED=gated, num_warps=tiles.writing,
    )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
