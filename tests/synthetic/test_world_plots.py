"""Pictures of worlds: firing rates, correlations, superposition."""

import numpy as np
import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.world_plots import cluster_order, plot_firing_correlations, plot_firing_rates, plot_superposition


def binomial(samples, rates):
    return torch.from_numpy(np.random.default_rng(0).binomial(samples, rates.numpy()))


@pytest.mark.parametrize(
    "rates",
    [
        torch.logspace(-4, -0.5, 100), torch.full((50,), 0.1875), torch.full((1,), 0.01), torch.ones(3),
        torch.tensor([1e-6, 2e-6]), torch.logspace(-5, -1, 5000), torch.linspace(0.02, 0.06, 20),
    ],
    ids=["wide", "equal", "one", "certain", "never", "many", "narrow"],
)  # fmt: skip
def test_firing_rates_are_readable(rates, assert_readable):
    assert_readable(plot_firing_rates(rates, binomial(10_000, rates), 10_000, "a world"))


def test_firing_rates_show_the_data():
    rates = torch.tensor([0.5, 0.011, 1e-7])
    figure = plot_firing_rates(rates, torch.tensor([480, 12, 0]), 1000)
    left, right = figure.axes
    (points,) = (line for line in left.lines if line.get_label() == "feature")
    np.testing.assert_allclose(points.get_xdata(), [0.5, 0.011], rtol=1e-6)
    np.testing.assert_allclose(points.get_ydata(), [0.48, 0.012])
    assert [t.get_text() for t in left.texts] == ["1 never fired (not shown)"]
    assert "2 features" in right.get_title()
    # -20 of 500 and +1 of 11 expected firings are -1.26 and +0.30 standard errors.
    heights, edges = zip(*((bar.get_height(), bar.get_x()) for bar in right.patches), strict=True)
    filled = [edge for height, edge in zip(heights, edges, strict=True) if height > 0]
    width = right.patches[0].get_width()
    assert len(filled) == 2
    assert filled[0] <= -1.265 <= filled[0] + width
    assert filled[1] <= 0.303 <= filled[1] + width


def test_many_features_are_drawn_as_a_density():
    rates = torch.logspace(-4, -1, 10_000)
    figure = plot_firing_rates(rates, binomial(100_000, rates), 100_000)
    (density,) = figure.axes[0].collections[1:]
    assert 0 < density.get_array().sum() <= 10_000
    assert not any(line.get_label() == "feature" for line in figure.axes[0].lines)


def blocks(n=12):
    """Two groups, interleaved: correlated within, anticorrelated between."""
    sign = torch.tensor([1.0, -1.0]).repeat(n // 2)
    return (0.4 * sign[:, None] * sign).fill_diagonal_(1)


def test_correlations_are_clustered():
    order = cluster_order(blocks())
    sides = order % 2
    assert sorted(order) == list(range(12))
    assert np.abs(np.diff(sides)).sum() == 1  # one group after the other
    assert cluster_order(torch.eye(2)).tolist() == [0, 1]


def test_correlations_show_the_data(assert_readable):
    requested, measured = blocks(), blocks() * 0.5
    figure = plot_firing_correlations(measured, requested, "a world")
    panels = [axes.images[0] for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["requested", "measured"]
    order = cluster_order(requested)
    for image, matrix in zip(panels, (requested, measured), strict=True):
        shown = image.get_array()
        assert np.isnan(shown.filled(np.nan).diagonal()).all()
        off = ~np.eye(12, dtype=bool)
        np.testing.assert_allclose(shown.filled(np.nan)[off], matrix.numpy()[np.ix_(order, order)][off])
        assert image.norm.vmin == -image.norm.vmax == pytest.approx(-0.4)
    assert_readable(figure)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_correlations_of_any_size(n, assert_readable):
    measured = torch.corrcoef(torch.randn(n, 50)).reshape(n, n)
    measured[0] = float("nan")  # a feature that never fired
    assert_readable(plot_firing_correlations(measured))


def test_superposition(assert_readable, tmp_path):
    features = FeatureDictionary(300, 16, seed=0).feature_vectors
    figure = plot_superposition(features, torch.linspace(0.2, 0.9, 50), "a world", save_path=tmp_path / "s.png")
    assert figure.axes[0].get_title() == "300 features in 16 dimensions (first 128)"
    assert "0.550 (line), of a sample of 50" in figure.axes[1].get_title()
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 50
    assert_readable(figure)
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_firing_rates(torch.ones(3), torch.ones(2), 5), r"\(3,\) .* \(2,\)"),
        (lambda: plot_firing_rates(torch.ones(3), torch.ones(3), 0), "samples.*0"),
        (lambda: plot_firing_correlations(torch.ones(3, 2)), r"square.*\(3, 2\)"),
        (lambda: plot_firing_correlations(torch.eye(3), torch.eye(2)), r"\(2, 2\).*\(3, 3\)"),
        (lambda: plot_superposition(torch.eye(3), torch.ones(3), save_path="p.gif"), "p.gif"),
    ],
)
def test_bad_input(draw, message):
    with pytest.raises(UnweaveError, match=message):
        draw()
