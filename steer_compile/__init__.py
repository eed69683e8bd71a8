"""Steer, monitor and capture the residual stream of compiled language models."""

from steer_compile._version import __version__
from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.debug.dumps import dump_where_asked
from steer_compile.errors import LoweringError, SteerError
from steer_compile.runtime.features import SAESteering
from steer_compile.runtime.gates import Clamp, Monitor
from steer_compile.runtime.patches import Captured, Patch
from steer_compile.runtime.runtime import Handle, Runtime
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.streams import every_stream, one_stream
from steer_compile.runtime.vectors import TokenSelection, vector_set
from steer_compile.spec import HookSelection, SteerSpec

dump_where_asked()

__all__ = [
    "Captured",
    "Clamp",
    "Handle",
    "HookSelection",
    "LoweringError",
    "Monitor",
    "Patch",
    "Runtime",
    "SAESteering",
    "SteerBackend",
    "SteerError",
    "SteerSpec",
    "Steering",
    "TokenSelection",
    "__version__",
    "every_stream",
    "one_stream",
    "steer_backend",
    "vector_set",
]
