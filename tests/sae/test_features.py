"""Features of captured rows: the largest of each token, with its labels."""

from dataclasses import replace

import pytest
import torch

from steer_compile.capture.rows import Rows
from steer_compile.errors import SAEError, SiteNotFound
from steer_compile.sae import SAE, BatchTopK, ReLU, TopK, features, logged
from tests.sae import _weights
from tests.sae._weights import WIDTH


def _rows(n: int = 7, dtype: torch.dtype = torch.float32, key: str = "layers.2.post_block") -> Rows:
    position = torch.arange(n)
    request = (position % 2).to(torch.int32)
    return Rows(("a", "b"), request, position // 2, position + 50, position * 0, {key: _weights.rows(n).to(dtype)})


@pytest.mark.parametrize("batch", [None, 1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_features_of_each_token(batch: int | None, dtype: torch.dtype) -> None:
    rows, sae = _rows(dtype=dtype), _weights.sae(ReLU())
    found = features(rows, sae, top=4, batch=batch)
    f = sae.encode(rows.values["layers.2.post_block"])
    for row in range(len(rows)):
        order = sorted(range(10), key=lambda i, row=row: (-float(f[row, i]), i))[:4]  # type: ignore[misc]
        active = [i for i in order if f[row, i] > 0]
        assert found.indices[row].tolist() == active + [-1] * (4 - len(active))
        expected = torch.tensor([float(f[row, i]) for i in order])
        torch.testing.assert_close(found.activations[row], expected)
    assert found.requests == ("a", "b")
    for name in ("request", "positions", "token_ids", "steps"):
        assert torch.equal(getattr(found, name), getattr(rows, name))
    assert len(found) == 7


def test_ties_go_to_the_lowest_index_and_nan_first() -> None:
    eye = torch.eye(WIDTH)
    sae = SAE(eye, torch.zeros(WIDTH), eye, torch.zeros(WIDTH), ReLU(), site=_weights.SITE)
    h = torch.tensor([[1.0, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [torch.nan] * 6])
    n = torch.zeros(3, dtype=torch.int64)
    rows = Rows(("a",), n.to(torch.int32), n, n, n, {"layers.2.post_block": h})
    found = features(rows, sae, top=4)
    assert found.indices.tolist() == [[1, 2, 4, 0], [-1] * 4, [0, 1, 2, 3]]
    assert found.activations[:2].tolist() == [[2, 2, 2, 1], [0] * 4]
    assert bool(found.activations[2].isnan().all())
    infinite = torch.tensor([[1.0, torch.inf, 0, 0, 0, 0]])  # infinity times 0 is NaN in every other feature
    one = replace(rows.take(torch.tensor([0])), values={sae.key: infinite})
    assert features(one, sae, top=3).indices.tolist() == [[0, 1, 2]]


def test_no_rows() -> None:
    found = features(_rows(0), _weights.sae(TopK(2)), top=3)
    assert (found.indices.shape, found.activations.shape, len(found)) == ((0, 3), (0, 3), 0)


def test_a_site_that_the_file_does_not_say() -> None:
    sae = _weights.sae(site=None)
    with pytest.raises(SAEError, match=r"does not say which site.*give features\(..., site="):
        features(_rows(), sae, top=2)
    given = features(_rows(), sae, top=2, site="blocks.2.hook_resid_post")
    assert torch.equal(given.indices, features(_rows(), _weights.sae(), top=2).indices)


def test_refusals() -> None:
    sae = _weights.sae()
    with pytest.raises(
        SiteNotFound, match=r"layers.2.post_block of tiny is not captured; captured are layers.3.attn_in"
    ):
        features(_rows(key="layers.3.attn_in"), sae, top=2)
    with pytest.raises(SAEError, match="belongs to layers.2.post_block, not to"):
        features(_rows(), sae, top=2, site=("attn_in", 3))
    with pytest.raises(SAEError, match=r"rows of shape \(7, 3\).*takes \(n, 6\)"):
        features(replace(_rows(), values={sae.key: torch.zeros(7, 3)}), sae, top=2)
    for top in (0, 11):
        with pytest.raises(SAEError, match="give top=1 to 10"):
            features(_rows(), sae, top=top)
    with pytest.raises(SAEError, match="batches of 0 rows"):
        features(_rows(), sae, top=2, batch=0)
    with pytest.raises(SAEError, match="depend on the batch"):
        features(_rows(), _weights.sae(BatchTopK(2)), top=2)


def test_a_log_has_indices_then_activations() -> None:
    values = torch.tensor([[7.0, 2.0, 1.5, 0.5], [16777215.0, -1.0, 3.0, 0.0]])
    indices, activations = logged(values)
    assert indices.tolist() == [[7, 2], [16777215, -1]]
    assert activations.tolist() == [[1.5, 0.5], [3.0, 0.0]]
    for other in (values[0], values[:, :3], values.double()):
        with pytest.raises(SAEError, match=r"are no log of features; give those of a key that ends in \.features"):
            logged(other)
