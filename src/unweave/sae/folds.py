"""Exact changes of a trained SAE's units: they move a factor from one weight to another and change no output."""

from __future__ import annotations

import torch

from unweave._errors import UnweaveError
from unweave.sae.activation_fns import TopK
from unweave.sae.sae import SAE


@torch.no_grad()
def fold_input_scale(sae: SAE, scale: float) -> None:
    """Make an SAE that was trained on `scale * x` take `x`, in place. Codes stay what they were."""
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(scale)
    sae.b_dec.div_(scale)


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """Give every decoder row unit norm, in place; codes take the norms over, reconstructions stay.

    Rows of norm 0 stay as they are. Scaling a latent's code scales its threshold alike. A BatchTopK's one threshold
    can follow only a norm that all latents share.

    Raises:
        UnweaveError: If latents are ranked against each other (TopK, BatchTopK) and their norms differ, because the
            fold would change which of them win.
    """
    norms = sae.W_dec.double().norm(dim=1).to(sae.dtype)  # squares may leave the range of float32
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    ranked = isinstance(sae.activation, TopK) or sae.activation.threshold_shape == "scalar"
    if ranked and not torch.allclose(norms, norms[0], rtol=1e-4):
        raise UnweaveError(
            f"the decoder norms of this {sae.activation.name} SAE differ ({norms.min():.4g} to {norms.max():.4g}), so "
            "folding them would change which latents are selected."
        )
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
    if sae.threshold is not None:
        sae.threshold.mul_(norms if sae.threshold.ndim else norms[0])
    if sae.b_mag is not None:
        sae.b_mag.mul_(norms)  # r_mag is a factor, the same in every unit
