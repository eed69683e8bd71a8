"""Whether host memory stays flat over many steps of a pipeline that writes sharded files.

python -m benchmarks.capture_soak --steps 80000        # results/capture_soak.csv, results/summary.json

Requests of other lengths come and go, so that each step has rows of many. Resident memory is read after a warm-up of a
tenth of the steps, and a line is fitted through it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import records
from steer_compile.capture.consumer import make_consumer
from steer_compile.capture.pipeline import Limits, Pipeline, StepRows


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Load:
    """Requests that come and go: ``batch`` at a time, each of a length of its own."""

    def __init__(self, pipeline: Pipeline, options: argparse.Namespace) -> None:
        self._pipeline = pipeline
        self._random = np.random.default_rng(0)
        self._left = [0] * options.batch
        self._names = [""] * options.batch
        self._next = 0
        self._at = np.zeros(options.batch, np.int64)
        self._values = {
            f"layers.{i}.post_block": torch.randn(options.batch, options.width).bfloat16() for i in range(options.sites)
        }

    def step(self, number: int) -> None:
        """One decoding step of all."""
        for i, left in enumerate(self._left):
            if left == 0:
                if self._names[i]:
                    self._pipeline.end(self._names[i])
                self._names[i], self._at[i] = f"request-{self._next}", 0
                self._left[i] = int(self._random.integers(1, 200))
                self._next += 1
                self._pipeline.begin(self._names[i], tag="soak")
            self._left[i] -= 1
        index = np.arange(len(self._left))
        positions = torch.from_numpy(self._at.copy())
        of = StepRows(self._names, index.astype(np.int32), index, number)
        self._pipeline.submit(of, positions, self._values, positions)
        self._at += 1

    def finish(self) -> None:
        """End what runs."""
        for name in self._names:
            self._pipeline.end(name)


def trim(folder: Path) -> None:
    """Remove old shards: the disk need not hold all."""
    for path in sorted(folder.glob("soak-*"))[:-4]:
        path.unlink(missing_ok=True)


def soak(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Memory by step, and the status of the pipeline in the end."""
    samples: list[dict[str, Any]] = []
    consumers = {"files": make_consumer("files", root=folder, layout="sharded", shard_bytes=64 << 20)}
    limits = Limits(ring_bytes=32 << 20, queue_bytes=32 << 20, results=256)
    every = max(1, options.steps // 200)
    begun = time.perf_counter()
    with Pipeline(consumers, limits=limits) as pipeline:
        load = Load(pipeline, options)
        for number in range(options.steps):
            load.step(number)
            if number % every == 0:
                status = pipeline.status()
                samples.append({
                    "step": number, "resident_mb": round(resident() / 1e6, 2),
                    "seconds": round(time.perf_counter() - begun, 2),
                    "ring_bytes": status["ring_bytes"], "queue_bytes": status["queue_bytes"], "open": status["open"],
                })  # fmt: skip
                trim(folder)
        load.finish()
        if not pipeline.close(600.0):
            raise RuntimeError("the pipeline did not end in time")
        return samples, pipeline.status()


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--steps", type=int, default=80_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="capture-soak-", dir=options.folder))
    samples, status = soak(folder, options)
    shutil.rmtree(folder)
    warm = [s for s in samples if s["step"] >= options.steps // 10]
    steps, memory = (np.array([s[field] for s in warm], float) for field in ("step", "resident_mb"))
    slope = float(np.polyfit(steps, memory, 1)[0]) * 1000
    lost = status["submitted"] - status["delivered"]
    text = (
        f"resident {memory.min():.0f} to {memory.max():.0f} MB from step {int(steps[0])} on; "
        f"{status['bytes'] / 1e9:.2f} GB delivered in {samples[-1]['seconds']:.0f} s; limits 32 + 32 MiB"
    )
    print(f"{slope:.4f} MB per 1000 steps; {text}; lost {lost}")
    claims = [
        records.claim(f"growth of host memory, capture pipeline, {options.steps} steps", "flat", slope,
                      "MB per 1000 steps", spread=text),
        records.claim(f"rows lost, capture pipeline, policy block, {options.steps} steps", "0", lost,
                      f"of {status['submitted']} rows"),
    ]  # fmt: skip
    records.write_csv(samples, options.out / "capture_soak.csv")
    command = f"python -m benchmarks.capture_soak --steps {options.steps}"
    records.update_summary(claims, records.environment(options.commit), command, options.out / "summary.json")


if __name__ == "__main__":
    main()
