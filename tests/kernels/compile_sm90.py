"""Compile real variants of the site kernels for sm_90 and print what each takes; needs Triton's ptxas and no GPU.

A process of its own, ``python -m tests.kernels.compile_sm90``: elsewhere in the tests the kernels are interpreted.
Prints one line of JSON for each variant; ``cached`` says whether Triton's cache on disk had it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from steer_compile.kernels.site_launch import FEW_TOKENS, MAX_ROW
from steer_compile.kernels.site_warmup import variants, zeros
from tests.kernels.site_plans import Setup
from tests.kernels.triton_keys import TARGET, key, recorded, source

SETUPS = {
    "all 2048": Setup(width=2048),
    "all 1000": Setup(width=1000),
    "add 2048": Setup(("branch", "add"), 2048),
    "sae 2048": Setup(("branch", "add", "sae"), 2048),
    "packed 2048": Setup(("branch", "packed", "add"), 2048),
    "packed wide": Setup(("branch", "packed", "add"), 2 * MAX_ROW + 4096),
    "sae wide": Setup(("branch", "add", "sae"), MAX_ROW + 4096),
    "all wide": Setup(width=MAX_ROW + 4096, norm="layer", bias=torch.bfloat16),
}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack that it spills to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["reg"], "spilled": found["stack"] + found["local"]}


def compiled() -> Iterator[dict[str, object]]:
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    for name, setup in SETUPS.items():
        for a in variants(setup.plan(), setup.weights()):
            (call,) = recorded(zeros(a, torch.device("cpu")))
            src, options = source(call)
            kernel = triton.compile(src, target=TARGET, options=options)
            form = "few" if a.stream.size(0) <= FEW_TOKENS else "many"
            launch = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared, "cached": hits[-1]}
            yield {"what": name, "form": form, "kernel": key(call)[0], **usage(kernel.asm["cubin"]), **launch}


if __name__ == "__main__":
    for record in compiled():
        print(json.dumps(record), flush=True)
