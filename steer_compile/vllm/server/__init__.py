"""Routes of an OpenAI-compatible server for named vectors and global steering, and metrics beside vLLM's own."""

from steer_compile.vllm.server.plugin import SteeringEndpoints

__all__ = ["SteeringEndpoints"]
