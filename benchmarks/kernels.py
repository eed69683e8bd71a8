"""Bytes per second of the site template against a device copy and against Inductor's version of the same formula.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --tune     # warps and form of the kernel for each width

Needs a CUDA device. An op whose result differs from fp64 is reported as red, without a number.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, timing
from benchmarks.families import FAMILIES
from steer_compile.kernels import site as site_module
from steer_compile.kernels.site import ARGUMENTS, SiteArgs, launch, norm_of, reference
from steer_compile.kernels.site_launch import LaunchOptions, launch_options
from steer_compile.kernels.steer_rows import steer_rows_fp64
from tests.kernels.site_inputs import site_args

TOKENS = (1024, 4096, 65536)
WIDTHS = (3072, 4096, 8192)
WIDE = 28672
"""Four parallel streams of 7168 numbers."""
LARGE = 1 << 29
DRAWN = 4096
BYTES_MOVED = 4 << 30
"""Bytes that the input sets of one measurement hold together, so that no set is in the cache when its turn comes."""


@dataclass(frozen=True)
class Case:
    """One point of the table."""

    family: str
    tokens: int
    width: int
    dtype: torch.dtype

    def bytes(self) -> int:
        """Fewest bytes that must move: stream and branch in, stream and norm out, and the capture."""
        tensors = 5 if "capture" in FAMILIES[self.family] else 4
        return tensors * self.tokens * self.width * self.dtype.itemsize

    def args(self, seed: int) -> SiteArgs:
        """Random arguments; beyond `DRAWN` tokens they repeat, as drawing them takes longer than measuring."""
        drawn = min(self.tokens, DRAWN)
        a = site_args(drawn, self.width, self.dtype, FAMILIES[self.family], seed=seed, device="cuda")
        times, changed = self.tokens // drawn, {}
        for name in (x.name for x in ARGUMENTS if "T" in x.shape.split() and times > 1):
            tensor: Tensor | None = getattr(a, name)
            if tensor is not None and name == "capture":
                changed[name] = tensor.new_full((1, self.tokens, self.width), float("nan"))
            elif tensor is not None:
                changed[name] = tensor.repeat(times, *[1] * (tensor.dim() - 1))
        return a._replace(**changed)


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def flaw(case: Case, run: Callable[[SiteArgs], tuple[Tensor, Tensor]]) -> str:
    """What is wrong with an implementation at this case, or nothing."""
    a = case.args(99)
    v = a.stream + a.branch if a.branch is not None else a.stream
    steered = steer_rows_fp64(v, a.steering(), a.clamps)
    weight = None if a.weight is None else a.weight.double()
    normed = norm_of(steered, a.norm, weight, None, a.eps, a.offset)
    room = 2 * torch.finfo(case.dtype).eps
    errors = [relative(got, exact) for got, exact in zip(run(a), (steered, normed), strict=True)]
    if a.capture is not None:
        errors.append(relative(a.capture[0, : case.tokens], v.double()))
    return "" if all(e <= room for e in errors) else f"relative errors {errors} are over {room:.1e}"


def microseconds(run: Callable[[], object], replays: int = 20) -> float:
    """Median time of one replay of a CUDA graph of ``run``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(replays):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return statistics.median(times)


def input_sets(case: Case) -> list[SiteArgs]:
    """As many inputs as it takes to be out of the cache when their turn comes again."""
    count = max(2, min(64, BYTES_MOVED // max(case.bytes(), 1) // 8))
    first = case.args(0)
    fresh = {"stream", "branch", "capture"}
    return [first._replace(**{k: getattr(first, k).clone() for k in fresh if getattr(first, k) is not None})
            for _ in range(count)]  # fmt: skip


def time_of(case: Case, run: Callable[[SiteArgs], object], sets: list[SiteArgs]) -> float:
    """Microseconds of one call, over all input sets."""
    return microseconds(lambda: [run(a) for a in sets]) / len(sets)


def copy_of(case: Case, sets: list[SiteArgs], tb_per_s: float = 0.0) -> float:
    """Microseconds of a copy that moves as many bytes as the case must.

    Args:
        tb_per_s: the card's copy bandwidth, which is taken beyond `LARGE`: inside a graph a large copy is slower.
    """
    numbers = case.bytes() // 2 // case.dtype.itemsize
    pairs = [(torch.randn(numbers, device="cuda").to(case.dtype), torch.empty(numbers, device="cuda", dtype=case.dtype))
             for _ in sets]  # fmt: skip
    spent = microseconds(lambda: [target.copy_(source) for source, target in pairs]) / len(sets)
    return min(spent, case.bytes() / tb_per_s / 1e6) if tb_per_s and case.bytes() > LARGE else spent


def measure(case: Case, tb_per_s: float) -> dict[str, Any]:
    """One row of the table."""
    compiled = torch.compile(reference, dynamic=False)
    row: dict[str, Any] = {"family": case.family, "tokens": case.tokens, "width": case.width}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes()}
    sets = input_sets(case)
    row["copy_us"] = round(copy_of(case, sets, tb_per_s), 3)
    for name, run in (("template", launch), ("inductor", compiled)):
        torch._dynamo.reset_code(reference.__code__)
        wrong = flaw(case, run)
        if wrong:
            row |= {f"{name}_us": "", f"{name}_of_copy_percent": "", f"{name}_red": wrong}
            continue
        spent = time_of(case, run, sets)
        row |= {f"{name}_us": round(spent, 3), f"{name}_of_copy_percent": round(100 * row["copy_us"] / spent, 1)}
        row[f"{name}_red"] = ""
    return row


def cases(tokens: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[Case]:
    for family in FAMILIES:
        for count in tokens:
            yield Case(family, count, 2048, torch.bfloat16)
    for width in widths:
        yield Case("add", 4096, width, torch.bfloat16)
        yield Case("all", 4096, width, torch.bfloat16)
    for family in FAMILIES:
        yield Case(family, 4096, WIDE, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        yield Case("add", 4096, 2048, dtype)


def tune() -> None:
    """Time every number of warps at each width, in both forms of the kernel."""
    original, few = site_module.launch_options, site_module.FEW_TOKENS
    for width in (2048, 4096):
        for family in FAMILIES:
            case = Case(family, 4096, width, torch.bfloat16)
            sets, found = input_sets(case), {}
            for form, limit in (("many", 0), ("few", 1 << 30)):
                site_module.FEW_TOKENS = limit
                for warps in (2, 4, 8):
                    options = LaunchOptions(launch_options(width).block, warps)
                    site_module.launch_options = lambda *_, chosen=options: chosen  # type: ignore[assignment]
                    found[f"{form}{warps}w"] = round(time_of(case, launch, sets), 2)
            text = "  ".join(f"{k} {v}" for k, v in sorted(found.items(), key=lambda item: item[1]))
            print(f"tune {width} {family}: copy {copy_of(case, sets):.2f}  {text}", flush=True)
    site_module.launch_options, site_module.FEW_TOKENS = original, few


def narrow_tables() -> None:
    """An additive site whose tokens all have rows of their own, with tables of bf16 and of fp8 (scale for each row)."""
    for tokens in (64, 256, 4096):
        case = Case("add", tokens, 2048, torch.bfloat16)
        found = {}
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            own = torch.randn(tokens, case.width, device="cuda").to(dtype)
            rows = torch.randperm(tokens, device="cuda", dtype=torch.int32)
            sets = [a._replace(table=own.clone(), rows=rows, scale=torch.ones(tokens, device="cuda"))
                    for a in input_sets(case)]  # fmt: skip
            found[str(dtype)] = round(time_of(case, launch, sets), 2)
        print(f"narrow tables, {tokens} tokens: {found}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--widths", type=int, nargs="*", default=[], help="measure these alone")
    options, where = records.begin(parser)
    where["copy_tb_per_s"] = round(timing.copy_bandwidth(), 3)
    print(where["copy_tb_per_s"], "TB/s of a copy", flush=True)
    if options.tune:
        tune()
        narrow_tables()
        return
    table = []
    with torch.no_grad():
        for case in cases(tuple(options.tokens), WIDTHS):
            if options.widths and case.width not in options.widths:
                continue
            row = measure(case, where["copy_tb_per_s"])
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
            table.append({**row, **where})
            records.write_csv(table, options.out / "kernels.csv")


if __name__ == "__main__":
    main()
