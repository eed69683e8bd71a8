"""A process that runs vLLM's own compilation (mode 3, cut into pieces): ``python -m tests.vllm.piecewise``.

On a CPU vLLM compiles whole graphs. Four things are put back there, so that its piecewise back end runs as on a GPU:
the mode that was asked for, no sizes of their own, no fusions of device kernels, no pass over operators of a GPU.

Arguments: the model's folder, ``pieces`` or ``partition`` (Inductor cuts the graph in place of vLLM), and hooks to
steer, none for an engine without a spec, or ``across``: a probe at layer 0 that gates a tier at each layer. Prints one
line of JSON: tokens with nothing active, tokens and log-probabilities with a vector at each layer (``across``: with the
tier and an open gate, and tokens with a shut one), pieces that were compiled, artifacts that were loaded, splices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm.compilation.counter import compilation_counter
from vllm.compilation.passes import pass_manager
from vllm.config import CompilationMode
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform

from steer_compile import SteerSpec
from steer_compile.vllm.model import SteeredModel
from tests.vllm import engines


class _NoPass:
    def __init__(self, *args: Any) -> None: ...

    def __call__(self, graph: Any) -> None: ...

    def uuid(self) -> str:
        return "none"


def allow_pieces() -> None:
    """Let a CPU run mode 3."""
    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: type, config: Any) -> None:
        asked = config.compilation_config
        kept = {name: vars(asked)[name] for name in ("mode", "backend", "ir_enable_torch_wrap")}
        check(cls, config)
        if kept["mode"] == CompilationMode.VLLM_COMPILE:
            vars(asked).update(kept, backend=kept["backend"] or "inductor", compile_sizes=[])
            flags = vars(asked.pass_config)
            flags.update({name: False for name, value in flags.items() if isinstance(value, bool)})

    CpuPlatform.check_and_update_config = classmethod(checked)
    pass_manager.FixFunctionalizationPass = _NoPass


def count_splices() -> list[int]:
    splices: list[int] = []
    original = SteeredModel.splice

    def splice(self: SteeredModel, gm: Any) -> None:
        original(self, gm)
        splices.append(len(self.plans[-1].edits))

    SteeredModel.splice = splice  # type: ignore[method-assign]
    return splices


ACROSS = SteerSpec(
    steer=({"hook": "post_attn", "layers": [0], "ops": ["monitor", "memory"]}, {"hook": "post_block", "ops": ["tier"]}),
    rows=8, cross_layer=True,
)  # fmt: skip


def across(llm: Any) -> dict[str, Any]:
    """A tier at each layer in turn behind the gate at layer 0, and all of them behind a shut one."""

    def change(**what: Any) -> None:
        llm.collective_rpc("steer_compile_set_sites", args=(1, what))

    def gate(threshold: float) -> None:
        probe = engines.vector(6).tolist()
        given = {"probe": probe, "threshold": threshold, "kind": "step", "low": threshold - 1}
        change(monitor={"site": "layers.0.post_attn", "monitor": given})

    found: dict[str, Any] = {"steered": [], "numbers": []}
    gate(-1e6)
    for n in range(engines.LAYERS):
        change(tier={"vectors": {f"layers.{n}.post_block": engines.vector(1 + n, 0.6).tolist()}})
        (output,) = engines.generated(llm, [None])
        found["steered"] += engines.texts([output])
        found["numbers"].append(engines.logprobs(output))
    gate(1e6)
    return {**found, "shut": engines.texts(engines.generated(llm, [None]))[0]}


def main() -> None:
    folder, partition, hooks = Path(sys.argv[1]), sys.argv[2] == "partition", tuple(sys.argv[3:])
    if current_platform.is_cpu():
        allow_pieces()
    splices = count_splices()
    spec = ACROSS if hooks == ("across",) else SteerSpec(steer=hooks, rows=8) if hooks else None
    llm = engines.engine(folder, spec, compilation_config={"mode": 3, "use_inductor_graph_partition": partition})
    from torch._dynamo.utils import counters

    found: dict[str, Any] = {"idle": engines.texts(engines.generated(llm, [None]))[0]}
    if spec is ACROSS:
        found |= across(llm)
    elif hooks:
        outputs = engines.generated(llm, [engines.at(n, engines.vector(1, 0.6)) for n in range(engines.LAYERS)])
        found |= {"steered": engines.texts(outputs), "numbers": [engines.logprobs(o) for o in outputs]}
    counts = {
        "compiled": counters["aot_autograd"]["autograd_cache_miss"],
        "loaded": compilation_counter.num_aot_artifacts_loaded,
        "splices": splices,
    }
    print(json.dumps({**found, **counts}))


if __name__ == "__main__":
    main()
