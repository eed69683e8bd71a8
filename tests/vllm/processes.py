"""An engine in processes of its own: ``python -m tests.vllm.processes FOLDER RANKS [ngram | dynamic | CAPTURES]``.

Prints tokens as JSON; with a folder for captures the positions of a request's captured rows; for dynamic steering also
checksums of the ranks, before and behind an action that one of them alone takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
    if sys.argv[3:] and sys.argv[3] != "ngram":
        print(json.dumps(captured_positions(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
        sys.exit()
    more = {"speculative_config": NGRAM} if "ngram" in sys.argv[3:] else {}
    llm = engines.engine(
        Path(sys.argv[1]), SteerSpec(steer=engines.HOOKS, rows=8), tensor_parallel_size=int(sys.argv[2]), **more
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING, TOKENS))))
