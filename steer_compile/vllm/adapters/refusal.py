"""`RefusedRequest`: an error of this package that vLLM's servers answer by 400."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError

from steer_compile.errors import SteerError
from steer_compile.vllm.requests import KEY


class RefusedRequest(SteerError, VLLMValidationError):
    """A request whose steering the engine cannot do: an error of this package, and one that a server answers by 400."""

    def __init__(self, message: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=KEY)

    def __str__(self) -> str:
        return str(self.args[0])
