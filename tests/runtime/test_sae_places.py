"""Autoencoders at given places, and rows that tell one from another of the same name."""

from __future__ import annotations

import pytest
import torch

from steer_compile import HookSelection, SAESteering, Steering, SteerSpec
from steer_compile.errors import SAEError, TableFull
from steer_compile.runtime.features import Features
from steer_compile.runtime.registry import Registry
from steer_compile.sae import SAE, FeatureClamp, ReLU
from steer_compile.vllm.model import Shape, expected_banks

WIDTH, COUNT, SITE = 6, 10, ("post_block", 0)
SPEC = SteerSpec(
    steer=(HookSelection("post_block", [0], ("add", "sae", "sae_full")),), rows=2, features=4, saes=2, sae_features=16,
    dtype="float32",
)  # fmt: skip


def made(seed: int) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(WIDTH, COUNT, generator=draw) for _ in range(2))
    return SAE(encoder, torch.zeros(COUNT), decoder.T.contiguous(), torch.zeros(WIDTH), ReLU(), site=SITE)


def registry() -> Registry:
    found = Registry(SPEC)
    found.reserve(expected_banks(SPEC, Shape(WIDTH, torch.float32, range(1), 1)), torch.device("cpu"))
    return found


def test_what_was_detached_comes_back_to_its_own_places() -> None:
    own = registry()
    own.saes.attach("first", made(1), [1, 2])
    second = own.saes.attach("second", made(2), [3, 4], whole=True)
    before = own.tables.view("sae", SITE).clone()
    own.saes.detach("second")
    own.saes.detach("first")
    assert own.saes.adopt(second).slots == (2, 3)
    assert torch.equal(own.tables.view("sae", SITE)[2:4], before[2:4])
    with pytest.raises(SAEError, match="'second' of an autoencoder is taken"):
        own.saes.adopt(second)
    third = registry().saes.attach("third", made(3), [1], whole=True)
    with pytest.raises(TableFull, match="the places of 'third' are those of 'second'; detach that first"):
        own.saes.adopt(third)
    assert own.saes.attach("first", made(1), [1, 2]).slots == (0, 1)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_features_of_other_weights_have_another_digest(mode: str) -> None:
    own, found = registry(), list[Features]()
    steering = Steering(features=SAESteering("one", [FeatureClamp(1, 2.0)], mode=mode))
    for seed in (1, 2, 1):
        own.saes.attach("one", made(seed), [1], whole=True)
        found.append(own.contents(steering, "decode").features)
        own.saes.detach("one")
    first, second, again = (each.digest() for each in found)
    assert first == again != second
    assert [Features.of_data(each.to_data()) for each in found] == found


def test_tables_that_hold_nothing_take_any_weights() -> None:
    """A front end asks whether there is room; whether numbers fit is for those who write them."""
    own = Registry(SPEC)
    own.reserve(expected_banks(SPEC, Shape(WIDTH, torch.float32, range(1), 1)), torch.device("meta"))
    assert own.saes.attach("one", made(1), [1], whole=True).whole == 0
    assert own.saes.users("one") == 0
    own.saes.detach("one")
