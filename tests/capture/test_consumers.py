"""Consumers by name, and those that keep rows elsewhere than in safetensors files."""

from __future__ import annotations

import logging
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

from steer_compile.capture.consumer import BUILT_IN, GROUP, Began, Consumer, Ended, consumer_names, make_consumer
from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.read import published, read
from steer_compile.errors import CaptureError, SpecError, UnknownName
from tests import _tree
from tests.capture._rows import KEYS, META, assert_rows, feed, rows


def test_the_metadata_names_every_consumer() -> None:
    project = tomllib.loads((_tree.ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == BUILT_IN
    assert set(BUILT_IN) <= set(consumer_names())


def test_an_unknown_consumer() -> None:
    with pytest.raises(
        UnknownName,
        match="no capture consumer is named 'kafka'; there are callback, files, log, memory, parquet; a package",
    ):
        make_consumer("kafka")
    with pytest.raises(SpecError, match=r"'files' does not take these options: .*'folder'; it takes \(root"):
        make_consumer("files", root="x", folder="x")


def test_consumers_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = [
        f"[{GROUP}]",
        "counting = capture_others:Counting",
        "odd = capture_others:odd",
        "memory = capture_others:odd",
    ]
    (info / "entry_points.txt").write_text("\n".join(points))
    (tmp_path / "capture_others.py").write_text(
        "from steer_compile.capture.consumer import Consumer\n"
        "class Counting(Consumer):\n"
        "    def __init__(self, start=0):\n"
        "        self.count = start\n"
        "    def rows(self, rows):\n"
        "        self.count += len(rows)\n"
        "    def ended(self, end):\n"
        "        return str(self.count)\n"
        "def odd():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"counting", "odd", "memory"} <= set(consumer_names())
    made = make_consumer("counting", start=2)
    assert feed(made, rows([("a", 0, 3)])) == {"a": "5"}
    assert isinstance(make_consumer("memory"), MemoryConsumer)
    with pytest.raises(SpecError, match="the capture consumer 'odd' is a int; subclass Consumer"):
        make_consumer("odd")
    sys.modules.pop("capture_others")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_gives_tensors_arrays_and_tables() -> None:
    memory = MemoryConsumer()
    feed(memory, rows([("a", 0, 2), ("b", 0, 1)], 0, torch.bfloat16), rows([("a", 2, 3)], 1, torch.bfloat16))
    assert memory.requests == ["a", "b"]
    assert_rows(memory.get("a"), "a", range(3), torch.bfloat16)
    tensors, arrays, frame = memory.tensors("a"), memory.arrays("a"), memory.frame("a")
    assert list(tensors) == ["positions", "token_ids", "steps", *KEYS]
    assert arrays[KEYS[0]].dtype == np.float32
    assert np.array_equal(arrays[KEYS[0]], tensors[KEYS[0]].float().numpy())
    assert list(frame.columns) == ["request", "position", "token_id", "step", *KEYS]
    assert frame["position"].tolist() == [0, 1, 2]
    assert np.array_equal(np.stack(frame[KEYS[1]].tolist()), arrays[KEYS[1]])
    held = memory.nbytes
    assert len(memory.take("a")) == 3
    assert memory.nbytes < held
    with pytest.raises(UnknownName, match="no captured request 'a' has ended and is here; there are b"):
        memory.get("a")


def test_memory_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryConsumer()
    feed(memory, rows([("a", 0, 2)]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CaptureError, match=r"frame needs pandas .* install steer-compile\[capture\], or use arrays"):
        memory.frame("a")


def test_memory_keeps_within_its_bound() -> None:
    size = rows([("a", 0, 4)]).nbytes
    memory = MemoryConsumer(max_bytes=3 * size)
    for name in "abcde":
        feed(memory, rows([(name, 0, 4)]))
        assert memory.nbytes <= 3 * size
    assert (memory.requests, memory.evicted) == (["c", "d", "e"], 2)
    memory.began(Began("f"))
    memory.began(Began("g"))
    memory.rows(rows([("f", 0, 13), ("g", 0, 1)]))
    with pytest.raises(CaptureError, match=f"more than max_bytes={3 * size}; raise it, or take rows earlier"):
        memory.ended(Ended("f"))
    memory.ended(Ended("g"))
    assert memory.nbytes == rows([("g", 0, 1)]).nbytes
    memory.began(Began("h"))
    memory.rows(rows([("h", 0, 1)]))
    memory.forget("h")
    feed(memory, rows([("g", 0, 1)]))
    assert memory.nbytes == rows([("g", 0, 1)]).nbytes
    with pytest.raises(CaptureError, match="max_bytes=0 is no size"):
        MemoryConsumer(0)


# -- log and callback -------------------------------------------------------------------------------------------------


def test_log_says_what_came(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = make_consumer("log")
    feed(made, rows([("a", 0, 2), ("b", 0, 1)]), rows([("a", 2, 3)], 1), tag="t", dropped=1)
    norm = float(rows([("a", 0, 3)]).values[KEYS[0]].norm(dim=1).mean())
    (line,) = [record.getMessage() for record in caplog.records if "'a'" in record.getMessage()]
    assert line.startswith("captured 'a' (tag 't'): 3 rows, ")
    assert f"1 dropped; mean norms: {KEYS[0]} {norm:.4g}, " in line
    made.forget("nobody")
    with pytest.raises(CaptureError, match="level='LOUD' is no level of logging; choose one of CRITICAL"):
        make_consumer("log", level="LOUD")


def test_callback_calls() -> None:
    seen: list[object] = []
    made = make_consumer(
        "callback", on_rows=lambda rows: seen.append(len(rows)), on_ended=lambda end: f"at {end.request}"
    )
    assert feed(made, rows([("a", 0, 2)])) == {"a": "at a"}
    assert seen == [2]
    assert feed(make_consumer("callback", on_rows=seen.append), rows([("a", 0, 2)])) == {"a": None}


# -- parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_parquet_keeps_every_value(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make_consumer("parquet", root=tmp_path, group_bytes=300, part_bytes=1200)
    parts = [rows([("a", 0, 30), ("b", 0, 4)], 0, dtype), rows([("b", 4, 5), ("a", 30, 31)], 1, dtype)]
    kept = feed(made, *parts, tag="../t", dropped=2)
    made.close()
    found = read(tmp_path)
    assert_rows(found.rows, "a", range(31), dtype)
    assert_rows(found.rows, "b", range(5), dtype)
    info = found.requests["a"]
    assert (info.rows, info.dropped, info.tag, info.model, info.ended) == (31, 2, "../t", "model", True)
    files = published(tmp_path)
    assert len(files) > 1
    assert pq.ParquetFile(files[0]).metadata.num_row_groups > 1
    for place in kept.values():
        assert isinstance(place, Future)
        assert {Path(path) for path in place.result(0).splitlines()} <= set(files)


def test_parquet_is_an_arrow_dataset(tmp_path: Path) -> None:
    made = make_consumer("parquet", root=tmp_path)
    feed(made, rows([("a", 0, 3)], 0, torch.bfloat16), tag="t")
    feed(made, rows([("b", 0, 2)], 0, torch.bfloat16), tag="t")
    made.close()
    table = pyarrow.dataset.dataset(tmp_path, format="parquet").to_table()
    assert table.column_names == ["request", "number", "tag", "position", "token_id", "step", *KEYS]
    assert table["request"].to_pylist() == ["a"] * 3 + ["b"] * 2
    assert table["tag"].to_pylist() == ["t"] * 5
    assert table["token_id"].to_pylist() == [1, 3, 5, 1, 3]
    assert table[KEYS[0]].to_pylist()[1] == rows([("a", 1, 2)]).values[KEYS[0]][0].tolist()
    assert list(read(tmp_path, keys=KEYS[1:]).rows.values) == [KEYS[1]]
    bits = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    bits = bits[~bits.isnan()].view(-1, 2)
    part = rows([("n", 0, bits.size(0))], width=2, keys=KEYS[:1])
    part.values[KEYS[0]] = bits  # type: ignore[index]
    bare = make_consumer("parquet", root=tmp_path / "bits", compression="none")
    feed(bare, part)
    bare.close()
    assert torch.equal(read(tmp_path / "bits").rows.values[KEYS[0]].view(torch.int16), bits.view(torch.int16))


def test_what_parquet_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_consumer("parquet", root=tmp_path)
    made.began(Began("a"))
    with pytest.raises(CaptureError, match="has dtype torch.float8_e4m3fn, which parquet does not hold; use the files"):
        made.rows(rows([("a", 0, 2)], 0, torch.float8_e4m3fn))
    made.forget("a")
    made.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(CaptureError, match="cannot be read as captured rows"):
        read(tmp_path)
    pq.write_table(pyarrow.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(CaptureError, match="cannot be read as captured rows"):
        read(tmp_path)
    with pytest.raises(CaptureError, match="are sizes"):
        make_consumer("parquet", root=tmp_path, group_bytes=0)
    monkeypatch.delitem(sys.modules, "steer_compile.capture.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CaptureError, match=r"parquet needs pyarrow .* install steer-compile\[capture\]"):
        make_consumer("parquet", root=tmp_path)
    with pytest.raises(CaptureError, match="needs pyarrow"):
        read(tmp_path)


@pytest.mark.parametrize("policy", ["error", "suffix", "replace"])
def test_names_of_parquet_files(tmp_path: Path, policy: str) -> None:
    for i in range(2):
        made = make_consumer("parquet", root=tmp_path, collisions=policy)
        kept = feed(made, rows([(f"r{i}", 0, 1)]))[f"r{i}"]
        assert isinstance(kept, Future)
        if policy == "error" and i:
            with pytest.raises(CaptureError, match=r"rows-00000\.parquet is there already"):
                made.close()
            with pytest.raises(CaptureError):
                kept.result(0)
        else:
            made.close()
    assert list(read(tmp_path).requests) == {"error": ["r0"], "suffix": ["r0", "r1"], "replace": ["r1"]}[policy]
    assert len(list(tmp_path.iterdir())) == (2 if policy == "suffix" else 1)


def test_rows_of_requests_in_any_order() -> None:
    memory = MemoryConsumer()
    mixed = rows([("a", 0, 3), ("b", 0, 2), ("c", 0, 0)], 0, torch.bfloat16).take(torch.tensor([3, 0, 4, 1, 2]))
    feed(memory, mixed)
    assert_rows(memory.get("a"), "a", range(3), torch.bfloat16)
    assert_rows(memory.get("b"), "b", range(2), torch.bfloat16)
    with pytest.raises(CaptureError, match="no captured rows to join"):
        memory.get("c")
    assert memory.nbytes == sum(memory.get(name).nbytes for name in "ab")


# -- what all have in common ------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[Path], Consumer]] = {
    "memory": lambda root: make_consumer("memory"),
    "per_file": lambda root: make_consumer("files", root=root),
    "packed": lambda root: make_consumer("files", root=root, layout="packed"),
    "sharded": lambda root: make_consumer("files", root=root, layout="sharded"),
    "parquet": lambda root: make_consumer("parquet", root=root),
    "log": lambda root: make_consumer("log"),
    "callback": lambda root: make_consumer("callback", on_rows=lambda rows: None),
}


@pytest.mark.parametrize("name", ALL)
def test_requests_that_are_forgotten_leave_nothing(tmp_path: Path, name: str) -> None:
    made = ALL[name](tmp_path)
    made.began(Began("a", "", META))
    made.rows(rows([("a", 0, 2)]))
    made.forget("a")
    made.forget("never there")
    made.flush()
    kept: Any = feed(made, rows([("a", 0, 3)]))["a"]
    made.close()
    if isinstance(kept, Future):
        kept.result(0)
    if list(tmp_path.iterdir()):
        found = read(tmp_path)
        assert found.requests["a"].complete
        assert found.rows.positions.tolist()[-3:] == [0, 1, 2]
