"""Bytes of a plan: what its tables take, and what a step moves for its edits beside the model's own work.

Counted are the bytes of tables and captures alone: an edit that is fused reads the value where the model's kernel reads
it. Each table row is counted once a step, as the cache serves tokens that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

from steer_compile.ir import Bank, Edit, Plan

WRITTEN = ("capture", "packed", "score", "full_log")
"""Kinds of banks that get numbers for each token of a step."""
WHOLE = ("full_encoder", "full_decoder", "full_set")
"""Kinds that are read in full by a step with one opted-in token, and not at all by one without."""
TOKEN_NUMBERS = 8
"""Bytes of a token's row number and scale."""


@dataclass(frozen=True)
class Cost:
    """Bytes of one edit in a step: with nothing steered, and with every row in use."""

    idle: int
    active: int


def bank_bytes(bank: Bank) -> int:
    """Device memory of a bank."""
    return len(bank.sites) * bank.length * bank.width * bank.dtype.itemsize


def costs(plan: Plan, tokens: int) -> list[Cost]:
    """Bytes that each edit of a plan moves in a step of ``tokens`` tokens, in the plan's order."""
    return [_cost(plan, edit, tokens) for edit in plan.edits]


def _cost(plan: Plan, edit: Edit, tokens: int) -> Cost:
    idle = active = 0 if edit.ops == ("capture",) else TOKEN_NUMBERS * tokens
    for slot in edit.slots:
        bank = plan.banks[slot.bank]
        row = bank.width * bank.dtype.itemsize
        if bank.kind in WRITTEN:
            count = min(tokens, bank.length)
            idle += 0 if bank.kind in ("packed", "full_log") else count * row
            active += count * row
        elif bank.kind in WHOLE:
            active += bank.length * row
        else:
            idle += row
            active += _rows(bank, tokens) * row
    return Cost(idle, active)


def _rows(bank: Bank, tokens: int) -> int:
    """Rows of a table that a step can reach: the features of a site are read whichever token clamps them."""
    return bank.length if bank.kind in ("sae", "sae_set", "mlp", "mlp_set") else min(bank.length, tokens)
