"""Models with parallel residual streams: captures and steering equal forward hooks of the eager model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Clamp, Monitor, SteerSpec, TokenSelection, every_stream, one_stream, steer_backend
from steer_compile.capture.consumers.files import files
from steer_compile.capture.pipeline import Pipeline
from steer_compile.capture.plain import capture_to
from steer_compile.capture.read import read
from steer_compile.errors import SiteNotFound, SpecError, VectorError
from tests import _models
from tests._models import compiled
from tests._streams import (
    HOOKS,
    LAYERS,
    MODELS,
    STREAMS,
    WEIGHTS,
    WIDTH,
    Site,
    direction,
    hooked,
    logits,
    tokens,
    watched,
)

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
WIDE = STREAMS * WIDTH


def width_of(hook: str) -> int:
    return WIDE if hook.startswith("mhc_streams") else WIDTH


def sites_of(name: str, hooks: tuple[str, ...] = HOOKS) -> list[Site]:
    last = [("mhc_streams_final", LAYERS - 1)] if "mhc_streams_final" in hooks else []
    kept = [h for h in hooks if h != "mhc_streams_final" and not (h.endswith("res_mix") and name == "qwen4_exp")]
    return [(hook, layer) for hook in kept for layer in range(LAYERS)] + last


def close(got: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_captures_are_bit_for_bit_what_forward_hooks_see(name: str) -> None:
    model, ids = MODELS[name](), tokens()
    sites = sites_of(name, (*HOOKS, *WEIGHTS))
    backend = steer_backend(SteerSpec(capture=tuple({hook: 0 for hook, _ in sites}), max_tokens=32), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    expected, seen = watched(name, model, ids)
    with backend.runtime.capture() as log:
        assert torch.equal(logits(run, ids), expected)
    assert set(log) == set(sites) == set(seen)
    for site, value in seen.items():
        assert torch.equal(log[site], value), site
    mixes = [site for site in sites if site[0] in WEIGHTS]
    assert {log[site].dtype for site in mixes} == {torch.float32}
    assert {log[site].size(-1) for site in mixes} == ({4} if name == "qwen4_exp" else {4, 16})


def test_the_map_of_the_streams_is_doubly_stochastic_and_remakes_the_next_streams() -> None:
    """What is captured is enough to compute the streams behind the attention from those in front of it."""
    model, ids = MODELS["deepseek_v4"](), tokens()
    hooks = ("mhc_streams_pre_attn", "mhc_streams_pre_mlp", "post_attn", "mhc_attn_post_mix", "mhc_attn_res_mix")
    backend = steer_backend(SteerSpec(capture=hooks, max_tokens=32), inner="eager")
    run = compiled(model, backend)
    with backend.runtime.capture() as log:
        logits(run, ids)
    for layer in range(LAYERS):
        before, after = (log[hook, layer].unflatten(-1, (STREAMS, WIDTH)) for hook in hooks[:2])
        mix = log["mhc_attn_res_mix", layer].unflatten(-1, (STREAMS, STREAMS))
        close(mix.sum(-1), torch.ones(mix.shape[:-1]), 1e-2)  # the columns are normalised last
        close(mix.sum(-2), torch.ones(mix.shape[:-1]), 1e-3)
        placed = log["mhc_attn_post_mix", layer].unsqueeze(-1) * log["post_attn", layer].unsqueeze(-2)
        close(torch.einsum("btjk,btjh->btkh", mix, before) + placed, after)


@pytest.mark.parametrize("name", MODELS)
def test_steering_equals_forward_hooks_at_every_hook(name: str) -> None:
    model, ids = MODELS[name](), tokens()
    backend = steer_backend(SteerSpec(steer=HOOKS, max_tokens=32), inner="eager")
    run = compiled(model, backend, fullgraph=True)
    plain = logits(model, ids)
    assert torch.equal(logits(run, ids), plain)
    for i, site in enumerate(sites_of(name)):
        if site[1] != LAYERS - 1 - i % 2:  # the next test has all of them, at once
            continue
        vector = direction(i, width_of(site[0]))
        with hooked(name, model, lambda at, value: value + vector if at == site else value):  # noqa: B023
            expected = logits(model, ids)
        with backend.runtime.steer({site: vector}):
            got = logits(run, ids)
        close(got, expected)
        assert not torch.allclose(got, plain, atol=1e-2), site
    assert torch.equal(logits(run, ids), plain)
    assert len(backend.plans) == 1


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_edits_at_all_hooks_at_once_with_captures_in_front_of_them(inner: str) -> None:
    name, ids = "deepseek_v4", tokens()
    model = MODELS[name]()
    backend = steer_backend(SteerSpec(steer=HOOKS, capture=(*HOOKS, *WEIGHTS), max_tokens=32), inner=inner)
    run = compiled(model, backend)
    vectors = {site: direction(i, width_of(site[0]), 0.3) for i, site in enumerate(sites_of(name))}
    seen: dict[Site, Tensor] = {}

    def edit(site: Site, value: Tensor) -> Tensor:
        seen[site] = value.flatten(2).clone()
        return value + vectors[site] if site in vectors else value

    with hooked(name, model, edit):
        expected = logits(model, ids)
    with backend.runtime.steer(vectors), backend.runtime.capture() as log:
        close(logits(run, ids), expected, 2e-3)
    for site, value in seen.items():
        # A chunk of the row's own sum differs in its last bits, and the sort of experts is by close numbers.
        close(log[site], value, 2e-3)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("deepseek_v4", "mhc_streams_pre_attn"),
        ("deepseek_v4", "mhc_streams_final"),
        ("qwen4_exp", "mhc_streams_pre_mlp"),
    ],
)
def test_a_vector_of_one_stream_changes_that_stream_alone(name: str, hook: str) -> None:
    model, ids = MODELS[name](), tokens()
    layer = LAYERS - 1 if hook == "mhc_streams_final" else 1
    backend = steer_backend(
        SteerSpec(steer=(hook,), capture=HOOKS[:3], max_tokens=32, placement="before_norm"), inner="eager"
    )
    run = compiled(model, backend)
    vector = direction(5, WIDTH, 3.0)
    with backend.runtime.capture() as log:
        plain = logits(run, ids)
    before = {site: log[site].clone() for site in log}
    results = []
    for stream in range(STREAMS):

        def edit(site: Site, value: Tensor, at: int = stream) -> Tensor:
            if site != (hook, layer):
                return value
            lines = value.unflatten(-1, (STREAMS, WIDTH)).clone()
            lines[..., at, :] += vector
            flat: Tensor = lines.flatten(2)
            return flat

        with hooked(name, model, edit):
            expected = logits(model, ids)
        with (
            backend.runtime.steer({(hook, layer): one_stream(vector, stream, STREAMS)}),
            backend.runtime.capture() as log,
        ):
            results.append(logits(run, ids))
        close(results[-1], expected)
        for site in log:  # nothing in front of the steer moves
            earlier = site[1] < layer or (site[1] == layer and HOOKS.index(site[0]) <= HOOKS.index(hook))
            assert torch.equal(log[site], before[site]) == earlier, site
    for i, one in enumerate(results):
        assert not torch.allclose(one, plain, atol=1e-3)
        assert all(not torch.allclose(one, other, atol=1e-3) for other in results[:i])


def test_streams_keep_apart_where_nothing_mixes_them() -> None:
    """In a model whose streams are kept, one stream's vector is found in that stream behind the block and no other."""
    model, ids = MODELS["qwen4_exp"](), tokens()
    for layer in model.model.layers:  # each branch is placed on all streams with the weight 1
        for part in (layer.attn_hyper_connection, layer.mlp_hyper_connection):
            part.block_inject_weight.weight.data.zero_()
    backend = steer_backend(SteerSpec(steer=HOOKS[:1], capture=HOOKS[:3], max_tokens=32), inner="eager")
    run = compiled(model, backend)
    with backend.runtime.capture() as log:
        logits(run, ids)
    before = log["mhc_streams_pre_mlp", 1].unflatten(-1, (STREAMS, WIDTH)).clone()
    vector = direction(3, WIDTH)
    with (
        backend.runtime.steer({("mhc_streams_pre_attn", 1): one_stream(vector, 2, STREAMS)}),
        backend.runtime.capture() as log,
    ):
        logits(run, ids)
    moved = log["mhc_streams_pre_mlp", 1].unflatten(-1, (STREAMS, WIDTH)) - before
    shared = moved[..., 0, :]  # what the branch, which reads all streams, places on each of them alike
    for stream in range(STREAMS):
        close(moved[..., stream, :] - shared, vector.expand_as(shared) * (stream == 2), 1e-4)


def test_a_vector_on_every_stream_is_the_flat_one() -> None:
    model, ids = MODELS["deepseek_v4"](), tokens()
    backend = steer_backend(SteerSpec(steer=HOOKS[:1], max_tokens=32), inner="eager")
    run = compiled(model, backend)
    vector = direction(8, WIDTH)
    site = ("mhc_streams_pre_attn", 1)
    results = []
    for given in (every_stream(vector, STREAMS), vector.repeat(STREAMS), vector.expand(STREAMS, WIDTH)):
        with backend.runtime.steer({site: given}):
            results.append(logits(run, ids))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], logits(run, ids), atol=1e-2)


@pytest.mark.parametrize(("lowering", "stream"), [("compiler", None), ("template", 1)])
def test_a_monitor_reads_one_stream_or_all_and_gates_the_rows(
    lowering: str, stream: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer_compile.passes import lower_edits

    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))  # where the template runs its reference
    name, ids, site = "deepseek_v4", tokens(1, 6), ("mhc_streams_pre_mlp", 1)
    model = MODELS[name]()
    backend = steer_backend(
        SteerSpec(steer=(site[0],), ops=("add", "row_monitor", "clamp"), capture=(site[0],), max_tokens=32, clamps=1,
                  lowering=lowering),
        inner="eager",
    )  # fmt: skip
    run = compiled(model, backend)
    assert torch.equal(logits(run, ids), logits(model, ids))
    assert {edit.lowering for plan in backend.plans for edit in plan.edits} == {lowering}
    probe, vector = direction(1, WIDTH if stream is not None else WIDE), direction(2, WIDE)
    wide = probe if stream is None else one_stream(probe, stream, STREAMS)
    unit = wide / wide.norm()
    with backend.runtime.capture() as log:
        logits(run, ids)
    score = log[site] @ wide
    ordered = score.flatten().sort().values
    middle = float(ordered[2:4].mean())  # between two tokens: at one of them rounding would decide
    bound = float((log[site] @ unit).median())

    def edit(at: Site, value: Tensor) -> Tensor:
        if at != site:
            return value
        value = value + vector * ((value @ wide) > middle).unsqueeze(-1)
        dot = value @ unit
        pull: Tensor = (dot.clamp(max=bound) - dot).unsqueeze(-1) * unit
        return value + pull

    with hooked(name, model, edit):
        expected = logits(model, ids)
    given: Any = {
        "vectors": {site: vector},
        "monitors": {site: Monitor(wide, threshold=middle, kind="step")},
        "clamps": {site: Clamp(wide, hi=bound)},
    }
    close(run_steered(backend, run, ids, given), expected)


def run_steered(backend: Any, run: Any, ids: Tensor, given: dict[str, Any]) -> Tensor:
    with backend.runtime.steer(given["vectors"], monitors=given["monitors"], clamps=given["clamps"], phase="decode"):
        return logits(run, ids)


@pytest.mark.parametrize(("layout", "capture_rows"), [("per_file", 0), ("packed", 24)])
def test_one_file_mixes_streams_of_bf16_and_weights_of_fp32(tmp_path: Path, layout: str, capture_rows: int) -> None:
    """Each value has its own shape of a row and dtype, and every row its position."""
    model, ids = MODELS["deepseek_v4"]().bfloat16(), tokens()
    hooks = ("mhc_streams_pre_attn", "mhc_attn_res_mix", "mhc_attn_post_mix", "post_attn")
    backend = steer_backend(SteerSpec(capture=hooks, capture_rows=capture_rows, max_tokens=32), inner="eager")
    run = compiled(model, backend)
    seen = watched("deepseek_v4", model, ids)[1]
    some = TokenSelection(((2, 5),))
    with Pipeline({"disk": files(tmp_path, layout=layout)}) as pipeline:
        with capture_to(backend.runtime, pipeline, ["x", "y"], tokens=[some, TokenSelection(((0, None),))]):
            logits(run, ids)
        pipeline.close()
    found = [read(tmp_path, request=name).rows for name in "xy"]
    sidecar = json.loads(next(path for path in sorted(tmp_path.glob("**/*.json"))).read_text())
    described = {name: (site["dtype"], site["row_shape"]) for name, site in sidecar["sites"].items()}
    for hook, dtype, shape in (
        (hooks[0], torch.bfloat16, (STREAMS, WIDTH)),
        (hooks[1], torch.float32, (STREAMS, STREAMS)),
        (hooks[2], torch.float32, (STREAMS,)),
        (hooks[3], torch.bfloat16, (WIDTH,)),
    ):
        for layer in range(LAYERS):
            name, whole = f"layers.{layer}.{hook}", seen[hook, layer]
            assert described[name] == ({torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], list(shape))
            for b, at in enumerate((range(2, 5), range(ids.size(1)))):
                rows = found[b]
                assert rows.positions.tolist() == list(at)
                assert rows.values[name].dtype == dtype
                assert torch.equal(rows.values[name], whole[b, list(at)].view(len(at), *shape))


def test_a_hook_of_one_stream_says_what_to_use() -> None:
    run = compiled(MODELS["deepseek_v4"](), steer_backend(SteerSpec(steer=("post_block",)), inner="eager"))
    with pytest.raises(Exception, match="4 parallel streams.*use mhc_streams_pre_attn"):
        logits(run, tokens())


@pytest.mark.parametrize("hook", ["mhc_streams_pre_attn", "mhc_streams_final", "mhc_ffn_res_mix"])
def test_on_a_model_with_one_stream_the_hooks_say_so(hook: str) -> None:
    run = compiled(_models.llama(), steer_backend(SteerSpec(capture=(hook,)), inner="eager"))
    with pytest.raises(Exception, match="one residual stream, and this hook is of parallel ones"):
        _models.logits(run, _models.tokens())


def test_streams_that_are_kept_have_no_map() -> None:
    run = compiled(MODELS["qwen4_exp"](), steer_backend(SteerSpec(capture=("mhc_attn_res_mix",)), inner="eager"))
    with pytest.raises(Exception, match="each stream is kept as it is, so there is no map"):
        logits(run, tokens())


@pytest.mark.parametrize("hook", WEIGHTS)
def test_weights_are_not_steered(hook: str) -> None:
    with pytest.raises(SpecError, match=f"{hook}.*captured only"):
        SteerSpec(steer=(hook,))


def test_vectors_of_another_form_are_refused_and_nothing_changes() -> None:
    model, ids = MODELS["deepseek_v4"](), tokens()
    backend = steer_backend(SteerSpec(steer=HOOKS, max_tokens=32), inner="eager")
    run = compiled(model, backend)
    plain = logits(run, ids)
    for vectors, error, text in (
        (
            {("mhc_streams_pre_attn", 1): direction(1, WIDTH)},
            VectorError,
            f"has {WIDTH} numbers but the site is {WIDE}",
        ),
        ({("mhc_streams_pre_attn", 1): torch.ones(2, WIDTH)}, VectorError, f"has {2 * WIDTH} numbers but the site"),
        ({("pre_attn", 1): torch.ones(WIDE)}, VectorError, f"has {WIDE} numbers but the site is {WIDTH}"),
        ({("pre_attn", 1): torch.ones(1, WIDTH)}, VectorError, "one dimension"),
        ({("mhc_streams_final", 0): torch.ones(WIDE)}, SiteNotFound, "layers.0.mhc_streams_final"),
    ):
        with pytest.raises(error, match=text), backend.runtime.steer(vectors):
            pass
    for stream, streams in ((4, 4), (-1, 4), (True, 4), (0, 0), (0, 1.5)):
        with pytest.raises(VectorError, match="stream"):
            one_stream(direction(1, WIDTH), stream, streams)  # type: ignore[arg-type]
    assert torch.equal(logits(run, ids), plain)
