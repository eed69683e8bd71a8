"""Sizes of a small runtime without a model, and the banks of each op family in it."""

import math

import torch

from steer_compile.sae import SAE, ReLU
from steer_compile.spec import RESERVED_ROWS

WIDTH, LAYERS, ROWS, CLAMPS, TOKENS, SEQUENCES, UNITS, PATCHES = 4, 2, 6, 3, 16, 9, 3, 5
LENGTH = RESERVED_ROWS + ROWS
SITES = tuple(("post_block", n) for n in range(LAYERS))
FEATURES, WHOLE = 3, 6
SITE = SITES[0]
FREE = [-math.inf, math.inf, 0.0]
SHAPES = {
    "patch": [("patch", WIDTH, PATCHES + 1), ("patch_alpha", WIDTH, PATCHES + 1), ("patch_slot", 1, TOKENS)],
    "add": [("table", WIDTH, LENGTH)],
    "tier": [("tier", WIDTH, 1)],
    "monitor": [("probe", WIDTH, 1), ("probe_set", 8, 1)],
    "row_monitor": [("rowprobe", WIDTH, LENGTH), ("rowprobe_set", 8, LENGTH)],
    "clamp": [("clamp", WIDTH, LENGTH * CLAMPS), ("clamp_set", 3, LENGTH * CLAMPS)],
    "sae": [("sae", WIDTH, 2 * FEATURES), ("sae_set", 8, FEATURES), ("sae_clamp", 2 * FEATURES, LENGTH)],
    "sae_full": [
        ("full_encoder", WIDTH, WHOLE),
        ("full_decoder", WIDTH, WHOLE),
        ("full_set", 8, WHOLE),
        ("full_bias", WIDTH, 1),
        ("full_sae", 4, 1),
        ("full_row", 4, LENGTH),
        ("full_clamp", 3 * FEATURES, LENGTH),
    ],
    "sae_log": [("full_log", 8, TOKENS)],
    "score": [("score", 2, TOKENS)],
    "memory": [("state", 2, SEQUENCES + 1)],
    "mlp": [("mlp", WIDTH, UNITS), ("mlp_set", 2, UNITS)],
}


def tiny() -> SAE:
    return SAE(
        torch.ones(WIDTH, WHOLE), torch.zeros(WHOLE), torch.ones(WHOLE, WIDTH), torch.zeros(WIDTH), ReLU(), site=SITE
    )
