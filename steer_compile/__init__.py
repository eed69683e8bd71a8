"""Steer, monitor and capture the residual stream of compiled language models."""

from steer_compile._version import __version__
from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.errors import SteerError
from steer_compile.runtime.runtime import Handle, Runtime
from steer_compile.runtime.vectors import Steering, TokenSelection, vector_set
from steer_compile.spec import HookSelection, SteerSpec

__all__ = [
    "Handle",
    "HookSelection",
    "Runtime",
    "SteerBackend",
    "SteerError",
    "SteerSpec",
    "Steering",
    "TokenSelection",
    "__version__",
    "steer_backend",
    "vector_set",
]
