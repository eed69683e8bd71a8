"""Kernel time of one site in a decoding step, where a step's weights pass through the cache between two sites.

    python -m benchmarks.decode
    python -m benchmarks.decode --variants      # warps, and both forms of the kernel

`benchmarks.kernels` calls one site again and again, so that its tables are in the cache. Here each of 32 sites has
tables of its own, and a matrix product with 32 MiB of weights stands before each, as in a model. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import records
from benchmarks.families import FAMILIES
from benchmarks.kernels import Case, flaw
from steer_compile.kernels import site as site_module
from steer_compile.kernels.site import SiteArgs, launch, reference
from steer_compile.kernels.site_launch import LaunchOptions, launch_options
from tests.kernels.site_inputs import site_args

SITES, INNER, WEIGHTS = 32, 8192, 6
Run = Callable[[SiteArgs], tuple[Tensor, Tensor]]


class Chain:
    """Sites one behind the other, each behind a matrix product, as one CUDA graph."""

    def __init__(self, families: tuple[str, ...], tokens: int, width: int) -> None:
        dtype = torch.bfloat16
        self.sites = [site_args(tokens, width, dtype, families, seed=i, device="cuda") for i in range(SITES)]
        self.weights = [torch.randn(INNER, width, device="cuda", dtype=dtype) * 0.01 for _ in range(WEIGHTS)]
        self.inner = torch.randn(tokens, INNER, device="cuda", dtype=dtype)

    def step(self, run: Run) -> Tensor:
        stream = self.sites[0].stream
        for i, a in enumerate(self.sites):
            branch = self.inner @ self.weights[i % WEIGHTS]
            stream, _ = run(a._replace(stream=stream, branch=branch))
        return stream

    def microseconds(self, run: Run, replays: int = 20) -> float:
        """Median over the replays of the time of all kernels that are no matrix products, for one site."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(run)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(run)
        graph.replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(replays):
                graph.replay()
            torch.cuda.synchronize()
        events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
        mine = [e for e in events if e.name().startswith(("triton_", "site_"))]
        if len(mine) % replays:
            raise RuntimeError(f"{len(mine)} kernels in {replays} replays: the profiler lost some")
        mine.sort(key=lambda e: e.start_ns())
        each = len(mine) // replays
        sums = [sum(e.duration_ns() for e in mine[i * each : (i + 1) * each]) for i in range(replays)]
        return statistics.median(sums) / 1e3 / SITES


def variants(width: int, families: tuple[str, ...]) -> dict[str, LaunchOptions]:
    """Launches to compare, by name; names that begin with ``many`` use the form for many tokens."""
    base = launch_options(width, few=True)
    return {f"{form}_{warps}w": replace(base, warps=warps) for form in ("few", "many") for warps in (2, 4, 8, 16)}


def measure(family: str, tokens: int, width: int, compare: bool) -> dict[str, Any]:
    """One row of the table: plain add and norm by Inductor, the edits by Inductor, and the template."""
    families = FAMILIES[family]
    row: dict[str, Any] = {"family": family, "tokens": tokens, "width": width}
    chain = Chain(families, tokens, width)
    case = Case(family, tokens, width, torch.bfloat16)
    for name, parts in (("plain", ("branch",)), ("inductor", families)):
        torch._dynamo.reset_code(reference.__code__)
        compiled = torch.compile(reference, dynamic=False)
        row[f"{name}_us"] = round((Chain(parts, tokens, width) if name == "plain" else chain).microseconds(compiled), 3)
    row["inductor_red"], row["template_red"] = flaw(case, compiled), flaw(case, launch)
    row["template_us"] = "" if row["template_red"] else round(chain.microseconds(launch), 3)
    if compare:
        few, options = site_module.FEW_TOKENS, site_module.launch_options
        for name, chosen in variants(width, families).items():
            site_module.FEW_TOKENS = 0 if name.startswith("many") else 1 << 30
            site_module.launch_options = lambda *_, chosen=chosen: chosen  # type: ignore[assignment]
            row[name] = round(chain.microseconds(launch), 3)
        site_module.FEW_TOKENS, site_module.launch_options = few, options
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--width", type=int, default=2048)
    options, where = records.begin(parser)
    table = []
    with torch.no_grad():
        for tokens in options.tokens:
            for family in options.families:
                row = measure(family, tokens, options.width, options.variants)
                print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
                table.append({**row, **where})
    records.write_csv(table, options.out / ("decode_variants.csv" if options.variants else "decode.csv"))


if __name__ == "__main__":
    main()
