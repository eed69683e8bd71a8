"""Greedy tokens of an idle instrumented model against the plain compiled model and against no compilation at all.

    python -m benchmarks.tokens

Inductor rounds the stream to bf16 where it stores it, and instrumentation makes it store the stream at every site, so
the two compiled models round at different places. The trained demo model shows whether that changes what is written;
the random-weight model, whose logits are nearly tied, shows it as soon as one bit differs. With Inductor's option
``emulate_precision_casts`` both models round where the uncompiled model does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import records
from benchmarks.workload import Shape, Workload, build_model, decode_step

DEMO = Path(__file__).parents[1] / "models" / "demo"
PROMPTS, PROMPT, TOKENS = 8, 64, 256


def greedy(work: Workload, kind: str | None, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy continuation of ``prompt`` (batch, length); ``kind`` None runs without compilation."""
    work.set_position(0)
    ids, made = prompt[:, :1], []
    for t in range(prompt.shape[1] + tokens - 1):
        logits = decode_step(work.model, ids, work.cache) if kind is None else work.step(kind, ids)
        known = t + 1 < prompt.shape[1]
        ids = prompt[:, t + 1 : t + 2].contiguous() if known else logits[:, -1:].argmax(-1)
        made += [] if known else [ids.clone()]
    return torch.cat(made, 1)


def demo_prompts(device: torch.device) -> Tensor:
    """Held-out passages of both styles, ``PROMPT`` ids each, the first one the start of text."""
    texts = json.loads((DEMO / "prompts.json").read_text())
    rows = [[256, *text.encode()[: PROMPT - 1]] for style in ("code", "scripture") for text in texts[style][:PROMPTS]]
    return torch.tensor(rows, device=device)


def compare(model: Any, prompt: Tensor, emulate: bool) -> dict[str, int]:
    """Tokens that equal those of the plain compiled model, of all that were made."""
    work = Workload(model, Shape("tokens", prompt.shape[0], 1, 512), "reduce-overhead")
    found = {}
    with torch._inductor.config.patch(emulate_precision_casts=emulate):
        for kind in ("plain", "steer"):
            work.compile(kind)
            found[kind] = greedy(work, kind, prompt, TOKENS)
    found["uncompiled"] = greedy(work, None, prompt, TOKENS)
    same = {kind: int((found[kind] == found["plain"]).sum()) for kind in ("steer", "uncompiled")}
    return {"idle": same["steer"], "uncompiled": same["uncompiled"], "tokens": found["plain"].numel()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", default=None, help="commit to write into the results (default: asks git)")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    device = torch.device("cuda")
    where, results, claims = records.environment(options.commit), {}, []
    with torch.no_grad():
        for name in ("demo model", "random 1B model"):
            demo = name == "demo model"
            model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).to(device).eval() if demo else None
            model = model or build_model(16, device)
            prompt = demo_prompts(device) if demo else torch.ones((1, 1), dtype=torch.int64, device=device)
            for emulate in (False, True):
                torch._dynamo.reset()
                same = compare(model, prompt, emulate)
                setting = "emulate_precision_casts" if emulate else "default options"
                results[f"{name}, {setting}"] = same
                print(name, setting, json.dumps(same), flush=True)
                text = f"uncompiled against plain: {same['uncompiled']} of {same['tokens']}"
                claims.append(
                    records.claim(f"greedy tokens equal, idle against plain, {name}, {setting}", f"{same['tokens']}",
                                  same["idle"], f"of {same['tokens']} tokens", spread=text)
                )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tokens.json").write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n")
    records.update_summary(claims, where, "python -m benchmarks.tokens", options.out / "summary.json")


if __name__ == "__main__":
    main()
