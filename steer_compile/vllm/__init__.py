"""vLLM: steer each request of an unmodified engine, by configuration.

    LLM(model, **engine_args(SteerSpec(steer=("post_block",))))
    vllm serve MODEL --additional-config '{"steer_compile": {"steer": ["post_block"]}}'

and, for a request, ``SamplingParams(extra_args={"steer": {...}})`` (`requests.parse` says what it may hold).

vLLM finds the package through its entry point ``vllm.general_plugins`` (`plugin.register`). Each thing inside of
vLLM that this package leans on has a file of its own in ``adapters``, with the versions it was run on.
"""

from steer_compile.vllm.capture_files import Captured, capture_result, captured
from steer_compile.vllm.offline import attach_sae, attached_saes, detach_sae
from steer_compile.vllm.settings import cli_config, engine_args

__all__ = [
    "Captured",
    "attach_sae",
    "attached_saes",
    "capture_result",
    "captured",
    "cli_config",
    "detach_sae",
    "engine_args",
]
