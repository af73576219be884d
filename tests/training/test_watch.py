"""Warnings appear when something goes wrong, and only then."""

import pytest
import torch

from unweave.activations.cache.foreign import MappedStore
from unweave.sae import SAE, Temporal, TiedDictionary, TopK
from unweave.training import SAEConfig, Start, TrainConfig, train, train_on
from unweave.training.progress import Progress
from unweave.training.watch import outlier_dimension, warnings_for


def rows(**columns):
    """Eight logged rows of a healthy run, with some columns replaced (a value, or one for each row)."""
    healthy = {"dead": 0.01, "l0": 32.0, "explained_variance": 0.8, "threshold": [0.1 + 0.01 * i for i in range(8)]}
    return [
        {"tokens": 100 * (i + 1), "total_tokens": 1000}
        | {name: v[i] if isinstance(v, list) else v for name, v in (healthy | columns).items()}
        for i in range(8)
    ]


def test_a_healthy_run_is_left_in_peace():
    assert warnings_for(rows()) == []
    assert warnings_for(rows(target_l0=30.0)) == []
    assert warnings_for(rows(explained_variance=None)) == []
    assert warnings_for(rows(dead=0.9)[:3]) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"dead": [0.1 * i for i in range(8)]}, "70% of the latents are dead and rising"),  # pitfall_118
        ({"dead": 0.37}, "37% of the latents are dead and not falling"),
        ({"l0": 200.0, "target_l0": 32.0}, "L0 is flat at 200, the target is 32: try a higher sparsity coefficient"),
        (
            {"l0": 200.0, "target_l0": 32.0, "coefficient": [1.0 + i for i in range(8)]},
            "L0 is flat at 200, the target is 32: try a higher learning rate",
        ),
        ({"l0": 200.0, "target_l0": 32.0, "threshold": 0.1}, "threshold is not moving"),  # pitfall_059
        ({"l0": 0.1}, "hardly any latent fires"),
        ({"explained_variance": -0.5}, "explained variance is -0.50"),
    ],
)
def test_what_goes_wrong_is_said(columns, message):
    assert any(message in warning for warning in warnings_for(rows(**columns)))


def test_a_controlled_run_without_thresholds():
    history = rows(target_l0=30.0)
    for row in history:
        del row["threshold"]
    assert warnings_for(history) == []


def activations(n=200, d=20, outlier=0.0):
    """Of unit variance, but that one token of ten is far off in dimension 3."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x[::10, 3] += outlier
    return x


def test_an_outlier_dimension_is_pointed_out():
    """pitfall_124: with its share of the variance and its kurtosis, which is 8.1 of one token in ten."""
    warning = outlier_dimension(activations(outlier=100.0), whitens=True)
    assert "dimension 3 holds 98% of the variance (its kurtosis is 8.1" in warning
    assert "normalize='whiten'" in warning
    assert outlier_dimension(1e4 * activations(outlier=100.0) + 7, whitens=True) == warning
    for x in (activations(), activations(outlier=8.0), torch.ones(200, 20), activations(8), activations(d=4)):
        assert outlier_dimension(x, whitens=True) is None


def test_it_is_said_once_and_not_where_it_is_whitened(monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, message: said.append(message))
    batches = 3 * [activations(outlier=100.0)]
    for normalize, times in (("whiten", 0), ("scalar", 1)):
        train_on(batches, [SAEConfig(d_sae=40, normalize=normalize)], progress=False)
        assert len(said) == times
    train_on(batches, [SAEConfig(d_sae=40), SAEConfig(d_sae=50)], progress=False)
    assert len(said) == 2
    assert said[0].startswith("warning: dimension 3 holds")


@pytest.mark.parametrize(
    ("config", "whitens"),
    [
        (SAEConfig(d_sae=40, glu=True), True),
        (SAEConfig(d_sae=40, dictionary=TiedDictionary()), False),
        (SAEConfig(d_sae=40, activation=TopK(2), temporal=Temporal(20, 2, 1, 4)), False),
        (SAEConfig(d_sae=40, coder="transcoder"), False),
    ],
)
def test_only_what_a_coder_takes_is_suggested(config, whitens, monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, message: said.append(message))
    x = activations(outlier=100.0)
    train_on([(x, x) if config.coder == "transcoder" else x], [config], progress=False)
    assert len(said) == 1
    assert ("normalize='whiten'" in said[0]) == whitens
    assert "the output of the norm that comes next" in said[0]


def test_nothing_is_said_of_a_decoder_that_is_fine_tuned(monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, message: said.append(message))
    store = MappedStore("mine", {"here": [activations(outlier=100.0)]}, {}, {"name": "mine"})
    config = TrainConfig(hooks=("here",), tokens=200, batch_size=100, start=Start(method="scale"))
    train(config, data=store, start=SAE(20, 40, TopK(4)), progress=False)
    assert not said
