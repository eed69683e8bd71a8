"""What Triton would compile for a call, without a GPU: the keys of its own cache, made by its own binder.

The one door to Triton's private API in the tests; run on triton 3.6 and 3.7.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from steer_compile.kernels.site import SiteArgs, launch

TARGET = GPUTarget("cuda", 90, 32)


class Call(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def recorded(a: SiteArgs) -> list[Call]:
    """The launches that a call of the site makes; none runs."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: calls.append(Call(self.kernel, grid, args, options))

    launch(a, Recorder)
    return calls


@cache
def compiled_form(kernel: Any) -> Any:
    """The kernel as Triton compiles it; the interpreter's form keeps the function."""
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn)


@cache
def _binder(kernel: Any) -> Any:
    jit = compiled_form(kernel)
    return create_function_from_signature(jit.signature, jit.params, CUDABackend(TARGET))


def key(call: Call) -> tuple[str, str]:
    """Name of the kernel, and the key under which Triton keeps the variant that serves the call."""
    _, specialization, options = _binder(call.kernel)(*call.args, **call.options)
    return call.kernel.__name__, str(compute_cache_key({}, specialization, options))


def keys(a: SiteArgs) -> set[tuple[str, str]]:
    """Keys of all launches that a call of the site makes."""
    return {key(call) for call in recorded(a)}


def source(call: Call) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a call, and the options of the compilation."""
    jit, backend = compiled_form(call.kernel), CUDABackend(TARGET)
    bound, specialization, options = _binder(call.kernel)(*call.args, **call.options)
    parsed, signature, constants, attributes = jit._pack_args(backend, options, bound, specialization, options)
    return ASTSource(jit, signature, constants, attributes), parsed.__dict__
