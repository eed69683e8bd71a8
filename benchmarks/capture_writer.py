"""How fast captured rows reach the disk: packed files against a plain sequential write of as many bytes, with fsync.

python -m benchmarks.capture_writer --folder /tmp      # results/capture_writer.csv, results/summary.json

Each round writes the same bytes in every way of a group, one after the other and in an order drawn by lot, to the same
folder. The time ends when fsync has returned. Where the kernel holds a plain write back now and then, as its pages
become dirty faster than the disk takes them, the second claim compares with plain writes that were not held back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import records
from benchmarks.timing import Spread
from steer_compile.capture.block import row_bytes
from steer_compile.capture.consumer import Began, Consumer, Ended, make_consumer
from steer_compile.capture.parts import signature_of
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.capture.rows import Rows

CHUNK = 16 << 20
SOURCE = np.random.default_rng(0).integers(0, 256, CHUNK, dtype=np.uint8).data
"""What a plain write writes, again and again."""


def rows_of(sites: int, width: int, tokens: int) -> Rows:
    """Rows of one step of a request."""
    numbers = torch.arange(tokens)
    generator = torch.Generator().manual_seed(0)
    values = {
        f"layers.{i}.post_block": torch.randn(tokens, width, generator=generator).bfloat16() for i in range(sites)
    }
    return Rows(("a",), torch.zeros(tokens, dtype=torch.int32), numbers, numbers, numbers * 0, values)


def plain(folder: Path, step: Rows, steps: int) -> None:
    """As many bytes in order, from memory, in pieces of 16 MiB."""
    left = steps * len(step) * row_bytes(signature_of(step))
    fd = os.open(folder / "plain", os.O_CREAT | os.O_WRONLY)
    while left:
        left -= os.write(fd, SOURCE[: min(left, CHUNK)])
    os.fsync(fd)
    os.close(fd)


def consumer(folder: Path, step: Rows, steps: int, made: Consumer) -> None:
    """The consumer alone."""
    made.began(Began("a"))
    for _ in range(steps):
        made.rows(step)
    made.ended(Ended("a"))
    made.close()


def pipeline(folder: Path, step: Rows, steps: int) -> None:
    """All of the pipeline: ring, queue, threads and the packed consumer."""
    of = StepRows(("a",), np.zeros(len(step), np.int32), np.arange(len(step)), 0)
    with Pipeline({"files": make_consumer("files", root=folder, layout="packed")}) as made:
        made.begin("a")
        for _ in range(steps):
            made.submit(of, step.positions, step.values, step.token_ids)
        made.end("a")
        if not made.close(600.0):
            raise RuntimeError("the pipeline did not end in time")


WAYS: dict[str, Callable[[Path, Rows, int], None]] = {
    "plain": plain,
    "packed": lambda f, r, n: consumer(f, r, n, make_consumer("files", root=f, layout="packed")),
    "sharded": lambda f, r, n: consumer(f, r, n, make_consumer("files", root=f, layout="sharded")),
    "pipeline": pipeline,
    "parquet": lambda f, r, n: consumer(f, r, n, make_consumer("parquet", root=f, compression="none")),
}

GROUPS = (("plain", "packed", "sharded", "pipeline"), ("plain", "parquet"))
"""Ways that are compared with one another: parquet keeps the processor busy, which is felt by what comes next."""


def measured(root: Path, ways: Sequence[str], step: Rows, steps: int, rounds: int) -> dict[str, list[float]]:
    """MB/s of each way in each round; a round before them is not counted."""
    size = steps * len(step) * row_bytes(signature_of(step)) / 1e6
    found: dict[str, list[float]] = {way: [] for way in ways}
    order = np.random.default_rng(0)
    for turn in range(rounds + 1):
        for way in order.permutation(ways).tolist():
            folder = Path(tempfile.mkdtemp(prefix="capture-writer-", dir=root))
            begun = time.perf_counter()
            WAYS[way](folder, step, steps)
            seconds = time.perf_counter() - begun
            shutil.rmtree(folder)
            os.sync()
            if turn:
                found[way].append(size / seconds)
                print(f"round {turn} {way}: {size / seconds:.0f} MB/s", flush=True)
    return found


def rows_and_claims(
    found: dict[str, list[float]], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table, and a claim for each way against the plain write of the same rounds."""
    table, claims = [], []
    for way, speeds in found.items():
        speed = Spread.of(speeds)
        share = Spread.of([100 * own / base for own, base in zip(speeds, found["plain"], strict=True)])
        table.append({
            "way": way, "mb_per_second": round(speed.median), "quartiles": f"{speed.low:.0f}..{speed.high:.0f}",
            "percent_of_plain": round(share.median, 1), "percent_quartiles": f"{share.low:.1f}..{share.high:.1f}",
            "megabytes": options.megabytes, "sites": options.sites, "width": options.width,
        })  # fmt: skip
        if way != "plain":
            goal = ">= 70 %" if way == "packed" else "none"
            base = Spread.of(found["plain"])
            text = (
                f"quartiles {share.low:.1f} to {share.high:.1f} over {len(speeds)} rounds; {speed.median:.0f} MB/s "
                f"({speed.low:.0f} to {speed.high:.0f}) against {base.median:.0f} ({base.low:.0f} to {base.high:.0f})"
            )
            name = f"speed of captured rows to disk, {way}, {options.sites} sites of {options.width} bf16"
            claims.append(records.claim(name, goal, share.median, "% of a plain write with fsync", spread=text))
            fast = f"{name}, against the upper quartile of plain writes"
            claims.append(records.claim(fast, goal, 100 * speed.median / base.high, "% of it", spread=text))
    return table, claims


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    step = rows_of(options.sites, options.width, options.tokens)
    steps = max(1, options.megabytes * 1_000_000 // step.nbytes)
    table, claims = [], []
    for group in GROUPS:
        found = rows_and_claims(measured(options.folder, group, step, steps, options.rounds), options)
        table += found[0]
        claims += found[1]
    records.write_csv(table, options.out / "capture_writer.csv")
    command = f"python -m benchmarks.capture_writer --megabytes {options.megabytes} --rounds {options.rounds}"
    records.update_summary(claims, records.environment(options.commit), command, options.out / "summary.json")


if __name__ == "__main__":
    main()
