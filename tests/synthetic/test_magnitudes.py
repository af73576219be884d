from dataclasses import dataclass

import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic.magnitudes import (
    ConstantMagnitudeConfig,
    ExponentialMagnitudeConfig,
    FoldedNormalMagnitudeConfig,
    LinearMagnitudeConfig,
    MagnitudeConfig,
    generate_magnitudes,
    positive_gaussian_moments,
)

CONFIGS = [
    ConstantMagnitudeConfig(2.0),
    LinearMagnitudeConfig(0.5, 2.0),
    ExponentialMagnitudeConfig(4.0, 0.25),
    FoldedNormalMagnitudeConfig(1.0, 0.5, 0.2, 1.5),
]


def test_shapes_by_hand():
    assert generate_magnitudes(3, 2).tolist() == generate_magnitudes(3, CONFIGS[0]).tolist() == [2.0] * 3
    torch.testing.assert_close(generate_magnitudes(4, CONFIGS[1]), torch.tensor([0.5, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(generate_magnitudes(5, CONFIGS[2]), torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25]))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.generator_name())
def test_every_config(config):
    assert MagnitudeConfig.from_dict(config.to_dict()) == config
    magnitudes = generate_magnitudes(7, config, seed=2)
    assert magnitudes.dtype == torch.float32
    assert torch.equal(magnitudes, generate_magnitudes(7, config, seed=2))
    single = generate_magnitudes(1, config, seed=2)
    assert single.shape == (1,)
    if isinstance(config, LinearMagnitudeConfig | ExponentialMagnitudeConfig):
        torch.testing.assert_close(single, torch.tensor([config.start]))


def test_folded_normal_moments():
    """|N(0, s)| has the mean s sqrt(2/pi) and the mean square s^2. Bounds of 5 standard errors: 6e-7 each."""
    n = 100_000
    x = generate_magnitudes(n, FoldedNormalMagnitudeConfig(0.0, 0.3), seed=0).double()
    assert float(x.mean()) == pytest.approx(0.3 * (2 / torch.pi) ** 0.5, abs=5 * float(x.std()) / n**0.5)
    assert float((x**2).mean()) == pytest.approx(0.09, abs=5 * float((x**2).std()) / n**0.5)


def test_folded_normal_bounds():
    x = generate_magnitudes(1000, FoldedNormalMagnitudeConfig(0.0, 1.0, 0.4, 0.9), seed=0)
    torch.testing.assert_close(torch.stack(x.aminmax()), torch.tensor([0.4, 0.9]))
    assert not torch.equal(x, generate_magnitudes(1000, FoldedNormalMagnitudeConfig(0.0, 1.0, 0.4, 0.9), seed=1))


@pytest.mark.parametrize(("mean", "std"), [(1.0, 0.1), (0.0, 1.0), (-2.0, 1.0), (-30.0, 1.0)])
def test_moments_of_a_positive_gaussian(mean, std):
    """Against the integral of the density over the positive half-line, far in the tail too."""
    x = torch.linspace(0, max(mean, 0) + 12 * std, 2_000_001, dtype=torch.float64)
    density = torch.exp(-((x - mean) ** 2 - min(mean, 0) ** 2) / (2 * std**2))  # its scale cancels
    total = torch.trapezoid(density, x)
    expected = [torch.trapezoid(density * x**k, x) / total for k in (1, 2)]
    for moment, value in zip(positive_gaussian_moments(torch.tensor(mean), torch.tensor(std)), expected, strict=True):
        assert float(moment) == pytest.approx(float(value), rel=1e-4)


def test_moments_without_spread():
    first, second = positive_gaussian_moments(torch.tensor([2.0, 0.5]), torch.tensor(0.0))
    assert first.tolist() == [2.0, 0.5]
    assert second.tolist() == [4.0, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: generate_magnitudes(0, 1.0), "num_features must be a whole number of at least 1, got 0"),
        (lambda: generate_magnitudes(2, -1.0), "magnitude must be a finite number at least 0, got -1"),
        (lambda: generate_magnitudes(2, "big"), "magnitude must be a finite number at least 0, got 'big'"),
        (lambda: ConstantMagnitudeConfig(-0.5), "value must be a finite number at least 0, got -0.5"),
        (lambda: LinearMagnitudeConfig(1.0, -2.0), "end must be a finite number at least 0, got -2"),
        (lambda: ExponentialMagnitudeConfig(0.0, 1.0), "start must be a finite number above 0, got 0"),
        (lambda: FoldedNormalMagnitudeConfig(std=-1), "std must be a finite number at least 0, got -1"),
        (
            lambda: FoldedNormalMagnitudeConfig(min_value=2, max_value=1),
            "max_value must be at least min_value=2, got 1",
        ),
        (lambda: FoldedNormalMagnitudeConfig(mean=float("nan")), "mean must be a finite number, got nan"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, 2.0], r"shape \(2,\) for num_features=3"), ([1.0, 2.0, -3.0], "generated the magnitude -3")],
)
def test_a_config_of_ones_own_is_checked(values, message):
    @dataclass
    class Listed(MagnitudeConfig):
        @classmethod
        def generator_name(cls):
            return "listed"

        def generate(self, num_features, seed=None):
            return torch.tensor(values)

    with pytest.raises(UnweaveError, match=message):
        generate_magnitudes(3, Listed())
