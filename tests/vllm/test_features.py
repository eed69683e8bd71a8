"""Features of autoencoders in engines: the same tokens as hooks in eager mode and as plain PyTorch, per request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import HookSelection, SAESteering, SteerSpec, sae
from steer_compile.errors import SAEError, SpecError, TableFull, UnknownName, VectorError
from steer_compile.sae import SAE, FeatureClamp, JumpReLU, TopK
from steer_compile.sae.activation import Activation
from steer_compile.vllm import engine_args
from steer_compile.vllm.autoencoders import sae_specs
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape, SteeredModel
from steer_compile.vllm.settings import Settings
from steer_compile.vllm.transport import received
from tests.sae._weights import parts
from tests.vllm import engines

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

WIDTH, COUNT, LAYER = engines.WIDTH, 96, 1
SPEC = SteerSpec(
    steer=(HookSelection("post_block", [LAYER], ("add", "sae", "sae_full")),), rows=8, features=8, sae_features=128,
    saes=2, max_tokens=256, sae_tokens=256, dtype="float32",
)  # fmt: skip
CLAMPS = [FeatureClamp(3, 9.0), FeatureClamp(8, -4.0, "add"), FeatureClamp(20, 6.0, only_if_active=True)]


def made(activation: Activation, seed: int) -> SAE:
    own = parts(seed, WIDTH, COUNT)
    return SAE(
        own["W_enc"],
        own["b_enc"],
        own["W_dec"],
        own["b_dec"],
        activation,
        site=("post_block", LAYER),
        name=f"sae{seed}",
    )


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saes") / "both"
    both = [made(JumpReLU(parts(3, WIDTH, COUNT)["threshold"]), 3), made(TopK(12), 4)]
    sae.save(both, folder)
    return {
        "parts": {"path": str(folder), "sae": "sae3", "features": [20, 3, 8]},
        "whole": {"path": str(folder), "sae": "sae4", "whole": True},
    }


def asked(name: str, clamps: list[FeatureClamp] = CLAMPS, **more: Any) -> dict[str, Any]:
    return {"features": [{"sae": name, "clamps": [dict(vars(clamp)) for clamp in clamps], **more}]}


def hooked(judge: Any, edit: Any, new: int = 6) -> list[int]:
    """Greedy tokens of the Hugging Face model with a value of the stream edited."""

    def hook(module: Any, given: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        h = edit(output[0] if whole else output)
        return (h, *output[1:]) if whole else h

    handle = judge.model.layers[LAYER].register_forward_hook(hook)
    ids = torch.tensor([engines.PROMPT])
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, judge(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    found: list[int] = ids[0, len(engines.PROMPT) :].tolist()
    return found


def test_requests_have_the_tokens_of_hooks_and_of_plain_pytorch(models: Path, saes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    path = engines.saved("llama", models)
    judge: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    llm = engines.engine(path, SPEC, saes=saes)
    one, two = made(JumpReLU(parts(3, WIDTH, COUNT)["threshold"]), 3), made(TopK(12), 4)
    requests = [
        None, asked("parts"), asked("whole", mode="reconstruct"), asked("whole"),
        asked("whole", [], mode="reconstruct"),
    ]  # fmt: skip
    edits: list[Any] = [
        lambda h: h,
        lambda h: sae.steered_delta(h, one, CLAMPS),
        lambda h: sae.steered_reconstruction(h, two, CLAMPS),
        lambda h: sae.steered_delta(h, two, CLAMPS),
        lambda h: sae.steered_reconstruction(h, two),
    ]
    outputs = engines.texts(engines.generated(llm, requests))
    expected = [hooked(judge, edit) for edit in edits]
    for got, wanted in zip(outputs, expected, strict=True):
        assert list(got)[:6] == wanted
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    with pytest.raises(ValueError, match="feature 5 of 'parts' is not loaded"):
        engines.generated(llm, [asked("parts", [FeatureClamp(5, 1.0)])])
    with pytest.raises(ValueError, match="no autoencoder 'tower' is attached; attached are parts, whole"):
        engines.generated(llm, [asked("tower")])
    assert engines.texts(engines.generated(llm, requests[:2])) == outputs[:2]


def test_tables_are_the_same_whatever_torchs_defaults_are(saes: dict[str, Any]) -> None:
    """vLLM builds a model with the GPU as default device, and with the model's dtype."""
    specs = sae_specs(saes)
    shape, cpu = Shape(WIDTH, torch.float32, range(4), 4), torch.device("cpu")
    wanted = SteeredModel(SPEC, shape, cpu, specs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made = SteeredModel(SPEC, shape, cpu, specs)
    finally:
        torch.set_default_dtype(torch.float32)
    for kind in ("sae", "sae_set", "full_encoder", "full_decoder", "full_set", "full_bias", "full_sae"):
        got = made.registry.tables.view(kind, ("post_block", LAYER))
        expected = wanted.registry.tables.view(kind, ("post_block", LAYER))
        assert expected.any()
        assert torch.equal(got, expected)


def front(saes: dict[str, Any], spec: SteerSpec = SPEC) -> FrontEnd:
    given = engine_args(spec, saes=saes)["additional_config"]
    settings = Settings.read(given, 256, torch.float32)
    assert settings is not None
    return FrontEnd(settings, Shape(WIDTH, torch.float32, range(4), 4))


def test_what_a_request_asks_reaches_the_workers_whole(saes: dict[str, Any]) -> None:
    checked = front(saes).checked(asked("parts", phase="decode"))
    contents, _ = received(checked.data)
    assert not contents["prefill"].features
    ((site, clamps),) = contents["decode"].features.clamps
    assert site == ("post_block", LAYER)
    assert [(c.sae, c.feature, c.value) for c in clamps] == [("parts", c.feature, c.value) for c in CLAMPS]
    other = front(saes).checked(asked("parts", CLAMPS[:2], phase="decode"))
    assert checked.digests["decode"] != other.digests["decode"]  # blocks of a prefix cache are theirs alone
    assert checked.digests["prefill"] == ""


def test_a_gate_that_would_not_reach_decoded_values_is_refused_in_the_front_end(saes: dict[str, Any]) -> None:
    """Also where the request itself decodes nothing: a worker cannot refuse what it was let in with."""
    (chosen,) = SPEC.steer
    spec = replace(SPEC, steer=(replace(chosen, ops=(*chosen.ops, "row_monitor")),))
    monitor = {"probe": [1.0] * WIDTH, "threshold": 0.1}
    given = {"monitors": {f"layers.{LAYER}.post_block": {**monitor, "clamps": True}}}
    with pytest.raises(VectorError, match="clamps=True, whose gate would not reach values"):
        front(saes, spec).checked(given)
    assert front(saes, replace(spec, cross_layer=True)).checked(given).data
    assert front(saes, spec).checked({"monitors": {f"layers.{LAYER}.post_block": monitor}}).data


def test_global_features_and_those_of_requests_are_kept_apart(saes: dict[str, Any]) -> None:
    made_front = front(saes)
    everyone = made_front.checked_global(asked("parts", CLAMPS[:1]))
    assert everyone["prefill"].features
    made_front.everyone = everyone
    with pytest.raises(SAEError, match="feature 3 of 'parts' .* is clamped twice in a phase: by 'parts' to 9"):
        made_front.checked(asked("parts", CLAMPS[:1]))
    assert made_front.checked(asked("parts", CLAMPS[1:])).digests["decode"]


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"features": {}}, SpecError, "give a list"),
        ({"features": [{"clamps": []}]}, SpecError, "give an object with sae"),
        ({"features": [{"sae": "parts", "clamps": [{"feature": 3}]}]}, SpecError, "give an object with feature"),
        (asked("parts", mode="invert"), SAEError, "mode='invert'"),
        (asked("tower"), UnknownName, "attached are parts, whole"),
        (asked("whole", [FeatureClamp(99, 1.0)]), SAEError, "no feature 99; its features are 0 to 95"),
        (asked("parts", mode="reconstruct"), SAEError, "not attached as a whole"),
        ({"features": [{"sae": "parts", "clamps": [{"feature": 3, "value": "x"}]}]}, ValueError, "feature 3"),
    ],
)
def test_bad_requests_are_refused(saes: dict[str, Any], given: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        front(saes).checked(given)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"autoencoders": {"parts": {"path": "/nowhere"}}}, "path /nowhere, where nothing is"),
        ({"autoencoders": {"parts": "x"}}, "give an object with"),
        (
            {"autoencoders": {"parts": {"path": ".", "features": 5}}},
            "features=5 and options={}; give a list of numbers",
        ),
        ({"autoencoders": {}}, "and no autoencoders; name some"),
        ({"saes": {"parts": {"path": "."}}}, "name autoencoders in the key 'autoencoders'"),
        ({"sae_tokens": 9}, "a step may have 256 tokens"),
    ],
)
def test_bad_settings_are_refused(saes: dict[str, Any], change: dict[str, Any], text: str) -> None:
    given = engine_args(SPEC, saes=saes)["additional_config"]["steer_compile"]
    with pytest.raises(SpecError, match=text):
        Settings.read({"steer_compile": {**given, **change}}, 256, torch.float32)


def test_the_spec_keeps_its_number_of_autoencoders(saes: dict[str, Any]) -> None:
    """Named ones are beside it, under a key of their own."""
    assert front(saes).settings.spec.saes == SPEC.saes == 2


def test_a_race_with_global_features_gives_the_request_its_own() -> None:
    """A worker cannot refuse a request that the front end let in: its own clamps come first in its row."""
    from steer_compile.runtime.features import Features, SlotClamp

    site = ("post_block", LAYER)
    mine, shared = SlotClamp(1, 1, 9.0, "parts", 3), SlotClamp(1, 1, 5.0, "parts", 3)
    other = SlotClamp(2, 1, 5.0, "parts", 8)
    everyone, own = Features(((site, (shared, other)),)), Features(((site, (mine,)),))
    assert everyone.yielding(own) + own == Features(((site, (other, mine)),))


def test_everyone_and_a_request_have_room_for_clamps_of_a_whole_autoencoder(saes: dict[str, Any]) -> None:
    """A row holds both, and no worker is left with more than it has room for."""
    some = [FeatureClamp(i, 1.0) for i in range(SPEC.features)]
    for checked in (front(saes).checked, front(saes).checked_global):
        with pytest.raises(TableFull, match="5 features of 'whole' .* there is room for 4"):
            checked(asked("whole", some[:5]))
        assert checked(asked("whole", some[:4]))


def test_plain_steering_of_the_same_content_is_equal() -> None:
    """The two hosts read the same value of `SAESteering`."""
    from steer_compile.vllm.autoencoders import features_of

    assert features_of(asked("parts")["features"]) == [SAESteering("parts", tuple(CLAMPS))]
