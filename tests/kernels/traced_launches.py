"""A graph's launches of the site kernels against the warm-up's, by Triton's keys. Run without Triton's interpreter.

    python -m tests.kernels.traced_launches eager aot_eager

Launches are recorded and not run, so a GPU is not needed. Prints, as JSON by inner compiler, how many launches there
were and how many of them have a key that the warm-up did not leave in Triton's cache.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from steer_compile import SteerSpec, steer_backend
from steer_compile.kernels import site
from steer_compile.kernels.site_warmup import warm_up
from steer_compile.passes import lower_edits
from tests import _models
from tests.kernels.triton_keys import Call, key

OPS = ("add", "tier", "monitor", "row_monitor", "clamp")
CALLS: list[Call] = []


def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In the place of `JITFunction.run`."""
    CALLS.append(Call(kernel, (), args, options))


def launched(a: site.SiteArgs) -> Any:
    """In the place of the reference, which the op runs on a CPU: what it runs on a GPU."""
    return site.launch(a, wrap_triton)


def compare(inner: str) -> tuple[int, int]:
    """Launches of one call of a small model, and those of them that are not in the warm-up's set."""
    spec = SteerSpec(
        steer=("post_attn", "post_block"), capture=("post_block",), ops=OPS, rows=8, clamps=3, max_tokens=512,
        lowering="template",
    )  # fmt: skip
    backend = steer_backend(spec, inner=inner)
    model = _models.llama(torch.bfloat16).requires_grad_(False)
    ids = torch.arange(20).view(2, 10) % _models.VOCAB
    CALLS.clear()
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    run = [key(call) for call in CALLS]
    CALLS.clear()
    ((plan, weights, device),) = backend._launched
    warm_up(plan, weights, device)
    known = {key(call) for call in CALLS}
    return len(run), sum(each not in known for each in run)


if __name__ == "__main__":
    JITFunction.run = record
    site.reference = launched
    lower_edits.DEVICES = ("cpu",)
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment,misc,return-value]
    found = {}
    for name in sys.argv[1:]:
        torch._dynamo.reset()
        found[name] = compare(name)
    print(json.dumps(found))
