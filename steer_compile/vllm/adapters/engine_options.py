"""Options of an engine with which its model cannot be steered."""

from __future__ import annotations

from vllm.config import CompilationMode, VllmConfig

from steer_compile.errors import LoweringError
from steer_compile.spec import SteerSpec
from steer_compile.vllm.settings import Settings, captures


def check(config: VllmConfig, settings: Settings) -> None:
    """Refuse an engine with a spec that cannot be steered.

    Raises:
        LoweringError: says which of its options stands in the way.
    """
    if config.compilation_config.mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE):
        raise LoweringError(
            f"vLLM runs this model without its own compilation (mode {config.compilation_config.mode.name}), and there "
            "is no graph to steer; leave out enforce_eager, and set no compilation mode below DYNAMO_TRACE_ONCE"
        )
    refused = next((words for on, words in (*_options(config, settings.spec), *_dynamic(config, settings)) if on), "")
    if refused:
        raise LoweringError(refused)


def _options(config: VllmConfig, spec: SteerSpec) -> tuple[tuple[bool, str], ...]:
    """Whether each of the options is on, and its refusal."""
    parallel, drafts = config.parallel_config, config.speculative_config
    split = "and the rows of its tokens would not be theirs; set"
    return (
        (
            parallel.prefill_context_parallel_size > 1,
            f"prefill context parallelism splits a step between ranks, {split} prefill_context_parallel_size=1",
        ),
        (
            parallel.use_ubatching,
            f"dual batch overlap runs a step in two parts, {split} enable_dbo=False and ubatch_size=0",
        ),
        (
            parallel.tensor_parallel_size > 1 and bool(vars(config.compilation_config.pass_config).get("enable_sp")),
            f"sequence parallelism splits a step between ranks, {split} "
            "compilation_config={'pass_config': {'enable_sp': False}}",
        ),
        (
            config.cache_config.kv_sharing_fast_prefill,
            f"fast prefill runs later layers on some of a step's tokens, {split} kv_sharing_fast_prefill=False",
        ),
        (
            drafts is not None and bool(vars(drafts).get("enable_adaptive_verification")),
            f"adaptive verification drops drafts on the device, {split} enable_adaptive_verification=False",
        ),
        (
            config.kv_transfer_config is not None,
            "connectors that move KV blocks may key them by their tokens alone, and steered ones would reach other "
            "requests; leave kv_transfer_config out",
        ),
        (
            drafts is not None and captures(spec) and bool(config.scheduler_config.async_scheduling),
            "which drafts are taken is not known on the host while the scheduler is a step ahead, so captured tokens "
            "could not be chosen; set async_scheduling=False, or leave speculative_config or the spec's capture out",
        ),
    )


def _dynamic(config: VllmConfig, settings: Settings) -> tuple[tuple[bool, str], ...]:
    """The same for what dynamic steering needs."""
    parallel, spec = config.parallel_config, settings.spec
    looks, remembers = bool(settings.controllers or spec.overrides), "memory" in settings.families
    most = config.scheduler_config.max_num_seqs
    return (
        (
            parallel.pipeline_parallel_size > 1 and (looks or spec.cross_layer),
            "controllers, overrides and gates across layers need all layers in one process; set "
            "pipeline_parallel_size=1, or leave controllers, overrides and cross_layer out",
        ),
        (
            parallel.data_parallel_size > 1 and settings.dynamic,
            "dynamic steering would differ between the replicas of data parallelism; set data_parallel_size=1 and "
            "start an engine for each, or leave controllers, overrides and the op families tier and monitor out",
        ),
        (
            config.speculative_config is not None and (bool(settings.controllers) or remembers),
            "controllers and gates with a memory would see drafts that are not taken; leave speculative_config out, or "
            "controllers and the op family memory",
        ),
        (
            remembers and most > spec.sequences,
            f"max_num_seqs={most} requests may run at once, and the gates' memory has sequences={spec.sequences}; "
            f"give SteerSpec(sequences={most}), or lower max_num_seqs",
        ),
    )
