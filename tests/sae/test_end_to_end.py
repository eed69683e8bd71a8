"""Autoencoders beside a compiled model: features of its captures, and a decoder row that steers it as a vector."""

import torch

from steer_compile import TokenSelection, sae, steer_backend
from tests._models import WIDTH, compiled, llama, logits, spec, tokens

SITE, BEHIND = ("post_block", 0), ("pre_attn", 1)


def _tiny() -> sae.SAE:
    w_dec = torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    w_dec = torch.nn.functional.normalize(w_dec, dim=1)
    return sae.SAE(w_dec.T, torch.zeros(3 * WIDTH), w_dec, torch.zeros(WIDTH), sae.TopK(4), site=SITE)


def test_a_decoder_row_steers_as_a_vector() -> None:
    """An unconditional clamp of kind ``add`` is an ordinary vector, where nothing is normalised."""
    backend = steer_backend(spec("post_block", capture=("post_block", "pre_attn")), inner="eager")
    run, ids, tiny = compiled(llama(), backend), tokens(2, 5), _tiny()
    with backend.runtime.steer({SITE: 2.5 * tiny.W_dec[7]}), backend.runtime.capture() as log:
        logits(run, ids)
    steered = sae.steered_delta(log[SITE], tiny, [sae.FeatureClamp(7, 2.5, "add")])
    assert not torch.equal(steered, log[SITE])
    torch.testing.assert_close(log[BEHIND], steered)  # the same value, behind the steering of its first hook


def test_features_of_captured_rows() -> None:
    backend = steer_backend(spec(capture=("post_block",), capture_rows=10), inner="eager")
    run, ids, tiny = compiled(llama(), backend), tokens(2, 5), _tiny()
    prompt = TokenSelection(spans=((0, None),))
    with backend.runtime.capture(tokens=prompt, sites=[SITE]) as log:
        logits(run, ids)
    rows = log.rows
    found = sae.features(rows, tiny, top=4)
    torch.testing.assert_close(found.activations, tiny.encode(rows.values[tiny.key]).topk(4).values)
    assert found.positions.tolist() == [0, 1, 2, 3, 4] * 2
    assert found.token_ids.tolist() == ids.flatten().tolist()
