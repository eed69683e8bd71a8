"""A process that warms up and prints what Triton compiled and what its cache on disk had: ``python -m ...``.

One line of JSON: kernels that the warm-ups gave, compilations, and hits of the cache on disk.
"""

from __future__ import annotations

import json

import torch
import triton

from steer_compile.kernels.site_launch import MAX_ROW
from steer_compile.kernels.site_warmup import warm_up
from tests.kernels.site_plans import Setup

SETUPS = (Setup(width=1000), Setup(("branch", "add"), 17), Setup(("add", "clamp"), MAX_ROW + 4096, norm="layer"))

if __name__ == "__main__":
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    device = torch.device("cuda", torch.cuda.current_device())
    made = sum(warm_up(setup.plan(), setup.weights(), device) for setup in SETUPS)
    print(json.dumps({"made": made, "compiled": hits.count(False), "loaded": hits.count(True)}))
