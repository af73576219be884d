"""sae-lens loads from a hub what we push there, and the page's code for it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.hub import push
from unweave.sae import SAE, AbsTopK, Activation, BatchTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK, Transcoder
from unweave.synthetic import SyntheticModel, SyntheticModelConfig

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


ACTIVATIONS = [ReLU(), TopK(5), AbsTopK(5), BatchTopK(5), JumpReLU(), Gated(), MatchingPursuit(5)]
D_IN, D_SAE, HOOK, REPO = 16, 64, "blocks.1.hook_resid_post", "me/saes"


@torch.no_grad()
def randomise(sae: SAE) -> SAE:
    for name in ("b_enc", "b_dec", "b_mag", "r_mag", "W_skip"):
        if getattr(sae, name, None) is not None:
            getattr(sae, name).normal_(std=0.3)
    if sae.threshold is not None:
        sae.threshold.data = 0.3 + torch.rand(sae.threshold.shape)
    return sae


def compare(ours: SAE, theirs: Any) -> None:
    x = torch.randn(50, D_IN) * 2
    codes = theirs.encode(x)
    assert 0 < (codes != 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_sae_lens_loads_what_we_push(hub: Any, activation: Activation) -> None:
    import sae_lens

    ours = randomise(SAE(D_IN, D_SAE, activation, metadata={"hook_name": HOOK, "model_name": "gpt2"}))
    ours.push_to_hub(REPO)
    theirs = sae_lens.SAE.from_pretrained(REPO, HOOK)
    assert theirs.cfg.metadata.hook_name == HOOK
    compare(ours, theirs)
    compare(SAE.from_pretrained(REPO, HOOK), theirs)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU()], ids=lambda a: a.name)
def test_sae_lens_loads_our_transcoders(hub: Any, activation: Activation, skip: bool) -> None:
    import sae_lens

    metadata = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    ours = randomise(Transcoder(D_IN, 12, D_SAE, activation, skip=skip, metadata=metadata))
    ours.push_to_hub(REPO)
    compare(ours, sae_lens.SAE.from_pretrained(REPO, "blocks.1.hook_mlp_in"))


def test_the_page_s_code_for_sae_lens_runs(hub: Any, tmp_path: Path) -> None:
    saes = {}
    for layer in range(2):
        hook = f"blocks.{layer}.hook_resid_post"
        saes[hook] = randomise(SAE(D_IN, D_SAE, TopK(5), metadata={"hook_name": hook}))
        saes[hook].save(tmp_path / "run" / "saes" / hook / "00_topk")
    push(tmp_path / "run", REPO)
    text = hub.repos["model", REPO].files()["README.md"].decode()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sae_lens" in block]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    compare(saes["blocks.0.hook_resid_post"], namespace["sae"])


def test_sae_lens_loads_our_synthetic_models(hub: Any, tmp_path: Path) -> None:
    from sae_lens.synthetic import SyntheticModel as Theirs

    ours = SyntheticModel(SyntheticModelConfig(num_features=12, hidden_dim=6, seed=1))
    ours.save(tmp_path / "world")
    push(tmp_path / "world", "me/world", subfolder="small")
    theirs = Theirs.from_pretrained("me/world", "small")
    assert torch.equal(theirs.feature_dict.feature_vectors, ours.feature_dict.feature_vectors)


def test_we_load_what_sae_lens_uploads(hub: Any) -> None:
    import sae_lens

    cfg = sae_lens.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)
    theirs = sae_lens.JumpReLUSAE(cfg)
    with torch.no_grad():
        theirs.threshold.uniform_(0.1, 0.5)
        theirs.b_enc.normal_()
    sae_lens.upload_saes_to_huggingface({"layer_1": theirs}, hf_repo_id=REPO)
    compare(SAE.from_pretrained(REPO, "layer_1"), theirs)
    ours = randomise(SAE(D_IN, D_SAE, TopK(5), metadata={"hook_name": HOOK}))
    ours.push_to_hub(REPO)  # beside theirs, and on their page
    text = hub.repos["model", REPO].files()["README.md"].decode()
    assert "# SAEs for use with the SAELens library" in text
    assert re.findall(r"^\| \[`(.*?)`\]", text, re.MULTILINE) == [HOOK, "layer_1"]
