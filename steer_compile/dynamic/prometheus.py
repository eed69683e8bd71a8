"""A status in Prometheus' text form. Needs prometheus_client, so it is imported where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_PREFIX = "steer_compile_dynamic"
_GAUGES = {
    "rows": ("in_use", "Rows of configurations in use."),
    "overrides": ("in_use", "Rows of overrides in use."),
    "queue": ("waiting", "Actions that wait for the next step."),
}


class StatusCollector:
    """Shows a status as metrics."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        status = self._status
        yield CounterMetricFamily(f"{_PREFIX}_steps", "Steps.", value=status["step"])
        for what, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{what}", text, value=status[what][field])
            yield GaugeMetricFamily(f"{_PREFIX}_{what}_capacity", f"Room: {text}", value=status[what]["capacity"])
        actions = CounterMetricFamily(
            f"{_PREFIX}_actions", "Actions by outcome and source.", labels=["outcome", "source"]
        )
        for outcome, sources in status["actions"].items():
            for source, number in sources.items():
                actions.add_metric([outcome, source], number)
        yield actions
        yield from _controllers(status["controllers"])


def _controllers(controllers: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    shown = {
        "mean_ms": ("controller_mean_milliseconds", "Mean wall time of a controller in a step."),
        "max_ms": ("controller_max_milliseconds", "Longest wall time of a controller in a step."),
        "fire_rate": ("controller_fire_rate", "Share of the steps in which a controller asked for something."),
    }
    for field, (name, text) in shown.items():
        gauge = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["controller"])
        for controller, data in controllers.items():
            gauge.add_metric([controller], data[field])
        yield gauge
    for field, text in (("errors", "Errors of a controller."), ("late", "Steps of a controller beyond its budget.")):
        counter = CounterMetricFamily(f"{_PREFIX}_controller_{field}", text, labels=["controller"])
        for controller, data in controllers.items():
            counter.add_metric([controller], data[field])
        yield counter


def exposition(status: Mapping[str, Any]) -> str:
    """Text of a status of `Dynamics`."""
    registry: Any = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    text: bytes = generate_latest(registry)
    return text.decode()
