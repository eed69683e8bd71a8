"""An engine in processes of its own: ``python -m tests.vllm.processes FOLDER RANKS``. Prints the tokens as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steer_compile import SteerSpec
from tests.vllm import engines
from tests.vllm.transformers_backend import STEERING

if __name__ == "__main__":
    llm = engines.engine(
        Path(sys.argv[1]), SteerSpec(steer=engines.HOOKS, rows=8), tensor_parallel_size=int(sys.argv[2])
    )
    print(json.dumps(engines.texts(engines.generated(llm, STEERING))))
