"""Where a model is compiled: its tables are attached in front of Dynamo, and its graph is spliced behind it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationConfig, VllmConfig, get_current_vllm_config

from steer_compile import torch_compat
from steer_compile.vllm.adapters import runner_v1, runner_v2
from steer_compile.vllm.adapters.engine_options import check
from steer_compile.vllm.adapters.runners import building
from steer_compile.vllm.model import Shape, SteeredModel
from steer_compile.vllm.settings import Settings, build

_COMPILING: ContextVar[SteeredModel | None] = ContextVar("steered model under construction", default=None)

_STEERED: WeakKeyDictionary[Any, SteeredModel] = WeakKeyDictionary()


def missing() -> str:
    """`init_backend` makes the backend, and the wrapper's constructor asks for it."""
    if "init_backend" not in inspect.getsource(TorchCompileWithNoGuardsWrapper.__init__):
        return "TorchCompileWithNoGuardsWrapper.__init__ does not call CompilationConfig.init_backend"
    return "" if "compute_hash" in vars(VllmConfig) else "VllmConfig has no compute_hash"


def install() -> None:
    """Wrap the compile wrapper's constructor, the backend and the cache key."""
    TorchCompileWithNoGuardsWrapper.__init__ = _constructor(TorchCompileWithNoGuardsWrapper.__init__)
    CompilationConfig.init_backend = _backend(CompilationConfig.init_backend)
    VllmConfig.compute_hash = _hash(VllmConfig.compute_hash)


def settings_of(config: VllmConfig) -> Settings | None:
    """The engine's settings, None without a spec."""
    if config.model_config is None:
        return None
    most = config.scheduler_config.max_num_batched_tokens
    return Settings.read(config.additional_config, most, config.model_config.dtype)


def _constructor(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, compile_prefix: str = "", is_encoder: bool = False) -> None:
        config = get_current_vllm_config()
        settings = settings_of(config)
        if settings is None or is_encoder or _is_draft():
            return original(self, compile_prefix, is_encoder)
        check(config, settings)
        if self not in _STEERED:  # a compiled class that derives from another one comes here twice
            _STEERED[self] = _attached(self, config, settings)
        steered = _STEERED[self]
        token = _COMPILING.set(steered)
        try:
            return original(self, compile_prefix, is_encoder)
        finally:
            _COMPILING.reset(token)

    return __init__


def _attached(model: Any, config: VllmConfig, settings: Settings) -> SteeredModel:
    steered = SteeredModel(settings.spec, shape_of(config), torch.get_default_device(), settings.saes)
    steered.attach(model)
    runner = runner_v2 if config.use_v2_model_runner else runner_v1
    building(runner.MODULE, runner.WRAPPERS, config, steered, settings)
    return steered


def _is_draft() -> bool:
    """Whether a draft model of speculative decoding is under construction; only the target is steered."""
    from vllm.compilation import backends

    return bool(backends.model_tag != "backbone")


def shape_of(config: VllmConfig) -> Shape:
    """Width, dtype and layers of the engine's model, and the layers of this process."""
    model, parallel = config.model_config, config.parallel_config
    start, end = model.get_layers_start_end_indices(parallel)
    return Shape(model.get_hidden_size(), model.dtype, range(start, end), model.get_total_num_hidden_layers())


class SplicedBackend:
    """A backend that splices a graph and hands it to vLLM's own."""

    def __init__(self, inner: Callable[..., Any], steered: SteeredModel) -> None:
        self._inner = inner
        self._steered = steered
        self.__name__ = "steer_compile_vllm"

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        self._steered.splice(gm)
        return self._inner(gm, inputs, **options)


def _backend(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_backend(self: CompilationConfig, *args: Any, **kwargs: Any) -> Any:
        backend = original(self, *args, **kwargs)
        steered = _COMPILING.get()
        if steered is None:
            return backend
        if backend == "inductor":  # vLLM gives Inductor its options only where the backend is a name
            backend = torch_compat.inductor_compiler(None, dict(self.inductor_compile_config), False)
        elif isinstance(backend, str):
            backend = torch_compat.named_backend(backend)
        return SplicedBackend(backend, steered)

    return init_backend


def _hash(original: Callable[[VllmConfig], str]) -> Callable[[VllmConfig], str]:
    """An engine's cache key has its spec already, in ``additional_config``; what a spec becomes is this code's."""

    @functools.wraps(original)
    def compute_hash(self: VllmConfig) -> str:
        key = original(self)
        return key if settings_of(self) is None else f"{key}{build()}"

    return compute_hash
