"""An engine in processes of its own whose autoencoders change: ``python -m tests.vllm.sae_processes MODEL RANKS ROOT``.

Prints JSON: tokens with an autoencoder, the refusal of a rank that holds another one, and tokens behind all changes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steer_compile import sae
from steer_compile.errors import SAEError
from steer_compile.vllm import attach_sae, attached_saes, detach_sae
from tests.vllm import engines
from tests.vllm.test_features import SPEC, asked


def stray(worker: Any, path: str) -> int:
    """The last of several ranks takes an autoencoder that the front end does not know."""
    from steer_compile.vllm.adapters.runners import live_of

    live = live_of(worker.model_runner)
    if live is None or worker.rank == 0:
        return 0
    live.rows.registry.saes.attach("stray", sae.load(path), [1, 2])
    return 1


def main(model: Path, ranks: int, root: str) -> None:
    llm = engines.engine(model, SPEC, tensor_parallel_size=ranks, vector_root=root)
    refusal = ""
    attach_sae(llm, "parts", "both", [20, 3, 8], sae="sae3")
    found = engines.texts(engines.generated(llm, [None, asked("parts")]))
    detach_sae(llm, "parts")
    if ranks > 1:
        assert sum(llm.collective_rpc(stray, args=(f"{root}/another",))) == ranks - 1
        try:
            attach_sae(llm, "parts", "both", [20, 3, 8], sae="sae3")
        except SAEError as error:
            refusal = str(error)
        assert attached_saes(llm)["saes"] == []
        assert llm.collective_rpc("steer_compile_detach_sae", args=(0, "stray"))[1:] == [""] * (ranks - 1)
    attach_sae(llm, "parts", "both", [20, 3, 8], sae="sae3")
    again = engines.texts(engines.generated(llm, [None, asked("parts")]))
    print(json.dumps([[*found], refusal, [*again]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
