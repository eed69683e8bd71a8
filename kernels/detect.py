"""Detection: the monitors of one site, for all sites behind it in the same call.

For token t with row r and memory slot m, on the pristine value h::

    s        = h . probe + sum_j output[j] * relu(h . weight[j] + bias[j])      score of the site's monitor
    s_r      = h . probe[r]                                                     score of the row's monitor
    g, g_r   = opened(s, state[m, 0]), opened(s_r, state[m, 1])                 kernels/gates.py
    state[m] = (g, g_r) if the token is decoded, else 0                         m > 0, so a prompt forgets
    gates    = gates in front * (g, g_r)                                        factors of tier, rows and clamps

The factors are a value of the graph and no buffer: sites in front of the monitor cannot read them, and nothing is reset
between calls. Memory is a buffer, with a line for each sequence, which only its last token in a call reads and writes;
line 0 is of all other tokens and stays 0. Plain operators in fp32: the reference is the lowering, one reduction over
the value, which Inductor fuses with what makes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer_compile.kernels.gates import Factors, guarded, opened
from steer_compile.kernels.steer_rows import SteerArgs, scores


class DetectArgs(NamedTuple):
    """Data of one site's monitors. Leading dimensions (...) are those of the value; see `SteerArgs` for the first six.

    ``probe`` needs ``probe_set``, ``rowprobe`` needs ``rowprobe_set`` and ``rows``, ``state`` needs ``slot``.
    """

    decode: Tensor
    rows: Tensor | None = None
    probe: Tensor | None = None
    probe_set: Tensor | None = None
    rowprobe: Tensor | None = None
    rowprobe_set: Tensor | None = None
    mlp: Tensor | None = None
    """Weights of the hidden units (M, H), fp32."""
    mlp_set: Tensor | None = None
    """Bias and output weight of each hidden unit (M, 2), fp32."""
    slot: Tensor | None = None
    """Memory line of each token (...), int32; 0 for none."""
    state: Tensor | None = None
    """Whether each sequence's step gates are open (S + 1, 2), fp32, written in place."""
    gates: Tensor | None = None
    """Factors of each token from sites in front (..., 4), fp32."""


def detect(h: Tensor, args: DetectArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Score the tokens of a value and open gates.

    Args:
        h: stream value (..., H) of dtype ``dtype``.

    Returns:
        Factors of each token (..., 4), and scores of both monitors (..., 2), 0 where there is none.
    """
    return _detected(h, args, torch.promote_types(dtype, torch.float32))


def detect_fp64(h: Tensor, args: DetectArgs) -> tuple[Tensor, Tensor]:
    """The formula in fp64, with the memory left as it is: what the lowering is checked against."""
    given = {n: t.double() for n, t in args._asdict().items() if t is not None and t.is_floating_point()}
    return _detected(h.double(), args._replace(**given), torch.float64)


def _detected(h: Tensor, args: DetectArgs, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    given = SteerArgs(rows=args.rows, probe=args.probe, rowprobe=args.rowprobe)
    site, row = scores(h, given, wide)
    if site is not None and args.mlp is not None and args.mlp_set is not None:
        units = torch.relu(h.to(wide) @ args.mlp.T + args.mlp_set[:, 0])
        site = site + (units * args.mlp_set[:, 1]).sum(-1)
    was = None if args.state is None else args.state[args.slot]
    factors, opens = Factors.of(args.gates), []
    for place, (score, line) in enumerate(((site, args.probe_set), (row, args.rowprobe_set))):
        if score is None or line is None:
            opens.append(torch.zeros_like(args.decode))
            continue
        settings = line[0] if place == 0 else line[args.rows]
        g = opened(score, settings, None if was is None else was[..., place])
        factors = guarded(factors, g, settings, args.decode, place == 0)
        opens.append(torch.where(settings[..., 5] > 0, g, torch.zeros_like(g)))
    if args.state is not None and args.slot is not None:
        _remember(args.state, args.slot, torch.stack(opens, -1), args.decode)
    one = torch.ones_like(args.decode)
    whole = [one if f is None else f for f in factors]
    zero = torch.zeros_like(one)
    return torch.stack([*whole, one], -1), torch.stack([zero if s is None else s for s in (site, row)], -1)


def _remember(state: Tensor, slot: Tensor, opens: Tensor, decode: Tensor) -> None:
    """Keep what is open, of decoded tokens with a line of their own; all others write zeros."""
    kept = ((slot > 0) & (decode > 0)).unsqueeze(-1)
    new = torch.where(kept, opens, torch.zeros_like(opens))
    state.index_put_((slot.reshape(-1),), new.reshape(-1, 2).to(state.dtype))
