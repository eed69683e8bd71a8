"""A process that serves a model by vLLM's Transformers backend: ``python -m tests.vllm.transformers_backend FOLDER``.

It is a process of its own since that backend changes the Hugging Face class for good. Prints the tokens as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steer_compile import SteerSpec
from tests.vllm import engines

STEERING = [None, engines.at(1, engines.vector(1)), engines.at(3, engines.vector(2, 2.0), "decode")]

if __name__ == "__main__":
    llm = engines.engine(
        Path(sys.argv[1]),
        SteerSpec(steer=engines.HOOKS, rows=8),
        model_impl="transformers",
        enable_prefix_caching=False,
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING))))
