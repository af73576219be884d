"""Matching pursuit in sae-lens and here: each reads the other's files, and both choose and reconstruct alike."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from unweave import SAE
from unweave.sae import MatchingPursuit
from unweave.sae.files import save_training_form

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE = 24, 96
SETTINGS = [
    MatchingPursuit(k=5, residual_threshold=0.0),
    MatchingPursuit(k=12, residual_threshold=3.0),
    MatchingPursuit(k=40, residual_threshold=0.5, stop_at_repeat=False),
]


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture
def x() -> Tensor:
    return torch.randn(200, D_IN) * 2 + torch.randn(D_IN)


@torch.no_grad()
def our_sae(activation: MatchingPursuit) -> SAE:
    sae = SAE(D_IN, D_SAE, activation, metadata={"hook_name": "h.1"}).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(D_IN))
    return sae


def assert_equal(ours: SAE, theirs: object, x: Tensor) -> None:
    """Equal codes and reconstructions. In fp32, two atoms may be equally good for a token up to rounding."""
    codes = theirs.encode(x)  # type: ignore[attr-defined]
    assert 0 < (codes != 0).float().mean() < 0.5
    same = torch.isclose(ours.encode(x), codes, atol=1e-4, rtol=1e-4).all(1)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(ours.decode(codes), theirs.decode(codes), atol=1e-5, rtol=1e-5)  # type: ignore[attr-defined]
    torch.testing.assert_close(ours(x)[same], theirs(x)[same], atol=1e-4, rtol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("activation", SETTINGS, ids=str)
def test_sae_lens_loads_ours(sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: MatchingPursuit) -> None:
    ours = our_sae(activation)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae"))
    assert theirs.cfg.architecture() == "matching_pursuit"
    assert_equal(ours, theirs, x)
    save_training_form(ours, tmp_path / "training", {"decoder_init_norm": 1.0})
    trained = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
    assert trained.cfg.architecture() == "matching_pursuit"
    assert_equal(ours, trained, x)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("activation", SETTINGS, ids=str)
def test_we_load_theirs(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: MatchingPursuit, apply_b_dec_to_input: bool
) -> None:
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    config = MatchingPursuitSAEConfig(
        d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=apply_b_dec_to_input, max_iterations=activation.k,
        residual_threshold=activation.residual_threshold, stop_on_duplicate_support=activation.stop_at_repeat,
    )  # fmt: skip
    theirs = MatchingPursuitSAE(config)
    with torch.no_grad():
        theirs.W_dec.copy_(torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1))
        theirs.b_dec.copy_(torch.randn(D_IN))
    theirs.save_model(tmp_path / "sae")
    ours = SAE.load(tmp_path / "sae")
    assert ours.activation.k == activation.k
    assert_equal(ours, theirs, x)


def test_their_lack_of_a_limit_is_the_width(sae_lens: ModuleType, tmp_path: Path, x: Tensor) -> None:
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    theirs = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE, residual_threshold=1.0))
    theirs.save_model(tmp_path / "sae")
    ours = SAE.load(tmp_path / "sae")
    assert isinstance(ours.activation, MatchingPursuit)
    assert (ours.activation.k, ours.activation.residual_threshold) == (D_IN, 1.0)
    assert_equal(ours, theirs, x)


def test_equal_gradients(sae_lens: ModuleType, x: Tensor) -> None:
    """Of the squared error, for the dictionary, the bias and the inputs."""
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    config = MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE, max_iterations=6, residual_threshold=0.0, dtype="float64")
    theirs = MatchingPursuitSAE(config)
    with torch.no_grad():
        theirs.W_dec.copy_(torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1))
    ours = SAE(D_IN, D_SAE, MatchingPursuit(k=6)).double()
    ours.load_state_dict(theirs.state_dict())
    inputs = [x.double().requires_grad_() for _ in range(2)]
    for sae, each in zip((ours, theirs), inputs, strict=True):
        (sae(each) - each).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.W_dec.grad, theirs.W_dec.grad)
    torch.testing.assert_close(ours.b_dec.grad, theirs.b_dec.grad)
