"""An engine in processes of its own: ``python -m tests.vllm.processes FOLDER RANKS [ngram | CAPTURES]``.

Prints tokens as JSON; with a folder for captures the positions of a request's captured rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


if __name__ == "__main__":
    if sys.argv[3:] and sys.argv[3] != "ngram":
        print(json.dumps(captured_positions(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
        sys.exit()
    more = {"speculative_config": NGRAM} if "ngram" in sys.argv[3:] else {}
    llm = engines.engine(
        Path(sys.argv[1]), SteerSpec(steer=engines.HOOKS, rows=8), tensor_parallel_size=int(sys.argv[2]), **more
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING, TOKENS))))
