"""An engine of pipeline stages: ``python -m tests.vllm.pipelines FOLDER STAGES RANKS [narrow]``, RANKS in each stage.

With ``capture=FOLDER`` it captures instead, and leaves what was captured in ``found.pt`` there.

With ``narrow``, all that the spec steers is in the first stage. Prints a line of JSON: tokens and log-probabilities of
requests with vectors on both sides of the cut, then the same of unsteered ones behind a change of everyone's steering,
and what each worker holds at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import HookSelection, SteerSpec
from steer_compile.vllm import captured
from tests import _tree
from tests.vllm import engines

TOKENS = 16
CUT = engines.LAYERS // 2
"""First layer of the second of two stages."""
HOOKS = ("pre_attn", "post_attn", "post_block", "mlp_in", "mlp_out")
SPEC = SteerSpec(
    steer=[*HOOKS, HookSelection("attn_out", [0]), HookSelection("attn_in", [engines.LAYERS - 1])],
    rows=6,
    ops=("add", "clamp"),
)
"""Fewer rows than requests need, so that rows go to others while batches are under way; hooks of one stage alone."""


NARROW = SteerSpec(steer=[HookSelection("post_attn", [0])], rows=6)


def narrow() -> list[Any]:
    return [None, *(engines.at(0, engines.vector(n), hook="post_attn") for n in range(5))]


def steering() -> list[Any]:
    """Requests around the cut, in one phase or both, unsteered ones between them."""
    found: list[Any] = [None]
    for i, hook in enumerate(HOOKS):
        for layer in (CUT - 1, CUT):
            vector = engines.vector(10 * i + layer, 0.8)
            found += [engines.at(layer, vector, tier, hook) for tier in ("base", "prefill", "decode")]
        found.append(None)
    wide = {str(n): engines.vector(50 + n, 0.4).tolist() for n in range(engines.LAYERS)}
    clamp = {"direction": engines.vector(7).tolist(), "lo": -0.1, "hi": 0.1}
    return [
        *found,
        engines.at(0, engines.vector(1), hook="attn_out"),
        engines.at(engines.LAYERS - 1, engines.vector(2), hook="attn_in"),
        engines.at(engines.LAYERS - 1, engines.vector(3)),
        {"base": {"post_block": wide}, "tokens": {"spans": [[3, 9]], "generated": True}},
        {"clamps": {f"layers.{CUT - 1}.post_block": [clamp], "layers.0.post_block": [clamp]}},
        None,
    ]


STATE = "steer_compile_state"


def prompts(count: int) -> list[list[int]]:
    """Prompts of several lengths, some of them longer than a step."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 17, 40, 90)[n % 4] for n in range(count)]
    return [torch.randint(5, engines.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def set_everyone(llm: Any, given: dict[str, Any]) -> None:
    """What the route for global steering does."""
    from steer_compile.vllm.adapters.intake import front_end_of
    from steer_compile.vllm.adapters.workers import SET_EVERYONE
    from steer_compile.vllm.transport import sent

    front = front_end_of(llm.llm_engine.input_processor)
    assert front is not None
    llm.collective_rpc(SET_EVERYONE, args=(sent(front.checked_global(given), None),))
    assert llm.reset_prefix_cache()


def run(model: Path, stages: int, ranks: int, *more: str, **environment: str) -> dict[str, Any]:
    """What an engine prints that has processes of its own."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_tree.ROOT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_CI_ENV": "0",  # whose engines do not warm up, and then have no room for what a stage gets
        **({} if torch.cuda.is_available() else {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[: stages * ranks])}),
        **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.vllm.pipelines", str(model), str(stages), str(ranks), *more]
    done = subprocess.run(command, env=env, cwd=_tree.ROOT, capture_output=True, text=True, check=False, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def hold_against(whole: dict[str, Any], found: dict[str, Any]) -> None:
    """The same tokens and probabilities, of requests that are not alike, and nothing left in any worker's rows."""
    assert found["tokens"] == whole["tokens"]
    for numbers, wanted in zip(found["numbers"], whole["numbers"], strict=True):
        assert numbers == pytest.approx(wanted, abs=engines.TOLERANCE)
    assert len({tuple(numbers) for numbers in whole["numbers"]}) == len(whole["numbers"])
    assert all((w["requests"], w["rows_in_use"]) == (0, 0) for w in found["workers"])


CAPTURES: tuple[dict[str, Any], ...] = (
    {},
    {"tokens": {"last_prompt": True, "positions": [2, 20]}, "reduce": ["rows", "norm"]},
    {"reduce": "mean", "sites": {"post_block": list(range(engines.LAYERS))}},
)


def capture(folder: Path, stages: int, ranks: int, target: Path, options: dict[str, Any]) -> None:
    """Requests that capture, on each side of the cut."""
    from vllm import SamplingParams

    spec = SteerSpec(capture=("post_attn", "post_block"))
    parallel = {"pipeline_parallel_size": stages, "tensor_parallel_size": ranks}
    llm = engines.engine(folder, spec, capture_dir=target, **parallel, **options)
    common: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**common, extra_args={"steer": {"capture": each}}) for each in CAPTURES]
    given = [{"prompt_token_ids": prompt} for prompt in prompts(len(params))]
    rows = [captured(output, llm) for output in engines.results(llm, given, params)]
    assert all(each.status == "complete" for each in rows)
    labels = [{"positions": each.positions, "token_ids": each.token_ids, "steps": each.steps} for each in rows]
    torch.save([{**own, **each.values} for own, each in zip(labels, rows, strict=True)], target / "found.pt")
    print('\n{"tokens": []}')


def main() -> None:
    folder, stages, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}
    if not torch.cuda.is_available():
        options["compilation_config"] = {"mode": 2, "backend": "eager"}
    for more in sys.argv[4:]:
        if more.startswith("capture="):
            capture(folder, stages, ranks, Path(more.removeprefix("capture=")), options)
            return
    spec, asked = (NARROW, narrow()) if "narrow" in sys.argv[4:] else (SPEC, steering())
    llm = engines.engine(folder, spec, pipeline_parallel_size=stages, tensor_parallel_size=ranks, **options)
    given = prompts(len(asked) + 4)
    outputs = engines.generated(llm, asked, TOKENS, given[:-4])
    if spec is SPEC:
        both = {str(n): engines.vector(60 + n).tolist() for n in (CUT - 1, CUT)}
        set_everyone(llm, {"base": {"post_block": both}})
    outputs += engines.generated(llm, [None] * 4, TOKENS, given[-4:])
    found = {
        "tokens": engines.texts(outputs),
        "numbers": [engines.logprobs(o) for o in outputs],
        "workers": llm.collective_rpc(STATE),
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
