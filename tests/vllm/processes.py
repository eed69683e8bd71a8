"""An engine in processes of its own: ``python -m tests.vllm.processes FOLDER RANKS [ngram | drafts=OUT | dynamic |
CAPTURES]``.

Prints tokens as JSON; with a folder for captures the positions of a request's captured rows; for dynamic steering also
checksums of the ranks, before and behind an action that one of them alone takes. With ``drafts=OUT`` the folder gets
what requests captured while n-gram drafts were taken (``found.pt``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from steer_compile import SteerSpec
from steer_compile.vllm import captured
from tests.vllm import engines
from tests.vllm.transformers_backend import STEERING

TOKENS = 24
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def captured_positions(model: Path, ranks: int, folder: str) -> list[int]:
    """Of a prompt and four generated tokens."""
    from vllm import SamplingParams

    spec = SteerSpec(capture=("post_block",))
    llm = engines.engine(model, spec, tensor_parallel_size=ranks, capture_dir=folder)
    params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, extra_args={"steer": {"capture": {}}})
    (output,) = engines.results(llm, [{"prompt_token_ids": engines.PROMPT}], [params])
    return list(captured(output, llm).positions.tolist())


REPEATING = [[7, 8, 9, 7, 8, 9, 7, 8], list(range(5, 15)), [11] * 6]


def with_drafts(model: Path, target: Path) -> None:
    """Rows, tokens and refusals of requests that capture in an engine that decodes speculatively."""
    from vllm import SamplingParams

    spec = SteerSpec(capture=("post_block",))
    llm = engines.engine(model, spec, capture_dir=str(target), speculative_config=NGRAM)
    common: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "detokenize": False}
    asked: list[dict[str, Any]] = [{}] * len(REPEATING)
    params = [SamplingParams(**common, extra_args={"steer": {"capture": each}}) for each in asked]
    outputs = engines.results(llm, [{"prompt_token_ids": prompt} for prompt in REPEATING], params)
    found = []
    for output in outputs:
        rows = captured(output, llm)
        labels = {"positions": rows.positions, "token_ids": rows.token_ids, "steps": rows.steps}
        found.append({**labels, **rows.values, "generated": torch.tensor(output.outputs[0].token_ids)})
    torch.save(found, target / "found.pt")
    top = {"count": 2, "site": "layers.1.post_block", "probe": [1.0] * engines.WIDTH}
    refused = []
    for bad in ({"reduce": "mean"}, {"tokens": {"top": top}}):
        one = SamplingParams(**common, extra_args={"steer": {"capture": bad}})
        try:
            engines.results(llm, [{"prompt_token_ids": engines.PROMPT}], [one])
        except ValueError as error:
            refused.append(str(error))
    print(json.dumps(refused))


DYNAMIC = SteerSpec(steer=("post_block",), capture=("post_block",), rows=8, overrides=4)
PLANS = {"chat": [len(engines.PROMPT) + 1, 3, 1, 0.7], "wide": [len(engines.PROMPT) + 2, 30, 2, -0.4]}
CONTROLLERS = {"script": {"class": "tests.vllm.controllers:Script", "args": {"plans": PLANS, "apart": 30}}}


def dynamic(model: Path, ranks: int) -> list[Any]:
    """Tokens of requests that a controller pushes, and what it applied on each rank."""
    llm = engines.engine(model, DYNAMIC, tensor_parallel_size=ranks, controllers=CONTROLLERS)
    asked = [None, {"conversation": "chat"}, {"conversation": "wide"}]
    tokens = engines.texts(engines.generated(llm, asked, TOKENS))
    checksums = [[s["checksum"] for s in llm.collective_rpc("steer_compile_dynamic")]]
    engines.generated(llm, asked, TOKENS)
    checksums.append([s["checksum"] for s in llm.collective_rpc("steer_compile_dynamic")])
    return [tokens, checksums]


if __name__ == "__main__":
    if "dynamic" in sys.argv[3:]:
        print(json.dumps(dynamic(Path(sys.argv[1]), int(sys.argv[2]))))
        sys.exit()
    if sys.argv[3:] and sys.argv[3].startswith("drafts="):
        with_drafts(Path(sys.argv[1]), Path(sys.argv[3].removeprefix("drafts=")))
        sys.exit()
    if sys.argv[3:] and sys.argv[3] != "ngram":
        print(json.dumps(captured_positions(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
        sys.exit()
    more = {"speculative_config": NGRAM} if "ngram" in sys.argv[3:] else {}
    llm = engines.engine(
        Path(sys.argv[1]), SteerSpec(steer=engines.HOOKS, rows=8), tensor_parallel_size=int(sys.argv[2]), **more
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING, TOKENS))))
