"""An engine in processes of its own: ``python -m tests.vllm.processes FOLDER RANKS [ngram]``. Prints tokens as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steer_compile import SteerSpec
from tests.vllm import engines
from tests.vllm.transformers_backend import STEERING

TOKENS = 24
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

if __name__ == "__main__":
    more = {"speculative_config": NGRAM} if "ngram" in sys.argv[3:] else {}
    llm = engines.engine(
        Path(sys.argv[1]), SteerSpec(steer=engines.HOOKS, rows=8), tensor_parallel_size=int(sys.argv[2]), **more
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING, TOKENS))))
