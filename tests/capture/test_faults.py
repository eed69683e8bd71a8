"""Disks that fill up, fail or are slow, and processes that are killed: no torn file ever has a final name."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from steer_compile.capture.atomic import Temporary, sweep
from steer_compile.capture.codec import Mapped
from steer_compile.capture.consumer import Consumer, make_consumer
from steer_compile.capture.pipeline import Limits, Pipeline
from steer_compile.capture.read import Sidecar, published, read
from steer_compile.errors import CaptureError
from tests.capture._gate import until
from tests.capture._rows import assert_rows, feed, rows, submit

KINDS: dict[str, Callable[[Path], Consumer]] = {
    "per_file": lambda root: make_consumer("files", root=root),
    "replaced": lambda root: make_consumer("files", root=root, collisions="replace"),
    "packed": lambda root: make_consumer("files", root=root, layout="packed"),
    "sharded": lambda root: make_consumer("files", root=root, layout="sharded", shard_bytes=400),
    "parquet": lambda root: make_consumer("parquet", root=root, part_bytes=400, group_bytes=200),
}
STEPS = [rows([("a", 0, 6), ("b", 0, 3)], 0), rows([("a", 6, 9), ("b", 3, 9)], 1)]


def capture(consumer: Consumer) -> dict[str, str]:
    """Two requests; what went wrong with each, "" for nothing."""
    outcome = dict.fromkeys("ab", "")
    kept: dict[str, Any] = {}
    try:
        kept = feed(consumer, *STEPS)
    except (OSError, CaptureError) as error:
        outcome = dict.fromkeys("ab", str(error))
        for name in outcome:
            consumer.forget(name)
    with contextlib.suppress(CaptureError):  # the futures say the same
        consumer.flush()
    for name, place in kept.items():
        if isinstance(place, Future):
            outcome[name] = str(place.exception(0) or "")
    return outcome


def check_whole(root: Path, killed: bool = False) -> None:
    """Each file under a final name can be read to its end, and, unless a process was killed, belongs to a pair."""
    files = {path for path in root.rglob("*") if path.is_file()}
    known: set[Path] = set()
    for path in published(root) if any(path.suffix in (".json", ".parquet") for path in files) else ():
        read(path)
        known |= {path} if path.suffix == ".parquet" else {path, Sidecar.read(path).path}
    alone = {path for path in files - known if not path.name.startswith(".")}
    assert not alone or killed
    for path in alone:
        assert path.suffix == ".safetensors"
        file = Mapped(path)
        assert all(file.tensor(name).numel() >= 0 for name in file.entries)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["write", "pwrite", "fsync", "link", "replace", "open"])
def test_the_disk_fails_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str) -> None:
    """The n-th call of an operating system function fails, for every n that there is."""
    real = getattr(os, call)
    for n in range(200):
        root = tmp_path / str(n)
        consumer = KINDS[kind](root)
        calls = 0

        def failing(*args: Any, at: int = n, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        monkeypatch.setattr(os, call, failing)
        outcome = capture(consumer)
        monkeypatch.setattr(os, call, real)
        check_whole(root)
        assert not [path for path in root.rglob("*") if path.name.startswith(".")]
        for name, text in outcome.items():
            assert not text or "No space left" in text
            if not text:
                assert_rows(read(root, request=name).rows, name, range(9))
        assert calls <= n or any(outcome.values())
        if calls <= n:
            break
        assert capture(consumer) == {"a": "", "b": ""}  # the same consumer goes on
        consumer.close()
        check_whole(root)
    else:
        pytest.fail("the loop does not end")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full(tiny_disk: Path, kind: str) -> None:
    consumer = KINDS[kind](tiny_disk)
    part = rows([("big", 0, 4000)], width=64)
    with Pipeline({"disk": consumer}) as pipeline:
        for name, span in (("small", 4), ("big", 4000), ("after", 4)):
            pipeline.begin(name)
            submit(pipeline, part if name == "big" else rows([(name, 0, span)]))
            pipeline.end(name)
            pipeline.flush()
        assert pipeline.wait("big")["disk"].status == "error"
        assert "No space left" in pipeline.wait("big")["disk"].text
        results = {name: pipeline.wait(name)["disk"].status for name in ("small", "after")}
    assert results["small"] == "ok"
    if kind not in ("sharded", "parquet"):  # whole shards of the large request stay, and the disk is full of them
        assert results["after"] == "ok"
    for name in (name for name, status in results.items() if status == "ok"):
        assert_rows(read(tiny_disk, request=name).rows, name, range(4))


def test_spilling_to_a_full_disk_blocks_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    seen: list[Any] = []

    def full(fd: int, data: Any) -> int:
        if len(seen) > 2 and Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name.startswith(".steer-compile-spill"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    def slow(part: Any) -> None:
        seen.append(part)
        time.sleep(0.002)

    monkeypatch.setattr(os, "write", full)
    consumer = make_consumer("callback", on_rows=slow)
    with Pipeline(
        {"slow": consumer}, policy="spill", spill=tmp_path, limits=Limits(queue_bytes=1, items=2)
    ) as pipeline:
        pipeline.begin("a")
        for i in range(60):
            submit(pipeline, rows([("a", i, i + 1)], i))
        pipeline.end("a")
        assert pipeline.wait("a")["slow"].status == "ok"
        assert pipeline.status()["spill_errors"] > 0
    assert [int(part.positions[0]) for part in seen] == list(range(60))


def test_a_slow_disk_drops_what_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def slow(fd: int, data: Any) -> int:
        time.sleep(0.002)
        return real(fd, data)

    monkeypatch.setattr(os, "write", slow)
    files = make_consumer("files", root=tmp_path)
    with Pipeline({"files": files}, policy="drop", limits=Limits(queue_bytes=1, items=2)) as pipeline:
        for i in range(30):
            pipeline.begin(f"r{i}")
            submit(pipeline, rows([(f"r{i}", 0, 2)]))
            submit(pipeline, rows([(f"r{i}", 2, 5)], 1))
            pipeline.end(f"r{i}")
        for i in range(30):
            assert pipeline.wait(f"r{i}")["files"].status in ("ok", "partial")
        status = pipeline.status()
    assert status["delivered"] + status["dropped"] == 150
    found = read(tmp_path)
    assert len(found.rows) == status["delivered"]
    lost = sum(info.dropped for info in found.requests.values())
    assert lost == status["dropped"] - 5 * (30 - len(found.requests))


KILLED = """
import os, random, sys, time
from pathlib import Path
sys.path.insert(0, {cwd!r})
import torch
from tests.capture.test_faults import KINDS, check_whole
from tests.capture._rows import feed, rows
torch.set_num_threads(1)
random.seed(int(sys.argv[2]))
kind, root = sys.argv[1], Path(sys.argv[3])
parts = [rows([("a", 0, 400), ("b", 0, 30)], 0, width=64), rows([("a", 400, 900)], 1, width=64)]
for turn in range(12):
    child = os.fork()
    if not child:
        consumer = KINDS[kind](root)
        while True:
            feed(consumer, *parts)
            consumer.flush()
    time.sleep(random.uniform(0.0, 0.12))
    os.kill(child, 9)
    os.waitpid(child, 0)
    check_whole(root, killed=True)
left = [path for path in root.rglob("*") if path.name.startswith(".")]
KINDS[kind](root).close()
assert not [path for path in root.rglob("*") if path.name.startswith(".")]
print("left", len(left))
"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "replaced"])
def test_a_process_is_killed_while_it_writes(tmp_path: Path, kind: str) -> None:
    program = KILLED.format(cwd=os.getcwd())
    command = [sys.executable, "-c", program, kind, str(random.randrange(1000)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("left")


def test_files_of_running_processes_are_not_swept(tmp_path: Path) -> None:
    held = Temporary(tmp_path)
    stale = tmp_path / f".steer-compile-{'0' * 32}.part"
    others = [tmp_path / name for name in (".steer-compile-x.part", ".other.part", f"{'0' * 32}.part", "a.safetensors")]
    for path in (stale, *others):
        path.write_bytes(b"x")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / stale.name).write_bytes(b"x")
    assert sweep(tmp_path) == 2
    assert all(path.exists() for path in others)
    held.write(b"whole")
    held.publish(tmp_path / "final", replace=False)
    assert (tmp_path / "final").read_bytes() == b"whole"
    assert sweep(tmp_path) == 0


def test_a_killed_writers_data_without_a_sidecar_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"left by a process that was killed between the two files")
    feed(make_consumer("files", root=tmp_path), rows([("a", 0, 2)]))
    assert [path.name for path in published(tmp_path)] == ["a-1.json"]
    feed(make_consumer("files", root=tmp_path, collisions="replace"), rows([("a", 0, 3)]))
    assert len(Sidecar.read(tmp_path / "a.json").rows()) == 3


def test_a_reader_never_sees_a_torn_pair(tmp_path: Path) -> None:
    """A pair is replaced again and again, while it is read."""
    program = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from steer_compile.capture.consumer import make_consumer
from tests.capture._rows import feed, rows
consumer = make_consumer("files", root={str(tmp_path)!r}, collisions="replace")
while True:
    for length in (1, 50):
        feed(consumer, rows([("a", 0, length)]))
"""
    writer = subprocess.Popen([sys.executable, "-c", program])
    try:
        until((tmp_path / "a.json").exists, 60)
        lengths = set()
        for _ in range(300):
            found = read(tmp_path / "a.json").rows
            lengths.add(len(found))
            assert_rows(found, "a", range(len(found)))
        assert lengths == {1, 50}
    finally:
        writer.kill()
        writer.wait()
