"""The kernels of the full SAE, compiled before the first call.

What is left open at a site is the number of tokens, which chooses the tiles and the way in which tokens are listed.
Each kind of call is launched once with no token opted in, so that no weight is read and none need be there.
"""

from __future__ import annotations

from typing import Any

import torch

from steer_compile.ir import Edit, Plan
from steer_compile.kernels.gates import FACTORS
from steer_compile.kernels.sae_full import SaeFullArgs
from steer_compile.kernels.sae_full_decode import decode, finish
from steer_compile.kernels.sae_full_kernels import compact, encode
from steer_compile.kernels.sae_full_launch import FEW_TOKENS, TOKEN_STEPS, launch
from steer_compile.kernels.sae_full_select import select

KERNELS: tuple[Any, ...] = (compact, encode, select, decode, finish)


def token_counts(plan: Plan) -> tuple[int, ...]:
    """A number of tokens for each kind of call that the plan has room for."""
    steps = sorted({*TOKEN_STEPS, FEW_TOKENS, plan.max_tokens})
    return tuple(count for count in steps if count <= plan.max_tokens)


def idle_args(edit: Edit, plan: Plan, tokens: int, device: torch.device) -> SaeFullArgs:
    """Arguments of a call in which nothing is opted in, in the shapes and dtypes of a site's."""
    banks = {slot.kind: plan.banks[slot.bank] for slot in edit.slots}
    weights = torch.zeros(1, dtype=banks["full_encoder"].dtype, device=device)
    matrix = weights.expand(banks["full_encoder"].length, edit.site.width)

    def zeros(kind: str) -> torch.Tensor:
        return torch.zeros(banks[kind].length, banks[kind].width, device=device)

    log = torch.zeros(1, tokens, banks["full_log"].width, device=device) if "full_log" in banks else None
    h = torch.zeros(tokens, edit.site.width, dtype=edit.site.dtype, device=device)
    rows = torch.zeros(tokens, dtype=torch.int32, device=device)
    gates = torch.ones(tokens, FACTORS, device=device) if edit.gated else None
    return SaeFullArgs(
        h, rows, zeros("full_row"), zeros("full_clamp"), matrix, matrix, zeros("full_set"), zeros("full_bias"),
        zeros("full_sae"), log, gates, plan.sae_tokens,
    )  # fmt: skip


def warm_up(plan: Plan, device: torch.device) -> int:
    """Launch each kind of call of the plan's decoded sites once, and wait.

    Returns:
        Number of kernels that Triton compiled, or loaded from its cache on disk.
    """
    before = _compiled()
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        for edit in plan.edits:
            if "sae_full" in edit.ops:
                for tokens in token_counts(plan):
                    launch(idle_args(edit, plan, tokens, device))
        torch.cuda.synchronize(device)
    return _compiled() - before


def _compiled() -> int:
    return sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())
