"""What sae-lens saves in bfloat16 loads here, and gives what sae-lens gives, and the other way around.

Sums are rounded elsewhere in the two libraries, so codes are compared within bfloat16's rounding; and exactly where
both compute in float32 with the weights of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.sae import SAE

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE, WIDTHS = 24, 96, [8, 32, 96]
RANKED: dict[str, Any] = {"k": 5, "rescale_acts_by_decoder_norm": True}
SAES: dict[str, dict[str, Any]] = {
    "StandardSAE": {}, "GatedSAE": {}, "TopKSAE": RANKED, "AbsTopKSAE": {"k": 5}, "JumpReLUSAE": {},
    "BatchTopKTrainingSAE": RANKED, "MatryoshkaBatchTopKTrainingSAE": RANKED | {"matryoshka_widths": WIDTHS},
    "MatchingPursuitSAE": {"max_iterations": 5, "residual_threshold": 0.0},
    "TemporalSAE": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 5, "sae_diff_type": "topk"},
    "Transcoder": {}, "SkipTranscoder": {}, "JumpReLUTranscoder": {}, "JumpReLUSkipTranscoder": {},
}  # fmt: skip


@torch.no_grad()
def their_sae(kind: str) -> Any:
    import sae_lens

    config: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "bfloat16", **SAES[kind]}
    if "Transcoder" in kind:
        config |= {"d_out": 12, "apply_b_dec_to_input": False}
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**config))
    for name, parameter in sae.named_parameters():
        if not name.startswith("attn_layers"):
            parameter.copy_(torch.randn(parameter.shape) / D_IN**0.5)
        if name.endswith("threshold"):
            parameter.copy_(0.1 + torch.rand(parameter.shape))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.4)
    return sae


@pytest.mark.parametrize("kind", SAES)
def test_we_load_theirs(kind: str, tmp_path: Path) -> None:
    import sae_lens

    theirs, x = their_sae(kind), torch.randn(2, 40, D_IN)
    theirs.save_model(tmp_path / "sae")
    forms = ["sae"]
    if hasattr(theirs, "save_inference_model"):  # sae-lens loads no training form as an SAE
        theirs.save_inference_model(tmp_path / "inference")
        forms.append("inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / forms[-1])
    codes, outputs = theirs.encode(x.bfloat16()).float(), theirs(x.bfloat16()).float()
    assert 0 < (codes != 0).float().mean() < 1
    for form in forms:
        ours = SAE.load(tmp_path / form)
        assert ours.dtype == torch.bfloat16
        own = ours.encode(x.bfloat16()).float()
        both = (own != 0) & (codes != 0)
        assert both.sum() >= 0.95 * torch.maximum((own != 0).sum(), (codes != 0).sum())
        assert (own - codes)[both].norm() < 0.05 * codes.norm()
        assert (ours(x.bfloat16()).float() - outputs).norm() < 0.1 * outputs.norm()

    config = tmp_path / forms[-1] / "cfg.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    theirs, ours = sae_lens.SAE.load_from_disk(config.parent), SAE.load(config.parent, dtype=torch.float32)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
