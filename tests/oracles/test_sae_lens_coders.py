"""sae-lens reads our transcoders and predicts the same, and we read its transcoders and predict the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.sae import SAE, BatchTopK, Crosscoder, Gated, JumpReLU, ReLU, TopK, Transcoder

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_OUT, D_SAE = 24, 20, 96
CLASSES = {
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D_IN) * 2 + torch.randn(D_IN)


@torch.no_grad()
def randomise(coder: Any) -> None:
    """Weights, biases and thresholds that matter."""
    for name, parameter in coder.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) / (D_IN**0.5 if parameter.ndim == 2 else 1))
        if name == "threshold":
            parameter.copy_(0.3 + torch.rand(D_SAE))


def assert_equal(ours: SAE, theirs: Any, x: Tensor) -> None:
    """Equal codes, of which some are active, and equal predictions."""
    codes = theirs.encode(x)
    assert 0 < (codes != 0).float().mean() < 1
    assert theirs(x).shape == (len(x), D_OUT)
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), BatchTopK(5)], ids=lambda a: a.name)
def test_sae_lens_loads_ours(sae_lens: ModuleType, tmp_path: Path, x: Tensor, activation: Any, skip: bool) -> None:
    metadata = {"hook_name": "h.1.mlp:in", "hook_name_out": "h.1.mlp"}
    ours = Transcoder(D_IN, D_OUT, D_SAE, activation, skip=skip, metadata=metadata)
    randomise(ours)
    if isinstance(activation, BatchTopK):
        ours.threshold = torch.tensor(0.7)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "coder"))
    architecture = "skip_" * skip + "transcoder"
    assert theirs.cfg.architecture() == ("" if activation == ReLU() else "jumprelu_") + architecture
    assert theirs.cfg.metadata.hook_name_out == "h.1.mlp"
    assert_equal(ours, theirs, x)


@pytest.mark.parametrize("architecture", CLASSES)
def test_we_load_theirs(sae_lens: ModuleType, tmp_path: Path, x: Tensor, architecture: str) -> None:
    from sae_lens.saes import transcoder

    make = getattr(transcoder, CLASSES[architecture])
    config = getattr(transcoder, f"{CLASSES[architecture]}Config")
    theirs = make(config(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False))
    randomise(theirs)
    theirs.save_model(str(tmp_path / "theirs"))
    ours = SAE.load(tmp_path / "theirs")
    assert isinstance(ours, Transcoder)
    assert (ours.W_skip is None) == ("skip" not in architecture)
    assert_equal(ours, theirs, x)


@pytest.mark.parametrize("activation", [TopK(5), Gated()], ids=lambda a: a.name)
def test_sae_lens_refuses_what_it_does_not_have(sae_lens: ModuleType, tmp_path: Path, activation: Any) -> None:
    for coder in (Transcoder(D_IN, D_OUT, D_SAE, activation), Crosscoder({"a": D_IN, "b": D_OUT}, D_SAE, activation)):
        folder = coder.save(tmp_path / type(coder).__name__)
        with pytest.raises(Exception, match=r"_(trans|cross)coder"):
            sae_lens.SAE.load_from_disk(folder)


def test_sae_lens_reads_an_sae_of_hook_z_as_transformer_lens_gives_it(
    sae_lens: ModuleType, tmp_path: Path, x: Tensor
) -> None:
    ours = SAE(D_IN, D_SAE, ReLU(), metadata={"hook_name": "blocks.1.attn.hook_z"})
    randomise(ours)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "z"))
    heads = x.reshape(5, 10, 4, D_IN // 4)
    theirs_out = theirs(heads)
    assert theirs_out.shape == heads.shape
    torch.testing.assert_close(ours(x), theirs_out.reshape(x.shape), atol=1e-5, rtol=1e-5)
    theirs.save_model(str(tmp_path / "theirs"))
    torch.testing.assert_close(SAE.load(tmp_path / "theirs")(x), ours(x))
