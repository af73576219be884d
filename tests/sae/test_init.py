import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae.init import data_directions, geometric_median, middle


def test_a_geometric_median_hardly_moves_with_outliers():
    """pitfall_121"""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    x[:20] = 1000.0
    median = geometric_median(x)
    assert median.norm() < 0.3
    assert x.mean(0).norm() > 50
    # At the median the unit vectors to all points cancel.
    towards = torch.nn.functional.normalize(x.double() - geometric_median(x.double()), dim=1)
    assert towards.mean(0).norm() < 1e-5


def test_geometric_medians_of_few_points():
    assert geometric_median(torch.tensor([[2.0, 1.0]])).tolist() == [2.0, 1.0]
    line = torch.tensor([[0.0], [1.0], [7.0]])  # the median of points on a line
    assert geometric_median(line).item() == pytest.approx(1.0, abs=1e-3)
    corner = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert geometric_median(corner).abs().max() < 1e-3
    with pytest.raises(UnweaveError, match="no activations"):
        geometric_median(torch.empty(0, 3))


def test_middles():
    """pitfall_122"""
    x = torch.randn(30, 3) + 1
    assert torch.equal(middle(x, "mean"), x.mean(0))
    assert torch.equal(middle(x, "zeros"), torch.zeros(3))
    assert torch.equal(middle(x, "geometric_median"), geometric_median(x))
    with pytest.raises(UnweaveError, match="'geometric_median'"):
        middle(x, "median")


def test_data_directions():
    """pitfall_123: the share acts; rows have unit norm and are near the data, each activation's direction used once."""
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)) + 5
    centred = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    for share, low, high in ((1.0, 0.999, 1.01), (0.8, 0.9, 0.999), (0.0, 0.0, 0.85)):
        rows = data_directions(x, 60, torch.Generator().manual_seed(1), share=share)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(60))
        best = (rows @ centred.T).max(1)
        assert low <= best.values.min() <= high
        if share >= 0.8:
            assert len(best.indices.unique()) == 60
    again = data_directions(x, 150, torch.Generator().manual_seed(1))
    assert again.shape == (150, 20)
    for bad in ({"share": 1.5}, {"x": x[:1]}):
        with pytest.raises(UnweaveError, match="share from 0 to 1"):
            data_directions(**{"x": x, "n": 5, "generator": torch.Generator()} | bad)
