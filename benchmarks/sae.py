"""SAE steering: the delta stage of the site template, and the full SAE against two matmuls of the same tokens.

    python -m benchmarks.sae                     # sae_delta.csv and sae_full.csv
    python -m benchmarks.sae --only full --features 16384

Times are of CUDA graph replays, interleaved round by round: medians with quartiles. Weights of the delta rotate through
sets that no cache holds; those of the full SAE are larger than the cache. Every case is first held against fp64, and a
wrong one is reported as red, without a number. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import records, timing
from steer_compile.kernels import sae_full_launch
from steer_compile.kernels.sae_full import SaeFullArgs, reference_fp64
from steer_compile.kernels.site import SiteArgs, launch
from steer_compile.kernels.steer_rows import steer_rows_fp64

WIDTH, DTYPE = 2048, torch.bfloat16
SLOTS, SETS = 64, 48
"""Features of a delta site, and sets of inputs in rotation: 25 MB of features and as much of rows at least."""
ROUNDS = 15
Graphs = Mapping[str, tuple[Callable[[], object], int]]


def graphed(calls: Sequence[Callable[[], object]], times: int) -> tuple[Callable[[], object], int]:
    """A graph of all calls, ``times`` times over, and how many there are in it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    kept = list(calls)  # the graph reads their tensors

    def replay() -> None:
        assert kept
        graph.replay()

    return replay, times * len(calls)


def measured(graphs: Graphs) -> dict[str, timing.Spread]:
    """Microseconds of one call of each graph, in turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for replay, _ in graphs.values():
        replay()
    for _ in range(ROUNDS):
        for name, (replay, count) in graphs.items():
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            replay()
            last.record()
            last.synchronize()
            found[name].append(first.elapsed_time(last) * 1e3 / count)
    return {name: timing.Spread.of(values) for name, values in found.items()}


def columns(found: Mapping[str, timing.Spread]) -> dict[str, float | str]:
    row: dict[str, float | str] = {}
    for name, spread in found.items():
        row |= {f"{name}_us": round(spread.median, 2), f"{name}_iqr": f"{spread.low:.2f}-{spread.high:.2f}"}
    return row


# -- delta ------------------------------------------------------------------------------------------------------------


def site_args(tokens: int, clamped: int, stage: bool, seed: int = 0) -> SiteArgs:
    """A site with add, vectors and RMSNorm; ``clamped`` features in every row, none in an idle one."""
    draw = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    rows = torch.arange(tokens, device="cuda", dtype=torch.int32) % 16
    given: dict[str, Any] = {"stream": randn(tokens, WIDTH), "branch": randn(tokens, WIDTH), "rows": rows}
    given |= {"table": 0.1 * randn(16, WIDTH), "scale": torch.ones(16, device="cuda"), "weight": randn(WIDTH)}
    if stage:
        settings = torch.zeros(SLOTS, 8, device="cuda")
        settings[:, 2], settings[:, 4], settings[:, 6], settings[:, 7] = 1, 1, -1, 1
        codes = torch.zeros(16, SLOTS, device="cuda")
        codes[:, :clamped] = 1
        values = randn(16, SLOTS, dtype=torch.float32)
        weights = randn(2 * SLOTS, WIDTH) / WIDTH**0.5
        given |= {"sae": weights, "sae_set": settings, "sae_clamp": torch.cat([codes, values], 1)}
    return SiteArgs(**given, norm="rms", eps=1e-6)


def delta_row(tokens: int, clamped: int, tb_per_s: float) -> dict[str, Any]:
    a = site_args(tokens, clamped, True, 99)
    out, _ = launch(a)
    exact = steer_rows_fp64(a.stream + a.branch, a.steering())  # type: ignore[operator]
    error = float((out.double() - exact).norm() / exact.norm())
    row: dict[str, Any] = {"tokens": tokens, "clamped": clamped, "slots": SLOTS, "error": f"{error:.1e}"}
    if error > 4 * torch.finfo(DTYPE).eps:
        return row | {"red": f"relative error {error:.1e}"}
    kinds = {"without": (0, False), "idle": (0, True), "steered": (clamped, True)}
    graphs = {}
    for name, (count, stage) in kinds.items():
        sets = [site_args(tokens, count, stage, seed) for seed in range(SETS)]
        graphs[name] = graphed([lambda s=s: launch(s) for s in sets], 4)
    found = measured(graphs)
    extra = 2 * clamped * WIDTH * DTYPE.itemsize
    stream = 4 * tokens * WIDTH * DTYPE.itemsize
    row |= columns(found) | {"features_bytes": extra, "stream_bytes": stream}
    row["floor_us"] = round((extra + stream) / tb_per_s * 1e-6, 3)
    added = found["steered"].median - found["without"].median
    row |= {"added_us": round(added, 2), "idle_added_us": round(found["idle"].median - found["without"].median, 2)}
    return row | {"of_floor": round(found["steered"].median / row["floor_us"], 2), "red": ""}


# -- full -------------------------------------------------------------------------------------------------------------


def full_args(tokens: int, opted: int, features: int, k: int, capacity: int) -> SaeFullArgs:
    """``opted`` of the tokens, spread out, are reconstructed, with 4 clamps each."""
    draw = torch.Generator("cuda").manual_seed(1)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=dtype)

    rows = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    rows[torch.randperm(tokens, generator=draw, device="cuda")[:opted]] = 1
    row_set = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]], device="cuda").float()
    clamps = torch.zeros(2, 3, 8, device="cuda")
    clamps[1, 0, :4], clamps[1, 1, :4], clamps[1, 2, :4] = torch.arange(4, device="cuda") * 99.0, 1, 3
    settings = torch.zeros(features, 8, device="cuda")
    settings[:, 1] = 0 if k else 2.0
    settings[:, 2], settings[:, 4], settings[:, 6], settings[:, 7] = 1, 1, -1, 1
    encoder = randn(features, WIDTH, dtype=DTYPE) / WIDTH**0.5
    decoder = randn(features, WIDTH, dtype=DTYPE) / WIDTH**0.5
    numbers = torch.tensor([[features, k, 0, 0]], device="cuda").float()
    h = randn(tokens, WIDTH, dtype=DTYPE)
    bias = randn(1, WIDTH)
    return SaeFullArgs(
        h, rows, row_set, clamps.flatten(1), encoder, decoder, settings, bias, numbers, None, None, capacity
    )


def flaw(a: SaeFullArgs) -> tuple[str, str]:
    """Relative error of the opted-in tokens against fp64, and what is wrong, if anything."""
    before = a.h.clone()
    sae_full_launch.launch(a)
    got = a.h.clone()
    a.h.copy_(before)
    opted = a.row_set[a.rows, 0] > 0
    if not torch.equal(got[~opted], before[~opted]):
        return "", "a token that is not opted in changed"
    some = torch.nonzero(opted).flatten()[:8]
    if not some.numel():
        return "", ""
    exact, _ = reference_fp64(a._replace(h=before[some], rows=a.rows[some]))
    error = float((got[some].double() - exact).norm() / exact.norm())
    return f"{error:.1e}", "" if error < 2e-2 else f"relative error {error:.1e}"


def full_row(tokens: int, opted: int, features: int, k: int) -> dict[str, Any]:
    a = full_args(tokens, opted, features, k, tokens)
    error, red = flaw(a)
    row: dict[str, Any] = {"tokens": tokens, "opted": opted, "features": features, "k": k, "error": error, "red": red}
    if red:
        return row
    closed = a._replace(gates=torch.zeros(tokens, 4, device="cuda"))
    graphs = {"full": graphed([lambda: sae_full_launch.launch(a)], 8)}
    graphs["closed"] = graphed([lambda: sae_full_launch.launch(closed)], 8)
    if opted:
        x = a.h[torch.nonzero(a.rows).flatten()].clone()
        f = torch.randn(opted, features, device="cuda", dtype=DTYPE)
        encoder, decoder = a.encoder.T, a.decoder
        graphs["matmuls"] = graphed([lambda: (x @ encoder, f @ decoder)], 8)
    found = measured(graphs)
    row |= columns(found)
    if opted:
        fraction = 100 * found["matmuls"].median / found["full"].median
        row |= {"matmul_rate_percent": round(fraction, 1)}
        row["matmul_tflops"] = round(4e-6 * opted * features * WIDTH / found["matmuls"].median, 1)
    counted = timing.kernels(lambda: sae_full_launch.launch(a), 3)
    row["kernels"] = round(counted.count, 1)
    return row


def parts_row(a: SaeFullArgs) -> str:
    """Microseconds of each kernel of one call, by the profiler."""
    sae_full_launch.launch(a)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(5):
            sae_full_launch.launch(a)
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    return " ".join(f"{e.key}={e.device_time_total / 5:.1f}" for e in averages if e.device_time_total)


def tune() -> None:
    """Time the matmuls of other tiles, for few and for many tokens."""
    original = sae_full_launch.plan_of
    for tokens, opted in ((256, 8), (256, 256), (4096, 4096)):
        a = full_args(tokens, opted, 16384, 0, tokens)
        for rows, columns_, warps, stages in itertools.product((64, 128), (64, 128, 256), (4, 8), (3, 4, 5)):
            tile = sae_full_launch.Tiles(columns_, warps, stages)
            plan = sae_full_launch.Plan(rows, 64, tile, tile)
            sae_full_launch.plan_of = lambda *_, chosen=plan: chosen  # type: ignore[assignment]
            if (rows + columns_) * 128 * stages > 220_000 or (warps == 4 and rows * columns_ > 16384):
                continue
            text = parts_row(a)
            print(
                f"tune {tokens} {opted} rows={rows} columns={columns_} warps={warps} stages={stages}: {text}",
                flush=True,
            )
    sae_full_launch.plan_of = original


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("delta", "full"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--features", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--opted", type=int, nargs="*", default=[0, 1, 8, 64, 256])
    parser.add_argument("--many", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--pause", type=float, default=4.0, help="seconds before each case, in which the card cools")
    options, where = records.begin(parser)
    where["copy_tb_per_s"] = round(timing.copy_bandwidth(), 3)
    with torch.no_grad():
        if options.tune:
            tune()
            return
        if options.only != "full":
            table = []
            for tokens in (1, 16, 64, 256):
                for clamped in (1, 8, 64):
                    time.sleep(options.pause / 4)
                    row = delta_row(tokens, clamped, where["copy_tb_per_s"])
                    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                    table.append(row | where)
            records.write_csv(table, options.out / "sae_delta.csv")
        if options.only != "delta":
            table = []
            cases = [(256, n) for n in options.opted] + [(4096, n) for n in options.many]
            for features in options.features:
                for k in (0, 64):
                    for tokens, opted in cases:
                        time.sleep(options.pause)
                        row = full_row(tokens, opted, features, k)
                        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                        if opted in (8, 256, 1024, 4096):
                            print(parts_row(full_args(tokens, opted, features, k, tokens)), flush=True)
                        table.append(row | where)
            complete = max(table, key=len)
            records.write_csv([{key: row.get(key, "") for key in complete} for row in table],
                              options.out / "sae_full.csv")  # fmt: skip


if __name__ == "__main__":
    main()
