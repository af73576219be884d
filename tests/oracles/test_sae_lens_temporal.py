"""Temporal SAEs in sae-lens and here: each reads the other's files, and both give the same codes and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave import SAE
from unweave.sae import ReLU, Temporal, TemporalSAE, TopK

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE = 24, 96
KINDS = [
    (TopK(5), Temporal(n_heads=2, bottleneck=4)),
    (ReLU(), Temporal(n_heads=4, bottleneck=8, tied=False)),
    (TopK(7), Temporal(n_heads=3, n_layers=2, bottleneck=2, tied=False)),
]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 12, D_IN) * 2 + torch.randn(D_IN)


@torch.no_grad()
def randomise(sae: Any) -> None:
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (1 if parameter is sae.W_dec else parameter.shape[-1] ** -0.5))


def assert_equal(ours: SAE, theirs: Any, x: Tensor) -> None:
    """Equal novel codes, predicted codes and outputs."""
    assert isinstance(ours, TemporalSAE)
    with torch.no_grad():
        novel, predicted = theirs.encode_with_predictions(x)
        assert 0 < (novel != 0).float().mean() < 0.7
        assert predicted.norm() > 0.01 * novel.norm()
        torch.testing.assert_close(ours.encode(x), novel, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.predicted(x), predicted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.decode(novel), theirs.decode(novel), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("activation", "settings"), KINDS, ids=str)
def test_sae_lens_loads_ours(tmp_path: Path, x: Tensor, activation: Any, settings: Temporal) -> None:
    import sae_lens

    ours = TemporalSAE(D_IN, D_SAE, activation, settings).requires_grad_(False)
    randomise(ours)
    if not settings.tied:
        ours.W_enc.mul_(ours.encoder_scale)
    ours.scale = 0.3
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae"))
    assert theirs.cfg.architecture() == "temporal"
    assert_equal(ours, theirs, x)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(("activation", "settings"), KINDS, ids=str)
def test_we_load_theirs(
    tmp_path: Path, x: Tensor, activation: Any, settings: Temporal, apply_b_dec_to_input: bool
) -> None:
    from sae_lens.saes.temporal_sae import TemporalSAE as Theirs
    from sae_lens.saes.temporal_sae import TemporalSAEConfig

    topk = isinstance(activation, TopK)
    theirs = Theirs(
        TemporalSAEConfig(
            d_in=D_IN, d_sae=D_SAE, n_heads=settings.n_heads, n_attn_layers=settings.n_layers,
            bottleneck_factor=settings.bottleneck, sae_diff_type="topk" if topk else "relu",
            kval_topk=activation.k if topk else None, tied_weights=settings.tied,
            apply_b_dec_to_input=apply_b_dec_to_input, normalize_activations="constant_scalar_rescale",
            activation_normalization_factor=0.7,
        )
    )  # fmt: skip
    randomise(theirs)
    theirs.save_model(tmp_path / "sae")
    ours = SAE.load(tmp_path / "sae")
    assert ours.activation == activation
    assert_equal(ours, theirs, x)
    assert_equal(SAE.load(ours.save(tmp_path / "again")), theirs, x)
