"""Readers: ranks that wrote other sites of the same rows, data sets for training, and the store of prompts."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from steer_compile.capture.consumer import make_consumer
from steer_compile.capture.dataset import RowDataset
from steer_compile.capture.read import merged, read
from steer_compile.capture.rows import Rows
from steer_compile.capture.store import ActivationStore, Counters, Source, captured_prompts, prompt_key
from steer_compile.errors import CaptureError
from tests.capture._rows import KEYS, assert_rows, feed, rows

# -- ranks ------------------------------------------------------------------------------------------------------------


def relabelled(of: Rows, **labels: Any) -> Rows:
    fields = {"requests": of.requests, "request": of.request, "positions": of.positions, "token_ids": of.token_ids,
              "steps": of.steps, "values": of.values}  # fmt: skip
    return Rows(**{**fields, **labels})


@pytest.mark.behaviour(77)
@pytest.mark.parametrize("layout", ["per_file", "packed", "sharded", "parquet"])
def test_the_files_of_two_ranks_are_put_together(tmp_path: Path, layout: str) -> None:
    for rank, key in enumerate(KEYS):
        options: dict[str, Any] = {"root": tmp_path, "rank": rank}
        made = (
            make_consumer("parquet", **options, part_bytes=300)
            if layout == "parquet"
            else make_consumer("files", **options, layout=layout, shard_bytes=300)
        )
        spans = [("a", 0, 5), ("b", 0, 6)] if rank == 0 else [("b", 0, 6), ("a", 0, 5)]
        part = rows(spans, keys=[key])
        feed(made, part if rank == 0 else relabelled(part, token_ids=torch.full_like(part.token_ids, -1)), tag="t")
        made.close()
    found = read(tmp_path)
    assert set(found.rows.values) == set(KEYS)
    assert_rows(found.rows, "a", range(5))
    assert_rows(found.rows, "b", range(6))
    assert found.requests["a"].rows == 5
    assert list(read(tmp_path, keys=KEYS[1:], request="b").rows.values) == [KEYS[1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": torch.tensor([0, 2])}, r"request 'a' has other rows in layers\.1\.post_block \(2\) than in"),
        ({"token_ids": torch.tensor([1, 9])}, "request 'a' has other rows"),
        ({"steps": torch.tensor([0, 1])}, "request 'a' has other rows"),
        ({"requests": ("b",)}, "request 'a' is in the files of some ranks alone; read it apart"),
    ],
)
def test_ranks_whose_rows_differ_are_refused(change: dict[str, Any], words: str) -> None:
    one, other = (rows([("a", 0, 2)], keys=[key]) for key in KEYS)
    assert set(merged([one, other]).values) == set(KEYS)
    with pytest.raises(CaptureError, match=words):
        merged([one, relabelled(other, **change)])


# -- data set ---------------------------------------------------------------------------------------------------------


def dataset(root: Path, layout: str = "sharded") -> RowDataset:
    made = make_consumer("files", root=root, layout=layout, shard_bytes=900)
    feed(made, rows([("a", 0, 40), ("b", 0, 7)], 0, torch.bfloat16))
    feed(made, rows([("c", 0, 13)], 0, torch.bfloat16), tag="t")
    made.close()
    return RowDataset(root, KEYS[1])


@pytest.mark.parametrize("layout", ["per_file", "packed", "sharded"])
def test_a_data_set_has_every_row_once(tmp_path: Path, layout: str) -> None:
    data = dataset(tmp_path, layout)
    whole = read(tmp_path).rows
    assert (len(data), data.dtype, data.row_shape) == (60, torch.bfloat16, (8,))
    expected = sorted(tuple(row) for row in whole.values[KEYS[1]].tolist())
    assert sorted(tuple(data[i].tolist()) for i in range(60)) == expected
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.batch(index), torch.stack([data[int(i)] for i in index]))
    assert torch.equal(data[-1], data[59])
    assert data.batch([]).shape == (0, 8)
    for wrong in (60, -61):
        with pytest.raises(IndexError, match=r"is asked for of 60"):
            data[wrong]
    data[0].fill_(-1)  # a copy
    assert torch.equal(data[0], data.batch([0])[0])
    assert not torch.equal(data[0], torch.full((8,), -1.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_shuffles_with_workers(tmp_path: Path, workers: int) -> None:
    data = dataset(tmp_path)
    loader = DataLoader(
        data, batch_size=8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1)
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8] * 7 + [4]
    found = sorted(tuple(row) for batch in batches for row in batch.tolist())
    assert found == sorted(tuple(data[i].tolist()) for i in range(60))


def test_a_data_set_is_pickled_as_paths(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data[3]
    text = pickle.dumps(data)
    assert len(text) < 4000
    assert torch.equal(pickle.loads(text)[3], data[3])


def test_what_is_no_data_set(tmp_path: Path) -> None:
    dataset(tmp_path)
    with pytest.raises(CaptureError, match=r"no file holds layers\.7\.x; there are layers\.0\.post_block, layers\.1"):
        RowDataset(tmp_path, "layers.7.x")
    feed(make_consumer("files", root=tmp_path), rows([("w", 0, 1)], width=4))
    with pytest.raises(CaptureError, match="has several forms .* give files of one model"):
        RowDataset(tmp_path, KEYS[1])
    made = make_consumer("parquet", root=tmp_path / "p")
    feed(made, rows([("w", 0, 1)]))
    made.close()
    with pytest.raises(CaptureError, match="cannot be mapped; capture to the files consumer"):
        RowDataset(tmp_path / "p", KEYS[0])


# -- store ------------------------------------------------------------------------------------------------------------

MODEL = Source("model", "steering")


def prompt(length: int, keys: tuple[str, ...] = KEYS) -> tuple[list[int], Rows]:
    """A prompt of odd token ids and its rows."""
    of = rows([("a", 0, length)], keys=keys)
    return of.token_ids.tolist(), of


@pytest.mark.behaviour(78)
def test_a_store_gives_whole_prompts_or_nothing() -> None:
    store = ActivationStore(1 << 20)
    ids, of = prompt(4, KEYS[:1])
    assert store.get(ids, MODEL, KEYS[:1]) is None
    assert store.put(ids, MODEL, of)
    assert store.get(ids, MODEL, KEYS) is None
    found = store.get(ids, MODEL, KEYS[:1])
    assert found is not None
    assert_rows(found, "a", range(4))
    for other in (Source("model"), Source("model2", "steering"), Source("modelsteering")):
        assert store.get(ids, other, KEYS[:1]) is None
    assert store.get(ids[:3], MODEL, KEYS[:1]) is None
    assert store.put(ids, MODEL, prompt(4, KEYS[1:])[1])
    assert set(store.get(ids, MODEL, KEYS).values) == set(KEYS)  # type: ignore[union-attr]
    assert store.counters == Counters(2, 6, 0, 1, prompt(4)[1].nbytes)
    with pytest.raises(CaptureError, match="4 rows are not those of a prompt of 5 tokens"):
        store.put([*ids, 1], MODEL, of)
    with pytest.raises(CaptureError, match="are not those of a prompt"):
        store.put([2, *ids[1:]], MODEL, of)


def test_a_store_keeps_to_its_budget() -> None:
    size = prompt(2)[1].nbytes
    store = ActivationStore(3 * size)
    sources = [Source(f"m{i}", "s") for i in range(4)]
    ids, of = prompt(2)
    for source in sources[:3]:
        store.put(ids, source, of)
    assert store.get(ids, sources[0], KEYS) is not None
    store.put(ids, sources[3], of)
    assert [store.get(ids, source, KEYS) is not None for source in sources] == [True, False, True, True]
    assert (store.counters.evicted, store.counters.nbytes) == (1, 3 * size)
    assert not store.put(*(lambda p: (p[0], MODEL, p[1]))(prompt(7)))
    assert store.counters.prompts == 3
    assert store.invalidate(model="m0") == 1
    assert store.invalidate(steering="other") == 0
    assert store.invalidate(steering="s") == 2
    assert store.counters.nbytes == 0
    with pytest.raises(CaptureError, match="max_bytes=0 is no size"):
        ActivationStore(0)


def test_keys_tell_prompts_and_sources_apart() -> None:
    keys = {prompt_key(ids, Source(m, s)) for ids in ([1], [1, 2], []) for m, s in (("a", "b"), ("ab", ""), ("", "ab"))}
    assert len(keys) == 9
    assert prompt_key([1, 2], MODEL) == prompt_key((1, 2), MODEL)


@pytest.mark.behaviour(78)
def test_prompts_in_the_store_do_not_run_again() -> None:
    store = ActivationStore(1 << 20)
    ran: list[list[int]] = []

    def run(prompts: list[Any]) -> list[Rows]:
        ran.extend(prompts)
        return [prompt(len(ids))[1] for ids in prompts]

    one, two, three = (prompt(n)[0] for n in (1, 2, 3))
    found = captured_prompts(store, MODEL, [one, two, one], KEYS[:1], run)
    assert [len(of) for of in found] == [1, 2, 1]
    assert list(found[0].values) == [KEYS[0]]
    assert ran == [one, two]
    assert [len(of) for of in captured_prompts(store, MODEL, [three, two], KEYS, run)] == [3, 2]
    assert ran == [one, two, three]
    captured_prompts(store, MODEL, [three, two], KEYS, lambda prompts: pytest.fail("nothing has to run"))
    with pytest.raises(CaptureError, match="run returned rows of 0 prompts for 1"):
        captured_prompts(store, Source("x"), [one], KEYS, lambda prompts: [])
    with pytest.raises(CaptureError, match=r"run captured .*, but not layers\.9\.x"):
        captured_prompts(store, MODEL, [one], ["layers.9.x"], run)


def test_a_store_of_many_threads() -> None:
    store = ActivationStore(20 * prompt(3)[1].nbytes)
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        ids, of = prompt(3)
        for i in range(200):
            source = Source(f"m{(i * 7 + number) % 40}")
            if store.get(ids, source, KEYS) is None:
                store.put(ids, source, of)
            if i % 50 == 0:
                store.invalidate(model=source.model)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    counters = store.counters
    assert counters.hits + counters.misses == 800
    assert counters.nbytes == counters.prompts * prompt(3)[1].nbytes <= 20 * prompt(3)[1].nbytes
