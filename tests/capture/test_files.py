"""Files of captured rows: layouts, names, collisions, sidecars, and what is read back."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from steer_compile.capture import packed
from steer_compile.capture.consumer import Consumer, Ended, make_consumer
from steer_compile.capture.names import MOST_NAME, slug
from steer_compile.capture.read import Sidecar, published, read
from steer_compile.errors import CaptureError, UnknownName
from tests.capture._rows import KEYS, META, assert_rows, feed, rows

LAYOUTS = ("per_file", "packed", "sharded")


def consumer(root: Path, layout: str = "per_file", **options: Any) -> Consumer:
    return make_consumer("files", root=root, layout=layout, **options)


@pytest.mark.behaviour(77)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    made = consumer(tmp_path, layout, shard_bytes=300)
    parts = [rows([("a", 0, 3), ("b", 0, 5)], 0, dtype), rows([("a", 3, 4), ("b", 5, 6)], 1, dtype)]
    kept = feed(made, *parts, tag="t")
    made.close()
    found = read(tmp_path)
    assert_rows(found.rows, "a", range(4), dtype)
    assert_rows(found.rows, "b", range(6), dtype)
    assert found.rows.of("a").steps.tolist() == [0, 0, 0, 1]
    assert all(info.complete and info.model == "model" and info.spec == "spec" for info in found.requests.values())
    assert [found.requests[name].rows for name in ("a", "b")] == [4, 6]
    assert found.requests["a"].prompt_length == 3
    for place in kept.values():
        text = place.result(0) if isinstance(place, Future) else str(place)
        assert text
        assert all(Path(path).exists() for path in text.splitlines())
    assert (
        len(published(tmp_path)) == {"per_file": 2, "packed": 1, "sharded": 4 if dtype == torch.float32 else 2}[layout]
    )


def test_safetensors_itself_reads_the_files(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        made = consumer(tmp_path / layout, layout)
        feed(made, rows([("a", 0, 3)]))
        made.close()
        (side,) = published(tmp_path / layout)
        with safe_open(str(Sidecar.read(side).path), "pt") as file:
            prefix = "" if layout == "per_file" else "b0."
            assert torch.equal(file.get_tensor(f"{prefix}{KEYS[1]}"), rows([("a", 0, 3)]).values[KEYS[1]])
            assert file.metadata() == {"format": "steer_compile.rows", "version": "1"}


def test_the_sidecar_says_what_the_file_holds(tmp_path: Path) -> None:
    feed(consumer(tmp_path), rows([("a/b", 2, 4)]), tag="x", dropped=5)
    (path,) = tmp_path.rglob("*.json")
    data = json.loads(path.read_text())
    assert data["data"] == path.with_suffix(".safetensors").name
    assert data["bytes"] == path.with_suffix(".safetensors").stat().st_size
    assert (data["rows"], data["positions"], data["token_ids"], data["steps"]) == (2, [2, 3], [5, 7], [0, 0])
    assert data["sites"][KEYS[0]] == {"dtype": "F32", "row_shape": [8]}
    assert data["requests"] == [
        {"request": "a/b", "tag": "x", "model": "model", "spec": "spec", "prompt_length": 3, "rows": 2, "ended": True,
         "dropped": 5}
    ]  # fmt: skip
    assert not read(tmp_path).requests["a/b"].complete


@pytest.mark.behaviour(77)
def test_blocks_and_files_end_where_they_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BLOCK_BYTES", 400)
    monkeypatch.setattr(packed, "MOST_BLOCKS", 3)
    made = consumer(tmp_path, "packed")
    feed(made, *(rows([("a", i, i + 5)], i) for i in range(0, 40, 5)))
    made.close()
    assert_rows(read(tmp_path).rows, "a", range(40))
    sides = [Sidecar.read(path) for path in published(tmp_path)]
    assert [side.counts for side in sides] == [(4, 4, 4)] * 3 + [(4,)]
    assert [path.stem for path in published(tmp_path)] == ["rows", "rows-1", "rows-2", "rows-3"]
    for side in sides:
        with safe_open(str(side.path), "pt") as file:
            assert f"b{len(side.counts) - 1}.{KEYS[0]}" in file.keys()  # noqa: SIM118


def test_rows_of_other_sites_go_to_another_file(tmp_path: Path) -> None:
    made = consumer(tmp_path, "packed")
    feed(made, rows([("a", 0, 3)]), tag="t")
    feed(made, rows([("b", 0, 2)], keys=KEYS[:1]), tag="t")
    feed(made, rows([("c", 0, 2)]), tag="u")
    made.close()
    assert {path.name for path in published(tmp_path)} == {"t.json", "t-1.json", "u.json"}
    with pytest.raises(CaptureError, match=r"hold layers\.0\.post_block together with other sites, and apart"):
        read(tmp_path)
    assert set(read(tmp_path, keys=KEYS[:1]).requests) == {"a", "b", "c"}
    assert list(read(tmp_path, tag="u").requests) == ["c"]
    with pytest.raises(CaptureError, match="no captured rows of request 'z'"):
        read(tmp_path, request="z", keys=KEYS[:1])


def test_a_request_in_several_shards_is_known_when_the_last_is_sealed(tmp_path: Path) -> None:
    made = consumer(tmp_path, "sharded", shard_bytes=300)
    kept = feed(made, rows([("a", 0, 8)]))["a"]
    assert isinstance(kept, Future)
    assert not kept.done()
    assert not read(tmp_path).requests["a"].ended
    made.flush()
    assert [Path(place).name for place in kept.result(0).splitlines()] == [f"rows-0000{i}.json" for i in range(3)]
    assert read(tmp_path).requests["a"].complete
    again = consumer(tmp_path, "sharded", shard_bytes=300)
    feed(again, rows([("b", 0, 1)]))
    again.close()
    assert published(tmp_path)[-1].name == "rows-00003.json"


def test_names_that_are_taken(tmp_path: Path) -> None:
    for policy, expected in (("suffix", {"a.json", "a-1.json"}), ("replace", {"a.json"}), ("error", {"a.json"})):
        root = tmp_path / policy
        made = consumer(root, collisions=policy)
        feed(made, rows([("a", 0, 2)]))
        if policy == "error":
            with pytest.raises(
                CaptureError, match=r"a\.json is there already; .* collisions='suffix' or 'replace'|a\.saf"
            ):
                feed(made, rows([("a", 0, 3)]))
        else:
            feed(made, rows([("a", 0, 3)]))
        sides = published(root)
        assert {path.name for path in sides} == expected
        assert len(list(root.iterdir())) == 2 * len(expected)
        assert len(Sidecar.read(root / "a.json").rows()) == (3 if policy == "replace" else 2)


def test_many_requests_of_one_name(tmp_path: Path) -> None:
    made = consumer(tmp_path)
    for i in range(14):
        feed(made, rows([("a", 0, i + 1)]))
    assert sorted(len(Sidecar.read(path).rows()) for path in published(tmp_path)) == list(range(1, 15))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tag", ["../../etc", "..", "/abs/path", "a/../../b", ".", "\0", "x" * 500, "\ud800"])
def test_no_name_leads_out_of_the_root(tmp_path: Path, layout: str, tag: str) -> None:
    root = tmp_path / "in" / "root"
    made = consumer(root, layout)
    feed(made, rows([(tag, 0, 2)]), tag=tag)
    made.close()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["root"]
    assert_rows(read(root).rows, tag, range(2))
    assert all(len(os.fsencode(path.name)) <= 255 for path in root.rglob("*"))


@given(st.text(), st.text())
def test_slugs_are_stems_and_tell_texts_apart(one: str, other: str) -> None:
    stem = slug(one)
    assert stem.replace("-", "").replace("_", "").isalnum() or set(stem) <= set("-_")
    assert stem.isascii()
    assert 0 < len(stem) <= MOST_NAME + 9
    assert (slug(other) == stem) == (one == other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5),
    st.integers(100, 2000),
    st.sampled_from(LAYOUTS),
)
def test_staggered_requests_keep_their_rows(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], shard: int, layout: str
) -> None:
    """Requests of other lengths, side by side: a prompt at once, then a token in each step until each has ended."""
    root = tmp_path_factory.mktemp("rows")
    made = consumer(root, layout, shard_bytes=shard)
    spans = [(f"r{i}", 0, prompt) for i, (prompt, _) in enumerate(lengths)]
    steps = [rows(spans)]
    for step in range(max(more for _, more in lengths)):
        going = [(f"r{i}", p + step, p + step + 1) for i, (p, more) in enumerate(lengths) if step < more]
        steps += [rows(going, step + 1)] if going else []
    feed(made, *steps)
    made.close()
    found = read(root)
    for i, (prompt, more) in enumerate(lengths):
        assert_rows(found.rows, f"r{i}", range(prompt + more))
        assert found.requests[f"r{i}"].rows == prompt + more
        assert found.rows.of(f"r{i}").steps.tolist() == [0] * prompt + list(range(1, more + 1))


def test_a_request_without_rows_has_no_file(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        made = consumer(tmp_path / layout, layout)
        kept = feed(made, rows([("a", 0, 0)]))["a"]
        assert (kept.result(0) if isinstance(kept, Future) else kept) == ""
        made.close()
        assert list((tmp_path / layout).iterdir()) == []


def test_open_requests_that_need_too_much_memory_fail_alone(tmp_path: Path) -> None:
    made = consumer(tmp_path, max_bytes=1000)
    kept: dict[str, object] = {}
    both = rows([("a", 0, 2), ("b", 0, 40)])
    from steer_compile.capture.consumer import Began

    for name in ("a", "b"):
        made.began(Began(name))
    made.rows(both)
    kept["a"] = made.ended(Ended("a", "", 0, META))
    with pytest.raises(CaptureError, match="more than max_bytes=1000; raise it, or use layout='sharded'"):
        made.ended(Ended("b"))
    assert_rows(read(tmp_path).rows, "a", range(2))


def test_options_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, options in (
        ("layout='zip' is unknown; choose one of per_file, packed, sharded", {"layout": "zip"}),
        ("collisions='merge' is unknown", {"collisions": "merge"}),
        ("are sizes; give numbers above 0", {"shard_bytes": 0}),
        ("no folder .* can be made .* give a root that can be written", {"root": tmp_path / "file"}),
        ("no folder .* can be made", {"root": tmp_path / "file" / "below"}),
    ):
        with pytest.raises(CaptureError, match=words):
            make_consumer("files", **{"root": tmp_path, **options})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    feed(consumer(tmp_path), rows([("a", 0, 2)]))
    side, data = tmp_path / "a.json", tmp_path / "a.safetensors"
    good, about = data.read_bytes(), side.read_text()
    with pytest.raises(CaptureError, match=r"no file holds layers\.9\.post_block; there are layers\.0"):
        read(tmp_path, keys=["layers.9.post_block"])
    for content, words in (
        (b"", "has 0 bytes"),
        (good[:100], "longer than the file"),
        (good[:-8], "lies outside of the file"),
        (good[:8] + b"x" + good[9:], "header cannot be read"),
        (good.replace(b'"shape":[2,8]', b'"shape":[2,9]'), "bytes, not 72"),
    ):
        data.write_bytes(content)
        with pytest.raises(CaptureError, match=words):
            read(tmp_path)
    data.unlink()
    with pytest.raises(CaptureError, match=r"names a\.safetensors, which is not there"):
        read(tmp_path)
    for text, words in (
        ("{}", "is no readable sidecar"),
        (about.replace('"data":"a', '"data":"../a'), "outside of its folder"),
        (about.replace('"version":1', '"version":9'), "steer_compile.rows 9"),
    ):
        side.write_text(text)
        with pytest.raises(CaptureError, match=words):
            read(side)
    with pytest.raises(CaptureError, match="no captured rows at"):
        read(tmp_path / "nowhere")


def test_no_value_is_lost_on_the_way_to_a_file(tmp_path: Path) -> None:
    feed(consumer(tmp_path), rows([("a", 0, 2)]))
    with pytest.raises(UnknownName, match="no captured row is of request 'b'; there are a"):
        read(tmp_path).rows.of("b")
    bits = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).view(-1, 8)
    part = rows([("n", 0, bits.size(0))], width=8)
    part.values[KEYS[0]] = bits  # type: ignore[index]
    for layout in LAYOUTS:
        made = consumer(tmp_path / layout, layout)
        feed(made, part)
        made.close()
        assert torch.equal(read(tmp_path / layout).rows.values[KEYS[0]].view(torch.int16), bits.view(torch.int16))
