"""On a CUDA device: after the warm-up, no call of the site kernels compiles anything, whatever changes at run time.

A representative part of all kinds of sites, so that the file takes about a minute: every op family alone, some pairs,
and all together at one width; the widths with one and with all families; other dtypes and norms with all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Clamp, Monitor, Runtime, Steering, SteerSpec, steer_backend, torch_compat
from steer_compile.runtime.tables import TableSet
from tests import _models, _tree
from tests.kernels.site_plans import CLAMPS, ROWS, Setup, run_args, run_time_calls, tables_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]

COUNTS = (1, 16, 17, 256, 257, 4096)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAMILY_SETS = (
    ("capture",), ("add",), ("tier",), ("monitor",), ("row_monitor",), ("clamp",),
    ("branch", "add"), ("branch", "capture"), ("add", "clamp"), ("tier", "monitor"),
)  # fmt: skip
SETUPS = {
    **{"+".join(families): Setup(families) for families in FAMILY_SETS},
    **{f"add {width}": Setup(("branch", "add"), width) for width in (1000, 2048, 7168, 20480)},
    **{f"all {width}": Setup(width=width) for width in (17, 64, 1000, 2048, 7168, 20480)},
    "fp32": Setup(width=1000, dtype=FP32, table=FP32, weight=FP32),
    "fp16 beside fp32": Setup(width=1000, dtype=FP16, table=FP32, norm="rms_wide", weight=FP16),
    "bf16 beside fp32": Setup(width=1000, table=FP32, norm="layer", weight=FP32, bias=FP32),
    "no weight": Setup(norm="layer", weight=None),
}
SHAPES = ((1, 1), (2, 8), (10, 29))
HOOKS = ("post_attn", "post_block")
OPS = ("add", "tier", "monitor", "row_monitor", "clamp")


def cached_files() -> set[Path]:
    """What Triton's cache on disk holds, by this process and by Inductor's workers."""
    return set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*"))


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Fails where Triton compiles a kernel, or loads one from its cache on disk."""
    import triton

    from steer_compile.kernels.site_warmup import _compiled

    events: list[tuple[str, bool]] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        events.append((src.name, cache_hit))

    before, files, old = _compiled(), cached_files(), triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listener
    try:
        yield
        torch.cuda.synchronize()
    finally:
        triton.knobs.compilation.listener = old
    assert events == []
    assert _compiled() == before
    assert cached_files() == files


def fill(tables: TableSet) -> None:
    """Something other than zeros in every table, with gates that are half open."""
    generator = torch.Generator().manual_seed(3)
    for bank, tensor in zip(tables.banks, tables.tensors, strict=True):
        if bank.kind != "capture":
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    tables.rows.copy_(torch.randint(0, 3 + ROWS, tables.rows.shape, generator=generator, dtype=torch.int32))
    tables.gain.fill_(1.5)
    tables.decode.fill_(1.0)
    tables.scale.fill_(0.5)


@pytest.mark.behaviour(79)
@pytest.mark.parametrize("name", SETUPS)
def test_no_call_after_the_warm_up_compiles(name: str) -> None:
    from steer_compile.kernels.site import launch
    from steer_compile.kernels.site_warmup import warm_up

    setup, device = SETUPS[name], torch.device("cuda", torch.cuda.current_device())
    assert warm_up(setup.plan(), setup.weights(), device) <= 4  # for few tokens and many, as called and as traced
    assert warm_up(setup.plan(), setup.weights(), device) == 0
    with nothing_compiles():
        for neutral in run_time_calls(setup, COUNTS, "cuda"):
            launch(neutral)
    plan = setup.plan()
    tables = tables_of(plan, "cuda")
    fill(tables)
    with nothing_compiles():
        for edit in plan.edits:
            for tokens in COUNTS:
                launch(run_args(setup, plan, tables, edit, tokens))


def test_the_check_notices_a_compilation() -> None:
    from steer_compile.kernels.site import launch

    other = Setup(("branch", "add"), 136, max_tokens=16)  # a width that nothing else here has
    with pytest.raises(AssertionError), nothing_compiles():
        launch(next(run_time_calls(other, (16,), "cuda")))


def changes(runtime: Runtime, width: int) -> Iterator[None]:
    """One state of the runtime after another, each different in what is active."""
    vector, probe = torch.linspace(-1, 1, width), torch.ones(width) / width**0.5
    sites = [(hook, n) for hook in HOOKS for n in range(_models.LAYERS)]
    yield
    for scale in (0.5, 2.0):
        with runtime.steer({site: vector for site in sites}, scale=scale):
            yield
    runtime.set_tier({sites[1]: vector}, gain=2.0)
    yield
    runtime.set_monitor(sites[1], probe, 0.5, 4.0, gate_rows=True)
    yield
    row = Steering(
        {sites[0]: vector}, monitors={sites[0]: Monitor(probe, 0.1)}, clamps={sites[2]: [Clamp(probe, value=0.0)]}
    )
    handle = runtime.register(row)
    runtime.assign(handle)
    yield
    runtime.set_scale(handle, -1.0)
    yield
    runtime.assign(None)
    runtime.release(handle)
    runtime.set_monitor(sites[1], None)
    runtime.set_tier()
    yield


def steered(inner: Any, **options: Any) -> tuple[Any, Callable[[int, int], None]]:
    """A backend with everything compiled in, and a call of the model that it compiles."""
    model = _models.llama(BF16).cuda().requires_grad_(False)
    spec = SteerSpec(
        steer=HOOKS, capture=("post_block",), ops=OPS, rows=8, clamps=CLAMPS, max_tokens=512, lowering="template"
    )
    backend = steer_backend(spec, inner=inner)
    compiled: Any = torch.compile(model, backend=backend, **options)

    def call(batch: int, length: int) -> None:
        ids = torch.arange(batch * length, device="cuda").view(batch, length) % _models.VOCAB
        with torch.no_grad():
            compiled(input_ids=ids, use_cache=False)

    return backend, call


def run_all(backend: Any, call: Callable[[int, int], None]) -> None:
    for _ in changes(backend.runtime, _models.WIDTH):
        for shape in SHAPES:
            call(*shape)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_backend_warms_up_what_inductor_does_not_compile(inner: str) -> None:
    from steer_compile.kernels.site_warmup import _compiled

    seen: list[int] = []

    def watched(gm: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        seen.append(_compiled())
        return torch_compat.named_backend(inner)(gm, inputs, **options)

    backend, call = steered(watched)
    call(*SHAPES[1])
    assert {edit.lowering for edit in backend.plans[0].edits} == {"template"}
    assert _compiled() == seen[0]  # all was there before the graph ran
    assert backend.warm_up() == 0
    with nothing_compiles():
        run_all(backend, call)  # new graphs for other shapes, but no new kernels


def test_inductor_compiles_the_kernels_with_the_graph() -> None:
    backend, call = steered("inductor", dynamic=False)
    for shape in SHAPES:
        call(*shape)
    graphs = torch_compat.compile_count()
    assert backend.warm_up() == 0
    with nothing_compiles():
        run_all(backend, call)
    assert torch_compat.compile_count() == graphs


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(_tree.ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.gpu.warm_process"]
    runs = []
    for _ in range(2):
        run = subprocess.run(command, env=env, cwd=_tree.ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    assert runs == [{"made": 12, "compiled": 6, "loaded": 6}, {"made": 12, "compiled": 0, "loaded": 12}]
