"""Prometheus metrics of the front end, in the registry that vLLM's ``/metrics`` shows."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram


class Metrics:
    """Counts of this process."""

    def __init__(self) -> None:
        self.steered = Counter("steer_compile_requests", "Requests taken with steering.")  # shown with _total behind
        self.refused = Counter("steer_compile_refused_requests", "Requests refused for their steering.", ["error"])
        self.check = Histogram(
            "steer_compile_check_seconds",
            "Time to check a request's steering.",
            buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
        )
        self.vectors = Gauge("steer_compile_vector_sets", "Named vector sets.")
        self.changes = Counter("steer_compile_changes", "Changes by an operator.", ["what"])


@cache
def metrics() -> Metrics:
    """The process's metrics; made once, as a registry takes no name twice."""
    return Metrics()
