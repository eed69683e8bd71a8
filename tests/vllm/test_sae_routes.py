"""Attaching and detaching autoencoders: in the front end and in all workers, or in none; and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_compile import HookSelection, SAESteering, Steering, SteerSpec, sae
from steer_compile.errors import CheckpointError, NotSteered, SAEError, SpecError, SteerError, TableFull, UnknownName
from steer_compile.runtime.registry import Registry
from steer_compile.sae import SAE, FeatureClamp, JumpReLU
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape, expected_banks
from steer_compile.vllm.sae_changes import SAEChanges
from steer_compile.vllm.settings import Settings
from tests.sae._weights import parts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

WIDTH, COUNT, SITE = 8, 32, ("post_block", 1)
SPEC = SteerSpec(
    steer=(HookSelection("post_block", [1], ("add", "sae", "sae_full")),), rows=4, features=4, saes=1, sae_features=32,
    dtype="float32",
)  # fmt: skip
SHAPE = Shape(WIDTH, torch.float32, range(2), 2)
FAILED = RuntimeError("a worker is gone")
BODY = {"path": "first", "features": [3, 8]}


def made(seed: int, width: int = WIDTH) -> SAE:
    own = parts(seed, width, COUNT)
    activation = JumpReLU(own["threshold"])
    return SAE(own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"], activation, site=SITE, name=f"sae{seed}")


class Ranks:
    """Workers with tables of their own, of which one may be told to fail; and what they were called with."""

    def __init__(self, count: int) -> None:
        self.registries = [Registry(SPEC) for _ in range(count)]
        for registry in self.registries:
            registry.reserve(expected_banks(SPEC, SHAPE), torch.device("cpu"))
        self.changes = [SAEChanges(registry) for registry in self.registries]
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []

    def names(self) -> list[list[str]]:
        return [sorted(registry.saes.attached) for registry in self.registries]

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        name = method.removeprefix("steer_compile_")
        self.calls.append(name)
        methods: dict[str, Callable[[SAEChanges], Any]] = {
            "attach_sae": lambda each: each.attach(*args),
            "detach_sae": lambda each: each.detach(*args),
            "undo_sae": lambda each: each.undo(*args),
            "keep_sae": lambda each: each.keep(*args),
            "sae_users": lambda each: each.users(*args),
        }
        answers = []
        for rank, each in enumerate(self.changes):
            if self.failing.get(name) == rank:
                raise FAILED
            answers.append(methods[name](each))
        return answers


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    for name, each in (("first", made(3)), ("other", made(4)), ("wide", made(5, 16)), ("third", made(6))):
        sae.save(each, folder / name)
    return folder


def engine(root: Path | str, ranks: Ranks, asleep: bool = False, replicas: int = 1, spec: SteerSpec = SPEC) -> Any:
    from steer_compile.vllm.server.engine import Engine

    async def is_sleeping() -> bool:
        return asleep

    parallel = SimpleNamespace(data_parallel_size=replicas)
    client = SimpleNamespace(
        is_sleeping=is_sleeping, collective_rpc=ranks.collective_rpc,
        vllm_config=SimpleNamespace(parallel_config=parallel), output_processor=SimpleNamespace(request_states={}),
    )  # fmt: skip
    return Engine(client, FrontEnd(Settings(spec, vector_root=str(root)), SHAPE))


def attach(made_engine: Any, name: str, body: Any) -> dict[str, Any]:
    from steer_compile.vllm.server import autoencoders

    return asyncio.run(autoencoders.attach(made_engine, name, body))


def detach(made_engine: Any, name: str) -> None:
    from steer_compile.vllm.server import autoencoders

    asyncio.run(autoencoders.detach(made_engine, name))


def asked(name: str, feature: int = 3) -> dict[str, Any]:
    return {"features": [{"sae": name, "clamps": [{"feature": feature, "value": 9.0}]}]}


def room(made_engine: Any) -> dict[str, Any]:
    return dict(made_engine.front.saes.room()["layers.1.post_block"])


EMPTY = {"features": {"used": 0, "free": 4}, "saes": {"used": 0, "free": 1}, "sae_features": 32}


def test_one_is_attached_listed_used_and_detached(root: Path) -> None:
    ranks = Ranks(2)
    own = engine(root, ranks)
    assert room(own) == EMPTY
    line = attach(own, "bridge", {**BODY, "whole": True})
    assert line == own.front.saes.listed()[0] == own.front.status()["saes"][0]
    assert line == {
        "name": "bridge", "site": "layers.1.post_block", "d_in": WIDTH, "d_sae": COUNT, "activation": "jumprelu",
        "features": [3, 8], "whole": True, "file": "first", "sae": None, "digest": line["digest"],
    }  # fmt: skip
    assert room(own) == {"features": {"used": 2, "free": 2}, "saes": {"used": 1, "free": 0}, "sae_features": 32}
    assert ranks.names() == [["bridge"], ["bridge"]]
    checked = own.front.checked(asked("bridge"))
    assert checked.saes
    assert own.front.checked({"base": {"post_block": {"1": [1.0] * WIDTH}}}).saes == ()
    detach(own, "bridge")
    assert (ranks.names(), room(own), own.front.saes.listed()) == ([[], []], EMPTY, [])
    with pytest.raises(UnknownName, match="no autoencoder 'bridge' is attached; attached are none"):
        own.front.checked(asked("bridge"))
    assert all(not bool(registry.tables.view("sae", SITE).any()) for registry in ranks.registries)


def test_digests_tell_another_autoencoder_of_the_same_name_and_place(root: Path) -> None:
    """A cached block of the former one is never read for the latter; one of the same files may have it again."""
    own, found = engine(root, Ranks(1)), []
    for path in ("first", "other", "first"):
        for whole in (False, True):
            body = {"path": path, "features": [] if whole else [3, 8], "whole": whole}
            attach(own, "bridge", body)
            checked = own.front.checked(asked("bridge"))
            found.append((checked.digests["prefill"], checked.digests["decode"]))
            detach(own, "bridge")
    assert found[:2] == found[4:]
    assert len(set(found)) == 4


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no path": ({"features": [3]}, SpecError, "has the path None; give a folder or a file under vector_root"),
    "a path of another kind": ({**BODY, "path": 5}, SpecError, "has the path 5"),
    "an unknown field": ({**BODY, "code": "x"}, SpecError, "give an object with"),
    "features of another kind": ({**BODY, "features": "3"}, SpecError, "give a list of numbers"),
    "features of text": ({**BODY, "features": ["3"]}, SAEError, "a feature"),
    "a feature twice": ({**BODY, "features": [3, 3]}, SAEError, "a feature given twice"),
    "a feature that is not there": ({**BODY, "features": [3, 99]}, SAEError, "no feature 99; its features are 0 to 31"),
    "nothing to load": ({"path": "first"}, SAEError, "nothing of 'bridge' would be loaded"),
    "whole of another kind": ({"path": "first", "whole": "yes"}, SpecError, "whole='yes'; give true or false"),
    "an option of another kind": ({**BODY, "options": {"k": "5"}}, SpecError, "k='5'; give a whole number"),
    "an option that is no number": (
        {**BODY, "options": {"norm_factor": float("nan")}}, SpecError, "norm_factor=nan; give a finite number"),
    "options of another kind": ({**BODY, "options": {"ignore": 5}}, SpecError, "ignore=5; give a list of names"),
    "an unknown option": ({**BODY, "options": {"trust": True}}, SpecError, "allow_pt"),
    "a site of another kind": ({**BODY, "site": ["post_block", 1]}, SpecError, "give a text such as"),
    "another site": ({**BODY, "site": "layers.0.post_block"}, SAEError, "belongs to layers.1.post_block"),
    "another name in the files": ({**BODY, "sae": "nobody"}, SAEError, "has no autoencoder 'nobody'"),
    "another width": ({**BODY, "path": "wide"}, SteerError, "16"),
    "more features than there is room for": (
        {**BODY, "features": [1, 2, 3, 4, 5]}, TableFull, "no room for 'bridge': 0 of features=4"),
    "nothing there": ({**BODY, "path": "nowhere"}, FileNotFoundError, "no file 'nowhere' under the server's root"),
    "no layout": ({**BODY, "path": "empty"}, SAEError, "is in no known layout"),
    "out of the root": ({**BODY, "path": "../outside"}, CheckpointError, "leads out of the server's root"),
    "an absolute path": ({**BODY, "path": "/etc"}, CheckpointError, "leads out of the server's root"),
    "a link out of the root": ({**BODY, "path": "link"}, CheckpointError, "leads out of the server's root"),
    "a link inside": ({**BODY, "path": "inside"}, CheckpointError, "'0.safetensors', which leads out"),
    "a null byte": ({**BODY, "path": "a\0b"}, CheckpointError, "none of a file"),
    "too long a path": ({**BODY, "path": "x" * 5000}, CheckpointError, "none of a file"),
    "a truncated file": ({**BODY, "path": "cut"}, SAEError, "changed or truncated"),
    "no number in a file": ({**BODY, "path": "nan"}, SAEError, "NaN or infinity"),
}  # fmt: skip


def damaged(root: Path) -> None:
    (root / "empty").mkdir()
    sae.save(made(3), root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    (root / "inside").mkdir()
    (root / "inside" / "manifest.json").write_bytes((root / "first" / "manifest.json").read_bytes())
    (root / "inside" / "0.safetensors").symlink_to(root.parent / "outside" / "0.safetensors")
    sae.save(made(3), root / "cut")
    (root / "cut" / "0.safetensors").write_bytes((root / "cut" / "0.safetensors").read_bytes()[:-40])
    folder = root / "nan"
    folder.mkdir()
    tensors = load_file(root / "first" / "0.safetensors")
    tensors["W_dec"][0, 0] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({
        "architecture": "jumprelu", "d_in": WIDTH, "d_sae": COUNT, "dtype": "float32",
        "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }))  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_attached_leaves_nothing_behind(name: str, root: Path) -> None:
    body, kind, words = BAD[name]
    damaged(root)
    ranks = Ranks(2)
    own = engine(root, ranks)
    with pytest.raises(kind, match=words):
        attach(own, "bridge", body)
    assert (ranks.names(), room(own), own.front.saes.listed(), ranks.calls) == ([[], []], EMPTY, [], [])
    assert attach(own, "bridge", BODY)["features"] == [3, 8]


def test_engines_that_take_no_change_say_why(root: Path) -> None:
    ranks = Ranks(1)
    for other, kind, words in (
        (engine(root, ranks, asleep=True), NotSteered, "sleeps"),
        (engine(root, ranks, replicas=2), NotSteered, "2 replicas"),
        (engine("", ranks), SpecError, "set vector_root in additional_config"),
    ):
        with pytest.raises(kind, match=words):
            attach(other, "bridge", BODY)
    with pytest.raises(SpecError, match="1 to 512 characters"):
        attach(engine(root, ranks), "x" * 600, BODY)
    assert not ranks.calls


def test_a_name_that_is_taken_and_places_that_are_taken(root: Path) -> None:
    ranks = Ranks(2)
    own = engine(root, ranks)
    attach(own, "bridge", {**BODY, "whole": True})
    for path in ("first", "other"):
        with pytest.raises(SAEError, match="the name 'bridge' of an autoencoder is taken .* detach it first"):
            attach(own, "bridge", {**BODY, "path": path})
    with pytest.raises(TableFull, match="1 of saes=1 are taken by bridge; detach one"):
        attach(own, "tower", {"path": "other", "whole": True})
    with pytest.raises(UnknownName, match="no autoencoder 'tower' is attached; attached are bridge"):
        detach(own, "tower")
    assert ranks.names() == [["bridge"], ["bridge"]]
    assert own.front.checked(asked("bridge")).saes


def test_a_worker_that_refuses_or_fails_leaves_no_half(root: Path) -> None:
    from steer_compile.vllm.server.autoencoders import Torn
    from steer_compile.vllm.server.engine import Unavailable

    ranks = Ranks(2)
    own = engine(root, ranks)
    ranks.registries[1].saes.attach("stray", made(6), [1, 2])
    with pytest.raises(SAEError, match="a worker of the engine refuses .* taken back in all: layers.1.post_block: the"):
        attach(own, "bridge", BODY)
    assert (ranks.names(), room(own)) == ([[], ["stray"]], EMPTY)
    ranks.registries[1].saes.detach("stray")
    ranks.failing = {"attach_sae": 1}
    with pytest.raises(Unavailable, match="did not reach all of the engine, and was taken back"):
        attach(own, "bridge", BODY)
    assert (ranks.names(), room(own)) == ([[], []], EMPTY)
    ranks.failing = {"attach_sae": 1, "undo_sae": 0}
    with pytest.raises(Torn, match="restart the engine"):
        attach(own, "bridge", BODY)
    with pytest.raises(UnknownName, match="attached are none"):
        own.front.checked(asked("bridge"))


def test_files_that_differ_on_a_worker_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_compile.vllm import sae_changes

    ranks = Ranks(2)
    own, changes = engine(root, ranks), ranks.changes[1].attach

    def elsewhere(number: int, data: Any) -> str:
        there = {**data, "spec": {**data["spec"], "path": str(root / "other")}}
        return changes(number, there)

    monkeypatch.setattr(ranks.changes[1], "attach", elsewhere)
    with pytest.raises(SAEError, match=r"refuses .*other.* has the digest .* give all machines the same files"):
        attach(own, "bridge", BODY)
    assert ranks.names() == [[], []]
    monkeypatch.setattr(ranks.changes[1], "attach", changes)

    def full(data: Any) -> Any:
        raise torch.OutOfMemoryError("no memory to stage the weights")

    monkeypatch.setattr(sae_changes, "_read", full)
    with pytest.raises(SAEError, match="no memory to stage the weights"):
        attach(own, "bridge", BODY)


def test_what_is_in_use_stays_attached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_compile.vllm.server import engine as module

    monkeypatch.setattr(module, "PAUSE", 0.0)
    ranks = Ranks(2)
    own = engine(root, ranks)
    attach(own, "bridge", BODY)
    own.front.everyone = own.front.checked_global({"features": [{**asked("bridge")["features"][0], "phase": "decode"}]})
    with pytest.raises(SAEError, match=r"at layers.1.post_block is in use by everyone \(decode\); set global steering"):
        detach(own, "bridge")
    own.front.everyone = own.front.checked_global({})
    handle = ranks.registries[1].register(Steering(features=SAESteering("bridge", [FeatureClamp(3, 9.0)])))
    with pytest.raises(SAEError, match="in use by 2 rows of overrides or of requests that have ended; let the engine"):
        detach(own, "bridge")
    assert own.front.checked(asked("bridge")).saes
    ranks.registries[1].release(handle)
    detach(own, "bridge")
    assert ranks.names() == [[], []]


def test_a_detaching_that_fails_brings_it_back_to_its_own_places(root: Path) -> None:
    """Rows of requests refer to places: the first free ones would be another's."""
    from steer_compile.vllm.server.autoencoders import Torn
    from steer_compile.vllm.server.engine import Unavailable

    ranks = Ranks(2)
    own = engine(root, ranks)
    attach(own, "bridge", BODY)
    attach(own, "tower", {"path": "other", "features": [5, 6]})
    detach(own, "bridge")
    before = [registry.tables.view("sae", SITE).clone() for registry in ranks.registries]
    ranks.failing = {"detach_sae": 1}
    with pytest.raises(Unavailable, match="was taken back"):
        detach(own, "tower")
    assert [registry.saes.get("tower").slots for registry in ranks.registries] == [(2, 3), (2, 3)]
    for registry, rows in zip(ranks.registries, before, strict=True):
        assert torch.equal(registry.tables.view("sae", SITE), rows)
    assert own.front.checked(asked("tower", 5)).saes
    ranks.failing = {"detach_sae": 1, "undo_sae": 1}
    with pytest.raises(Torn, match="restart the engine"):
        detach(own, "tower")
    with pytest.raises(UnknownName, match="'tower' is being attached or detached"):
        own.front.checked(asked("tower", 5))


def test_no_request_names_one_that_is_on_its_way(root: Path) -> None:
    """Attached is what all workers have."""
    ranks = Ranks(1)
    own, seen = engine(root, ranks), list[str]()
    inner = own.client.collective_rpc

    async def watched(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        with pytest.raises(UnknownName, match="'bridge' is being attached or detached; ask again soon"):
            own.front.checked(asked("bridge"))
        with pytest.raises(UnknownName, match="'bridge' is being attached or detached"):
            own.front.checked_global(asked("bridge"))
        seen.append(method)
        return list(await inner(method, args))

    own.client.collective_rpc = watched
    attach(own, "bridge", BODY)
    detach(own, "bridge")
    assert [method.removeprefix("steer_compile_") for method in seen] == [
        "attach_sae", "keep_sae", "sae_users", "detach_sae", "keep_sae",
    ]  # fmt: skip


def test_a_spec_may_wait_for_autoencoders_under_a_root(root: Path) -> None:
    plain = {key: value for key, value in SPEC.to_dict().items() if key not in ("max_tokens", "sae_tokens")}
    found = Settings.read({"steer_compile": {**plain, "vector_root": str(root)}}, 64, torch.float32)
    assert found is not None
    assert found.saes == ()
    with pytest.raises(SpecError, match="no autoencoders; name some .*, or give vector_root"):
        Settings.read({"steer_compile": plain}, 64, torch.float32)
