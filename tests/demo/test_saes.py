"""The demo model's autoencoders: how they are trained, what is stored, and the loss of a model that they edit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts import sae_training
from scripts.sae_training import BANDWIDTH, JumpReLUTraining, Recipe, TopKTraining, Training, fit
from steer_compile import sae
from steer_compile.capture.consumer import make_consumer
from steer_compile.capture.dataset import RowDataset
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.demo.bytes_tokenizer import ByteTokenizer
from steer_compile.demo.inputs import bundled_model, read_styles
from steer_compile.demo.sae_loss import byte_losses, replaced
from steer_compile.errors import SpecError
from tests._models import WIDTH, llama, logits, tokens

KINDS: list[type[Training]] = [JumpReLUTraining, TopKTraining]
SITE = ("post_block", 0)


def sparse(n: int, width: int = 16, count: int = 24) -> Tensor:
    """Rows of two of a few directions each, off the origin and of another scale than training has."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    chosen = torch.rand(n, count, generator=generator).topk(2, dim=1).indices
    features = torch.zeros(n, count).scatter(1, chosen, 1 + torch.rand(n, 2, generator=generator))
    return 30 * (features @ directions + 0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowDataset:
    root, found = tmp_path_factory.mktemp("rows"), sparse(4096)
    with Pipeline({"disk": make_consumer("files", root=str(root))}, policy="block") as pipeline:
        pipeline.begin("all")
        labels = StepRows(("all",), np.zeros(len(found), np.int32), np.arange(len(found)), 0)
        pipeline.submit(labels, torch.arange(len(found)), {"layers.0.post_block": found})
        pipeline.end("all")
    return RowDataset(root, "layers.0.post_block")


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_sparse_directions(kind: type[Training], rows: RowDataset) -> None:
    torch.manual_seed(0)
    recipe = Recipe(features=48, k=4, l0_penalty=2e-2, steps=400, batch=256, lr=5e-3)
    made, record = fit(kind, recipe, rows, SITE, "tiny")
    test = rows.batch(range(len(rows)))
    f = made.encode(test)
    error = (test - made.decode(f)).square().sum() / (test - test.mean(0)).square().sum()
    assert error < 0.1
    assert (f > 0).sum(1).float().mean() < 8
    torch.testing.assert_close(made.W_dec.float().norm(dim=1), torch.ones(48), rtol=2e-3, atol=2e-3)
    assert record["curve"][-1]["square_error"] < record["curve"][0]["square_error"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_folded(kind: type[Training], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result on the model's rows is what training computes on scaled ones."""
    monkeypatch.setattr(sae_training, "STORED", torch.float32)
    torch.manual_seed(0)
    test, scale = sparse(64), 0.02
    training = kind(Recipe(48, 4, 1e-3, 1, 64, 1e-3), scale * test.mean(0))
    with torch.no_grad():
        training.b_enc.add_(0.01 * torch.randn(48))
        _, error, f = training.loss(scale * test, 0.5)
    made = training.result(scale)
    torch.testing.assert_close(scale * made.encode(test), f, rtol=1e-4, atol=1e-5)
    found = scale**2 * (test - made.decode(made.encode(test))).square().sum(1).mean()
    torch.testing.assert_close(found, error, rtol=1e-4, atol=1e-6)


def test_gradients_of_thresholds() -> None:
    """By hand: the first row is inside of the kernel and above, the second inside and below, the third far above."""
    near = BANDWIDTH / 4
    pre = torch.tensor([[1 + near], [1 - near], [3.0]], requires_grad=True)
    threshold = torch.tensor([1.0], requires_grad=True)
    (sae_training.jump(pre, threshold) * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
    assert pre.grad is not None
    assert threshold.grad is not None
    assert pre.grad.flatten().tolist() == [2.0, 0.0, 5.0]
    assert threshold.grad.item() == pytest.approx(-(2.0 + 3.0) / BANDWIDTH)
    pre.grad, before = None, threshold.grad.item()
    step = sae_training.step(pre, threshold)
    assert step.flatten().tolist() == [1.0, 0.0, 1.0]
    step.sum().backward()
    assert pre.grad is None
    assert threshold.grad.item() - before == pytest.approx(-2 / BANDWIDTH)


def test_dead_features_are_trained_by_what_is_missed() -> None:
    torch.manual_seed(0)
    training = TopKTraining(Recipe(48, 4, 0.0, 1, 64, 1e-3), torch.zeros(16))
    x = sparse(64) / 50
    training.loss(x, 0.0)[0].backward()
    assert training.W_enc.grad is not None
    alive = (training.W_enc.grad != 0).any(0)
    training.zero_grad()
    training.silent.copy_((~alive) * 1e9)
    assert training.dead().any()
    training.loss(x, 0.0)[0].backward()
    assert (training.W_enc.grad[:, training.dead()] != 0).any()


def test_stored_autoencoders_reconstruct_the_stream() -> None:
    """Of held-out passages, with the loss that the model card claims the size of."""
    from transformers import AutoModelForCausalLM

    folder = bundled_model()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    styles = read_styles(folder, None, None, 64, 1)
    long = [text for some in styles.passages for text in some if len(text.encode()) >= 100][::8]
    batch = torch.tensor([ByteTokenizer().encode(text)[:100] for text in long])
    ids, targets = batch[:, :-1], batch[:, 1:]
    plain = byte_losses(model, ids, targets).mean()
    saes = sae.load_all(folder / "saes", width=256)
    assert sorted(saes) == ["jumprelu-3", "topk-3", "topk-5"]
    for made in saes.values():
        assert made.site is not None
        with replaced(model, made.site, torch.zeros_like):
            zeroed = byte_losses(model, ids, targets).mean()
        with replaced(model, made.site, made.reconstruct):
            kept = byte_losses(model, ids, targets).mean()
        assert plain < kept < plain + 0.3
        assert (zeroed - kept) / (zeroed - plain) > 0.95
    assert byte_losses(model, ids, targets).mean() == plain


def test_loss_counts_bytes_alone() -> None:
    model, ids = llama(), tokens(2, 6)
    targets = torch.tensor([[3, -1, 5, 256, 7, 1], [0, 2, -100, 4, 300, 6]])
    found = byte_losses(model, ids, targets)
    spread = torch.log_softmax(logits(model, ids), -1)
    counted = [(b, t) for b in range(2) for t in range(6) if 0 <= targets[b, t] < 256]
    expected = torch.stack([-spread[b, t, targets[b, t]] for b, t in counted])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("site", [("post_attn", 0), ("post_block", 99), ("post_block", -1)])
def test_other_sites_are_refused(site: tuple[str, int]) -> None:
    with pytest.raises(SpecError, match="is not the output of a decoder layer"), replaced(llama(), site, lambda h: h):
        raise AssertionError("unreachable")


def test_an_edit_ends_with_its_block() -> None:
    model, ids = llama(), tokens(1, 4)
    plain = logits(model, ids)

    def broken(h: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with replaced(model, SITE, lambda h: h + torch.ones(WIDTH)):
        assert not torch.equal(logits(model, ids), plain)
    with pytest.raises(RuntimeError, match="inside"), replaced(model, SITE, broken):
        logits(model, ids)
    assert torch.equal(logits(model, ids), plain)
