"""An engine whose requests log features: ``python -m tests.vllm.logging_processes MODEL FOLDER FORM``.

``pieces``: compiled in pieces (`tests.vllm.piecewise`). ``ranks``: two tensor parallel ranks. ``stages``: two stages of
a pipeline. What two requests logged, of three, is left in ``found.pt`` of the folder, which has the autoencoders.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from steer_compile.vllm import captured
from tests.vllm import engines
from tests.vllm.test_logged_features import CLAMPED, KEYS, LOG, PROMPTS, SPEC, named, outputs

FORMS: dict[str, dict[str, Any]] = {
    "pieces": {"compilation_config": {"mode": 3, "use_inductor_graph_partition": False}},
    "ranks": {"tensor_parallel_size": 2},
    "stages": {"pipeline_parallel_size": 2},
}
ASKED: list[Any] = [
    {"features": [LOG], "capture": {"sites": [KEYS[0], "layers.0.post_block"]}},
    None,
    {"features": [CLAMPED], "capture": {"sites": [KEYS[1]]}},
]


def main(model: Path, folder: Path, form: str) -> None:
    if form == "pieces":
        from tests.vllm.piecewise import allow_pieces

        allow_pieces()
    llm = engines.engine(model, SPEC, saes=named(folder), capture_dir=folder, **FORMS[form])
    made = outputs(llm, ASKED, PROMPTS[:3])
    found = []
    for output in (made[0], made[2]):
        rows = captured(output, llm)
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        found.append({"ids": torch.tensor(ids), "positions": rows.positions, **rows.values})
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
