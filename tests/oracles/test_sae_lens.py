"""sae-lens reads our files and computes the same, and we read its files and compute the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.sae import SAE, AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TanhReLU, TopK

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE = 24, 96
ACTIVATIONS = [ReLU(), TopK(k=5), AbsTopK(k=5), BatchTopK(k=5), JumpReLU(), Gated()]


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D_IN) * 2 + torch.randn(D_IN)


@torch.no_grad()
def randomise(sae: Any) -> None:
    """Biases, gains, thresholds and decoder norms that matter."""
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if getattr(sae, name, None) is not None:
            getattr(sae, name).copy_(torch.randn(D_SAE) * 0.5)
    sae.b_dec.copy_(torch.randn(D_IN))
    sae.W_enc.copy_(torch.randn(D_IN, D_SAE) / D_IN**0.5)
    sae.W_dec.copy_(torch.randn(D_SAE, D_IN) / D_IN**0.5)


def our_sae(activation: Any, *, apply_b_dec_to_input: bool) -> SAE:
    sae = SAE(D_IN, D_SAE, activation, apply_b_dec_to_input=apply_b_dec_to_input, metadata={"hook_name": "h.1"})
    randomise(sae)
    if sae.threshold is not None:
        sae.threshold.data = 0.3 + torch.rand(sae.threshold.shape)
    return sae


def assert_equal(ours: SAE, theirs: Any, x: Tensor) -> None:
    """Equal codes and reconstructions, of codes that are neither empty nor full."""
    codes = theirs.encode(x)
    assert 0 < (codes != 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(codes), theirs.decode(codes), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_sae_lens_loads_ours(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: Any, apply_b_dec_to_input: bool
) -> None:
    ours = our_sae(activation, apply_b_dec_to_input=apply_b_dec_to_input)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae"))
    expected = {"relu": "standard", "batchtopk": "jumprelu"}.get(activation.name, activation.name)
    assert theirs.cfg.architecture() == expected
    assert theirs.cfg.metadata.hook_name == "h.1"
    assert_equal(ours, theirs, x)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_sae_lens_loads_our_training_form(sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: Any) -> None:
    from unweave.sae.files import save_training_form

    ours = our_sae(activation, apply_b_dec_to_input=True)
    theirs = sae_lens.TrainingSAE.load_from_disk(save_training_form(ours, tmp_path / "sae", {}))
    assert theirs.cfg.architecture() == {"relu": "standard"}.get(activation.name, activation.name)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(ours.encode(x)), atol=1e-5, rtol=1e-5)


def test_sae_lens_loads_our_matryoshka_training_form(sae_lens: ModuleType, tmp_path: Path, x: Tensor) -> None:
    from unweave.sae.files import save_training_form

    ours = our_sae(BatchTopK(k=5), apply_b_dec_to_input=True)
    ours.metadata["matryoshka_widths"] = [8, 32, D_SAE]
    theirs = sae_lens.TrainingSAE.load_from_disk(save_training_form(ours, tmp_path / "training", {}))
    assert theirs.cfg.architecture() == "matryoshka_batchtopk"
    assert theirs.cfg.matryoshka_widths == [8, 32, D_SAE]
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(ours.encode(x)), atol=1e-5, rtol=1e-5)
    assert_equal(ours, sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae")), x)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_sae_lens_normalises_tokens_alike(sae_lens: ModuleType, tmp_path: Path, x: Tensor, kind: Any) -> None:
    ours = our_sae(TopK(k=5), apply_b_dec_to_input=True)
    ours.per_token = kind
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae"))
    codes = theirs.encode(x)
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [GroupMax(k=6), TanhReLU()], ids=lambda a: a.name)
def test_sae_lens_refuses_what_it_does_not_have(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: Any
) -> None:
    """It must not take them for another architecture."""
    folder = our_sae(activation, apply_b_dec_to_input=True).save(tmp_path / "sae")
    with pytest.raises(Exception, match=activation.name):
        sae_lens.SAE.load_from_disk(folder)


def test_jumprelu_gradients_are_theirs(sae_lens: ModuleType, x: Tensor) -> None:
    """Of thresholds and, where the window reaches the input, of the encoder."""
    for to_input in (False, True):
        config = sae_lens.JumpReLUTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.4, jumprelu_ste_to_input=to_input
        )
        theirs = sae_lens.JumpReLUTrainingSAE(config)
        randomise(theirs)
        ours = SAE(D_IN, D_SAE, JumpReLU(0.4, 0.5, ste_to_input=to_input))
        ours.load_state_dict({name: getattr(theirs, name).detach() for name in ours.state_dict()})
        ours.training_codes(x).codes.to_dense().square().sum().backward()
        theirs.encode_with_hidden_pre(x)[0].square().sum().backward()
        for name in ("threshold", "W_enc", "b_enc"):
            grad, expected = getattr(ours, name).grad, getattr(theirs, name).grad
            assert expected.abs().max() > 0
            torch.testing.assert_close(grad, expected, atol=1e-3, rtol=1e-4)


def their_sae(sae_lens: ModuleType, kind: str, **config: Any) -> Any:
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(d_in=D_IN, d_sae=D_SAE, **config))
    randomise(sae)
    if kind.startswith("JumpReLU"):
        sae.threshold.data = 0.3 + torch.rand(D_SAE)
    if "BatchTopK" in kind:
        sae.topk_threshold = torch.tensor(0.4, dtype=torch.double)
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("StandardSAE", {}),
        ("TopKSAE", {"k": 5}),
        ("AbsTopKSAE", {"k": 5}),
        ("TopKSAE", {"k": 5, "normalize_activations": "layer_norm"}),
        ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
        ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("JumpReLUSAE", {}),
        ("GatedSAE", {}),
    ],
    ids=["standard", "topk", "abstopk", "topk-layer-norm", "standard-rescaled", "topk-rescaled", "jumprelu", "gated"],
)
def test_we_load_theirs(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor, kind: str, config: dict[str, Any], apply_b_dec_to_input: bool
) -> None:
    theirs = their_sae(sae_lens, kind, apply_b_dec_to_input=apply_b_dec_to_input, **config)
    theirs.save_model(tmp_path)
    ours = SAE.load(tmp_path)
    assert ours.apply_b_dec_to_input == apply_b_dec_to_input
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("BatchTopKTrainingSAE", {}), ("MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [8, 32, D_SAE]})],
    ids=["batchtopk", "matryoshka"],
)
def test_we_load_their_batchtopk_training_checkpoint(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor, kind: str, config: dict[str, Any], rescale: bool
) -> None:
    training = their_sae(sae_lens, kind, k=5, rescale_acts_by_decoder_norm=rescale, **config)
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert_equal(SAE.load(tmp_path / "inference"), theirs, x)
    assert_equal(SAE.load(tmp_path / "training"), theirs, x)
    assert SAE.load(tmp_path / "training").metadata.get("matryoshka_widths") == config.get("matryoshka_widths")
