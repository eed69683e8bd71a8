"""A request's steering as plain data: what is read, what is refused, and that it survives the way to the engine."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import Clamp, Monitor, SteerSpec
from steer_compile.errors import SiteNotFound, SpecError, SteerError, TableFull, VectorError
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape
from steer_compile.vllm.requests import parse
from steer_compile.vllm.settings import Settings, build, cli_config, engine_args
from steer_compile.vllm.transport import received, sent

WIDTH = 8
OPS = ("add", "row_monitor", "clamp")


def front(rows: int = 4, **options: Any) -> FrontEnd:
    spec = SteerSpec(steer=("post_block",), rows=rows, ops=OPS, dtype="float16", **options)
    return FrontEnd(Settings(spec), Shape(WIDTH, torch.float16, range(4), 4))


def crossed(data: Any) -> Any:
    """What arrives of plain data; anything else does not cross processes."""
    if isinstance(data, dict):
        return {str(key): crossed(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [crossed(item) for item in data]
    assert data is None or isinstance(data, bool | int | float | str | bytes)
    return data


def test_steering_survives_the_way_to_the_engine() -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    config = Steering(
        base={"post_block": {3: vector}}, prefill={"post_block": {0: -vector}}, named=("calm", ("sad", -0.5)),
        scale=2.0,         tokens=TokenSelection(((0, 5), (-3, None)), last_prompt=True),
        monitors={("post_block", 1): Monitor(vector, 0.5)},
        clamps={("post_block", 2): [Clamp(vector, lo=-1.0), Clamp(vector, value=0.0)]},
    )  # fmt: skip
    made = {
        phase: Contents(((config.base, 2.0), (config.tier(phase), 1.0)), config.monitors, config.clamps)
        for phase in ("prefill", "decode")
    }
    data = sent(made, config.tokens)
    assert received(crossed(data)) == (made, config.tokens)
    alike = {phase: Contents(((config.base, 1.0),)) for phase in ("prefill", "decode")}
    assert len(sent(alike, None)["contents"]) == 1
    assert received(sent({"prefill": Contents(), "decode": alike["decode"]}, None))[0]["prefill"] == Contents()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_vectors(dtype: torch.dtype) -> None:
    vector = torch.linspace(-1, 1, WIDTH).to(dtype)
    data = base64.b64encode(vector.view(torch.uint8).numpy().tobytes()).decode()
    packed = {"dtype": str(dtype).removeprefix("torch."), "shape": [WIDTH], "data": data}
    given_as = [
        {"post_block": {"1": packed}},
        {"layers.1.post_block": packed},
        {"layers.1.post_block": vector.tolist()},
    ]
    assert len({parse(json.dumps({"base": item})).base.digest for item in given_as}) == 1


BAD: dict[str, tuple[Any, type[SteerError]]] = {
    "list": ([], SpecError),
    "text": ("{", SpecError),
    "field": ({"vectors": {}}, SpecError),
    "named": ({"named": 3}, SpecError),
    "factor": ({"named": [["calm", "much"]]}, VectorError),
    "dtype": ({"base": {"post_block": {"1": {"dtype": "int8", "shape": [1], "data": ""}}}}, VectorError),
    "shape": ({"base": {"post_block": {"1": {"dtype": "float32", "shape": [1, 2], "data": ""}}}}, VectorError),
    "huge": ({"base": {"post_block": {"1": {"dtype": "float32", "shape": [1 << 40], "data": ""}}}}, VectorError),
    "monitor": ({"monitors": {"layers.1.post_block": {"threshold": 1}}}, SpecError),
    "clamp": ({"clamps": {"layers.1.post_block": {"direction": [1.0]}}}, SpecError),
    "clamp field": ({"clamps": {"layers.1.post_block": [{"direction": [1.0], "low": 1}]}}, SpecError),
    "span": ({"tokens": {"spans": [[0, 1, 2]]}}, SpecError),
    "deep": ("[" * 100_000, SpecError),
    "digits": ("1" * 5000, SpecError),
    "layer of many digits": ({"base": {"post_block": {"9" * 5000: [1.0]}}}, SpecError),
    "site of many digits": ({"base": {"layers." + "9" * 5000 + ".post_block": [1.0]}}, SpecError),
    "dtype that is a list": ({"base": {"post_block": {"1": {"dtype": [], "shape": [1], "data": ""}}}}, VectorError),
    "too large for a float": ({"base": {"post_block": {"1": [1.0, 10**400]}}}, VectorError),
    "flag that is text": ({"tokens": {"generated": "false"}}, SpecError),
    "nothing": ({"tokens": {}}, SpecError),
    "many names": ({"named": ["calm"] * 17}, SpecError),
    "many spans": ({"tokens": {"spans": [[0, 1]] * 65}}, SpecError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    given_as, error = BAD[name]
    with pytest.raises(error):
        parse(given_as)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["base", "decode", "named", "scale", "tokens", "clamps", "monitors", "post_block", "1", "data",
                         "dtype", "shape", "layers.1.post_block", "direction", "lo", "probe", "spans"]),
        inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(JSON)
def test_no_data_raises_anything_else(data: Any) -> None:
    """What a client may send is either taken or refused by an error of the package."""
    try:
        front().checked(data)
    except SteerError:
        return


def test_the_front_end_knows_the_engines_sites_and_room() -> None:
    ones = [1.0] * WIDTH
    checked = front().checked({"decode": {"post_block": {"3": ones}}})
    assert checked.digests["prefill"] == "" != checked.digests["decode"]
    assert received(checked.data)[0]["decode"].parts
    with pytest.raises(SiteNotFound):
        front().checked({"base": {"post_block": {"4": ones}}})
    with pytest.raises(SiteNotFound):
        front().checked({"base": {"post_attn": {"1": ones}}})
    with pytest.raises(VectorError, match="8 wide"):
        front().checked({"base": {"post_block": {"1": [1.0]}}})
    with pytest.raises(VectorError, match="overflow"):
        front().checked({"base": {"post_block": {"1": [1e30] * WIDTH}}})
    with pytest.raises(TableFull):
        front(rows=1).checked({"base": {"post_block": {"1": ones}}})


@pytest.mark.behaviour(61)
def test_digests_tell_contents_and_tokens_apart() -> None:
    ones = [1.0] * WIDTH
    base = {"base": {"post_block": {"1": ones}}}
    seen = [front().checked(given_as).digests["prefill"] for given_as in (
        base, {**base, "scale": 2.0}, {**base, "tokens": {"last_prompt": True}},
        {**base, "clamps": {"layers.1.post_block": [{"direction": ones, "value": 0}]}},
    )]  # fmt: skip
    assert len(set(seen)) == 4
    assert front().checked(base).digests["prefill"] == seen[0]


def test_settings_are_read_as_they_are_written(tmp_path: Path) -> None:
    spec = SteerSpec(steer=("post_block",), rows=3, ops=OPS)
    written = engine_args(spec)["additional_config"]
    assert json.loads(cli_config(spec)) == written
    read = Settings.read(written, 77, torch.bfloat16)
    assert read is not None
    assert (read.spec.rows, read.spec.max_tokens, read.spec.dtype, read.spec.ops) == (3, 77, "bfloat16", OPS)
    assert Settings.read({}, 1, torch.float32) is None
    with pytest.raises(SpecError, match="plain data"):
        Settings.read({"steer_compile": spec}, 1, torch.float32)
    for what, part in (
        ("no capture_dir", {"capture": ["post_block"]}),
        ("'patch'", {"ops": ["add", "patch"]}),
        ("'score'", {"ops": ["monitor", "score"]}),
    ):
        with pytest.raises(SpecError, match=what):
            Settings.read({"steer_compile": {"steer": ["post_block"], **part}}, 1, torch.float32)
    packed = {"capture": ["post_block"], "capture_rows": 8, "capture_dir": str(tmp_path)}
    with pytest.raises(SpecError, match="capture_rows=8: captures of vLLM's requests are dense .* leave capture_rows"):
        Settings.read({"steer_compile": packed}, 1, torch.float32)
    with pytest.raises(SpecError, match="no file"):
        engine_args(spec, {"calm": "nowhere.safetensors"})
    assert build() == build() != ""


@pytest.mark.parametrize("hook", ["mhc_streams_pre_attn", "mhc_streams_final", "mhc_attn_res_mix"])
def test_parallel_streams_are_refused_with_the_reason(hook: str) -> None:
    steered = "steer" if "streams" in hook else "capture"
    with pytest.raises(SiteNotFound, match=f"{hook} is of parallel streams.*without a graph on GPUs.*plain PyTorch"):
        FrontEnd(Settings(SteerSpec(**{steered: (hook,)})), Shape(WIDTH, torch.float16, range(4), 4))  # type: ignore[arg-type]
