"""Steps of vLLM engines with and without steering, in one process, in turn.

    python -m benchmarks.vllm_steps --rounds 10

Each engine is of the 1B Llama shape with random weights, equal in all. A round brings each scenario to a batch of
decoding requests and measures: GPU time of the kernels of a step and their number (profiler, copies left out), time on
the host of scheduling and of running a step (`Scheduler.schedule` and `GPUModelRunner.execute_model` do not wait for
the device), wall clock of a step. Numbers are compared with the plain engine's of the same round. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import records
from benchmarks.timing import copy_bandwidth, kernels
from steer_compile import HookSelection, SteerSpec
from steer_compile.vllm import engine_args
from steer_compile.vllm.adapters.runners import live_of

WIDTH, LAYERS, HOOKS = 2048, 16, ("post_attn", "post_block")
PROMPT, TOKENS = 64, 128
OPS = {"add": ("add",), "row_monitor": ("add", "row_monitor"), "clamp": ("add", "clamp")}
CAPTURED = {"capture_one": (LAYERS // 2,), "capture_all": tuple(range(LAYERS))}
"""Layers whose `post_block` an engine captures."""
ENGINES = ("plain", "plain_again", *OPS, *CAPTURED)
TOKENS_CAPTURED = {"last": {"last_prompt": True}, "generated": {"generated": True}}


def spec_of(engine: str, rows: int) -> SteerSpec | None:
    """What an engine compiles in."""
    if engine in OPS:
        return SteerSpec(steer=HOOKS, rows=rows, ops=OPS[engine], clamps=1)
    return SteerSpec(capture=(HookSelection("post_block", CAPTURED[engine]),)) if engine in CAPTURED else None


@dataclass(frozen=True)
class Scenario:
    """What the requests of an engine ask for: nothing, all the same, each its own, or rows of some tokens."""

    engine: str
    asks: str = "nothing"
    goal: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}_{self.asks}" if self.engine in OPS or self.engine in CAPTURED else self.engine


SCENARIOS = (
    Scenario("plain"),
    Scenario("plain_again", goal="noise"),
    Scenario("add", "nothing", "<= 0.3 %"),
    Scenario("add", "one", "<= 0.5 %"),
    Scenario("add", "own", "<= 1 %"),
    Scenario("row_monitor", "one", "<= 1.5 %"),
    Scenario("clamp", "one", "<= 2 %"),
    Scenario("capture_one", "last", "<= 1 %"),
    Scenario("capture_all", "last", "<= 3 %"),
    Scenario("capture_all", "generated"),
)


def vectors(seed: int) -> dict[str, Any]:
    """A vector at every site, packed as a client packs it."""
    numbers = np.random.default_rng(seed).standard_normal((LAYERS, len(HOOKS), WIDTH)).astype(np.float16) * 0.02

    def packed(row: Any) -> dict[str, Any]:
        return {"dtype": "float16", "shape": [WIDTH], "data": base64.b64encode(row.tobytes()).decode()}

    return {hook: {str(n): packed(numbers[n, i]) for n in range(LAYERS)} for i, hook in enumerate(HOOKS)}


def steering(scenario: Scenario, request: int) -> dict[str, Any] | None:
    """What one request asks for."""
    if scenario.asks == "nothing":
        return None
    if scenario.asks in TOKENS_CAPTURED:
        return {"capture": {"tokens": TOKENS_CAPTURED[scenario.asks]}}
    asked: dict[str, Any] = {"base": vectors(request if scenario.asks == "own" else 0)}
    sites = [f"layers.{n}.post_block" for n in range(LAYERS)]
    probe = np.random.default_rng(1).standard_normal(WIDTH).tolist()
    if scenario.engine == "row_monitor":
        asked["monitors"] = {site: {"probe": probe, "threshold": 0.5, "sharpness": 2.0} for site in sites}
    if scenario.engine == "clamp":
        asked["clamps"] = {site: [{"direction": probe, "lo": -1.0, "hi": 1.0}] for site in sites}
    return asked


@dataclass
class Clock:
    """Host seconds inside the functions of vLLM that it is put around."""

    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def around(self, *places: tuple[Any, str]) -> Iterator[None]:
        """Time calls of methods, given as an owner and a name, while the block runs."""
        originals = [getattr(owner, name) for owner, name in places]
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, self._timed(original))
        try:
            yield
        finally:
            for (owner, name), original in zip(places, originals, strict=True):
                setattr(owner, name, original)

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start)
            return result

        return call


class Engine:
    """One engine in this process."""

    def __init__(self, name: str, model: Path, requests: int, rows: int) -> None:
        from vllm import LLM

        spec = spec_of(name, rows)
        kept = {"capture_dir": tempfile.mkdtemp()} if name in CAPTURED else {}
        steered = {} if spec is None else engine_args(spec, **kept)
        start = time.perf_counter()
        self.llm = LLM(
            model=str(model), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, seed=0,
            max_model_len=1024, max_num_seqs=requests, max_num_batched_tokens=8192, gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=6 << 30, enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": [1, 8, 64, 256]}, **steered,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - start
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self._number = 0
        self._live: list[str] = []

    def add(self, scenario: Scenario, requests: int, tokens: int) -> float:
        """Submit requests; returns milliseconds of one, median."""
        from vllm import SamplingParams

        spent = []
        for i in range(requests):
            asked = steering(scenario, i)
            prompt = {"prompt_token_ids": [(7 * i + j) % 30000 + 3 for j in range(PROMPT)]}
            params = SamplingParams(
                max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True,
                extra_args=None if asked is None else {"steer": asked},
            )  # fmt: skip
            self._number += 1
            self._live.append(f"r{self._number}")
            start = time.perf_counter()
            self.engine.add_request(self._live[-1], prompt, params)
            spent.append(time.perf_counter() - start)
        return statistics.median(spent) * 1e3

    def drain(self) -> list[list[int]]:
        """Run until all have finished; the tokens of each request, in the order of submission."""
        found = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[int(output.request_id[1:])] = list(output.outputs[0].token_ids)
        self._live.clear()
        return [found[n] for n in sorted(found)]

    def abort(self) -> None:
        """End all requests."""
        self.engine.abort_request(self._live)
        self._live.clear()
        while self.core.scheduler.has_requests():
            self.engine.step()
        self.engine.step()  # tells the runner of the last ones
        self.flush()

    def flush(self) -> None:
        """Wait for files of captured rows, which a thread writes, so that no other measurement has them."""
        live = live_of(self.runner)
        while live is not None and live.writer is not None and live.writer.waiting:
            time.sleep(0.01)

    def until_decoding(self, requests: int) -> float:
        """Run the prefill steps; seconds."""
        start = time.perf_counter()
        while len(self.core.scheduler.running) < requests:
            self.engine.step()
        for _ in range(4):
            self.engine.step()
        return time.perf_counter() - start

    def measure(self, steps: int) -> dict[str, float]:
        """Medians of some steps as the engine is."""
        scheduled, executed = Clock(), Clock()
        torch.cuda.synchronize()
        walls = []
        places = scheduled.around((self.core.scheduler, "schedule")), executed.around((self.runner, "execute_model"))
        with places[0], places[1]:
            for _ in range(steps):
                start = time.perf_counter()
                self.engine.step()
                walls.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        found = kernels(self.engine.step, steps)
        return {
            "kernel_us": found.microseconds,
            "kernels": found.count,
            "schedule_us": statistics.median(scheduled.seconds) * 1e6,
            "execute_us": statistics.median(executed.seconds) * 1e6,
            "wall_us": statistics.median(walls) * 1e6,
        }


def decode(engine: Engine, scenario: Scenario, requests: int, steps: int) -> dict[str, float]:
    """A batch of decoding requests."""
    submit = engine.add(scenario, requests, 4 * steps + 16)
    first = engine.until_decoding(requests)
    measured = engine.measure(steps)
    engine.abort()
    return {**measured, "submit_ms": submit, "prefill_s": first}


def prefill(engine: Engine, scenario: Scenario, requests: int) -> dict[str, float]:
    """Kernel time of the one step that computes the prompts, of 8192 tokens."""
    engine.add(scenario, requests, 2)
    found = kernels(engine.engine.step, 1)
    engine.drain()
    engine.flush()
    return {"kernel_us": found.microseconds, "kernels": found.count}


def throughput(engine: Engine, scenario: Scenario, requests: int) -> dict[str, float]:
    """Tokens of a second from submission to the end, of prompts of 64 tokens and 128 more."""
    start = time.perf_counter()
    engine.add(scenario, requests, TOKENS)
    engine.drain()
    spent = time.perf_counter() - start
    engine.flush()
    return {"tokens_s": requests * TOKENS / spent}


def model_folder() -> Path:
    """A configuration of the 1B shape."""
    from transformers import LlamaConfig

    folder = Path(tempfile.mkdtemp())
    LlamaConfig(
        vocab_size=128256, hidden_size=WIDTH, intermediate_size=8192, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by the bootstrap (Efron, 1979)."""
    sample = np.random.default_rng(0).choice(np.array(values), (draws, len(values)))
    low, high = np.percentile(np.median(sample, axis=1), [2.5, 97.5])
    return float(low), float(high)


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row for each scenario, phase and quantity, against the plain engine of the same round."""
    rows = []
    for (name, phase), rounds in found.items():
        base = found["plain", phase]
        for quantity in rounds[0]:
            values = [r[quantity] for r in rounds]
            over = [100 * (v / b[quantity] - 1) for v, b in zip(values, base, strict=True) if b[quantity]]
            low, high = interval(over) if over else (0.0, 0.0)
            rows.append(
                {
                    "scenario": name, "phase": phase, "quantity": quantity, "rounds": len(rounds),
                    "median": round(statistics.median(values), 4),
                    "over_percent": round(statistics.median(over), 3) if over else "",
                    "over_95_percent_interval": f"{low:.2f} to {high:.2f}",
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    options, where = records.begin(parser)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    where["vllm"] = vllm.__version__
    model, engines = model_folder(), {}
    for name in options.engines:
        engines[name] = Engine(name, model, options.requests, 2 * options.requests)
        print(name, "starts in", round(engines[name].start_seconds, 1), "s", flush=True)
    chosen = [s for s in SCENARIOS if s.engine in engines]
    tokens = {}
    for scenario in chosen:
        engines[scenario.engine].add(scenario, options.requests, 32)
        tokens[scenario.name] = engines[scenario.engine].drain()
    same = {name: sum(a == b for a, b in zip(tokens["plain"], t, strict=True)) for name, t in tokens.items()}
    print("requests with the plain engine's tokens, of", options.requests, json.dumps(same), flush=True)
    where["copy_tb_s"] = round(copy_bandwidth(), 3)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(options.rounds + 1):
        if number == 1:  # the first round warms up
            found.clear()
        for scenario in chosen if number % 2 else reversed(chosen):
            engine, name = engines[scenario.engine], scenario.name
            batch = found.setdefault((name, f"decode_{options.requests}"), [])
            batch.append(decode(engine, scenario, options.requests, options.steps))
            found.setdefault((name, "decode_1"), []).append(decode(engine, scenario, 1, options.steps))
            found.setdefault((name, "generate"), []).append(throughput(engine, scenario, options.requests))
            found.setdefault((name, "prefill_8192"), []).append(prefill(engine, scenario, 8192 // PROMPT))
        print("round", number, flush=True)
        rows = [{**row, **where, "same_tokens": same[row["scenario"]]} for row in table(found)]
        records.write_csv(rows, options.out / "vllm_steps.csv")  # each round, as a run may be cut short
    for row in table(found):
        print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
