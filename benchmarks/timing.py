"""Clocks: GPU kernel time by the profiler, wall and host time of a call, and the card's copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
_COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Kernels:
    """What ran on the GPU in one call, copies between host and device left out."""

    microseconds: float
    generated: float
    """Microseconds of the kernels that Inductor wrote, without the library's matrix products and attention."""
    count: float
    names: Counter[str]


def kernels(call: Call, calls: int) -> Kernels:
    """Sum of kernel times and number of kernels of one call, over ``calls`` calls under the profiler."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    results = profiler.profiler.kineto_results
    found = [e for e in results.events() if e.device_type() == DeviceType.CUDA]
    found = [e for e in found if not e.name().startswith(_COPIES)]
    names = Counter(e.name() for e in found)
    total = sum(e.duration_ns() for e in found)
    generated = sum(e.duration_ns() for e in found if e.name().startswith("triton_"))
    return Kernels(total / 1e3 / calls, generated / 1e3 / calls, len(found) / calls, names)


def wall_and_host(call: Call, calls: int) -> tuple[float, float]:
    """Microseconds of one call until the GPU is done, and until the call returns; medians of ``calls``."""
    walls, hosts = [], []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
        hosts.append(returned - start)
    return statistics.median(walls) * 1e6, statistics.median(hosts) * 1e6


def host_microseconds(call: Call, calls: int = 5000) -> float:
    """Microseconds of a function that only works on the host; the best of five medians."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds) * 1e6


def copy_bandwidth(gibibytes: int = 2, repeats: int = 20) -> float:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randint(256, (gibibytes << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        target.copy_(source)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return 2 * source.numel() / (float(statistics.median(times)) * 1e-3) / 1e12


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def percent_over(values: Sequence[float], base: Sequence[float]) -> Spread:
    """How much larger than ``base``, in percent, round by round."""
    return Spread.of([100 * (v / b - 1) for v, b in zip(values, base, strict=True)])
