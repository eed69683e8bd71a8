"""The tiny models and the eager oracle that the coverage table is made with."""

from collections.abc import Iterator

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steer_compile.coverage import oracle, zoo, zoo_overrides

BLOCKS = {
    "bart": 3,
    "blt": 6,  # three of the local encoder, three of the local decoder
    "deepseek_v3": 3,
    "deepseek_v4": 3,  # four streams side by side
    "gemma3n_text": 4,  # four streams in front
    "gemma4_text": 3,
    "gpt2": 3,
    "granite": 3,
    "hrm_text": 12,  # four modules, run again and again
    "llama": 3,
    "mamba": 3,
    "nemotron_h": 4,
    "rwkv": 3,
    "xlm": 3,  # parallel lists of parts instead of blocks
    "xlnet": 3,  # length before batch
    "zamba2": 4,
}

PLAIN = ["hidden_states[1]", "hidden_states[2]", "final norm applied"]

AGREEMENT = {
    "bart": ["hidden_states[1]", "hidden_states[2]", "hidden_states[3]"],
    "deepseek_v4": ["hidden_states[1]", "hidden_states[2]", "final modules applied: hc_head norm"],
    "gpt2": PLAIN,
    "llama": PLAIN,
    "mamba": ["hidden_states[0]", "hidden_states[1]", "hidden_states[2]"],
    "rwkv": ["hidden_states[0]", "hidden_states[1] scaled by 0.5", "hidden_states[2]"],
    "xlnet": [f"hidden_states[{layer + 1}] transposed" for layer in range(3)],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small for more, and threads that wait for each other slow a busy machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_type_of_the_mapping_is_listed_and_no_other_is_special() -> None:
    assert set(zoo.model_types()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert list(zoo.model_types()) == sorted(zoo.model_types())
    special = {name.partition(".")[0] for name in (*zoo_overrides.OVERRIDES, *zoo_overrides.NESTED)}
    assert special <= set(zoo.model_types())


@pytest.mark.parametrize("model_type", BLOCKS)
def test_a_tiny_model_runs_and_every_block_does_something(model_type: str) -> None:
    row = oracle.check(model_type)
    assert row["finite"]
    assert row["blocks"] == BLOCKS[model_type]
    assert row["least_change"] > 0.1  # relative to the stream that enters
    assert row["edit_shows"]
    assert row["agreement"] == AGREEMENT.get(model_type, row["agreement"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.model_types())
def test_every_type_runs(model_type: str) -> None:
    row = oracle.check(model_type)
    assert row["finite"]
    assert row["blocks"] >= 3
    assert row["least_change"] > 0.05
    assert row["edit_shows"]


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "mixtral"])
def test_weights_follow_the_seed_and_none_is_neutral(model_type: str) -> None:
    model, again, other = (zoo.tiny_model(model_type, seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
        assert a.std() > 0.02, name  # norms of ones and biases of zeros would have none


def test_scaling_buffers_are_not_one() -> None:
    scalars = {name: value for name, value in zoo.tiny_model("gemma4_text").named_buffers() if "layer_scalar" in name}
    assert len(scalars) == 3
    assert all(abs(float(value) - 1) > 0.05 for value in scalars.values())


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    zoo.tiny_inputs(zoo.tiny_model("llama"), "llama")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("model_type", ["gpt2", "xlnet", "xlm", "hrm_text", "zamba2"])
def test_an_edit_changes_the_stream_behind_its_block_only(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    inputs = zoo.tiny_inputs(model, model_type)
    plain = oracle.reference_states(model, inputs)
    with oracle.edit_block_output(model, 1, lambda stream: -2 * stream, inputs):
        edited = oracle.reference_states(model, inputs)
    torch.testing.assert_close(edited.post[1], -2 * plain.post[1])
    assert torch.equal(edited.post[0], plain.post[0])
    assert not torch.equal(edited.post[2], plain.post[2])
    assert torch.equal(oracle.reference_states(model, inputs).logits, plain.logits)


def test_an_edit_that_changes_nothing_keeps_the_logits() -> None:
    model = zoo.tiny_model("qwen2")
    inputs = zoo.tiny_inputs(model, "qwen2")
    with oracle.edit_block_output(model, -1, torch.clone), torch.no_grad():
        edited = oracle.logits_of(model(**inputs))
    assert torch.equal(edited, oracle.reference_states(model, inputs).logits)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    model = zoo.tiny_model("llama")
    with pytest.raises(IndexError), oracle.edit_block_output(model, 3, torch.clone):
        pass
