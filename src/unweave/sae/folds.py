"""Exact changes of a trained SAE's units: they move a factor from one weight to another and change no output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae.clt import CrossLayerTranscoder
from unweave.sae.coders import Transcoder
from unweave.sae.normalization import Normalization
from unweave.sae.sae import SAE
from unweave.sae.temporal import TemporalSAE

_ROWS = 256
"""Of a matrix that are worked on at a time."""


@torch.no_grad()
def fold_input_scale(
    sae: SAE, scale: float | Float[Tensor, " d_in"], target_scale: float | Float[Tensor, " d_out"] | None = None
) -> None:
    """Make an SAE that was trained on `scale * x` take `x`, in place. Codes stay what they were, but of tied SAEs.

    A tied SAE has one matrix for both ways, so its weights stay instead and its codes are divided by the scale.

    Args:
        sae: The SAE, or another coder.
        scale: One factor, or one for each dimension (those of a crosscoder's hooks).
        target_scale: Of a transcoder, the factor (or factors) of what it was trained to predict; None: `scale`.

    Raises:
        UnweaveError: If a tied SAE's codes do not scale with its inputs (TanhReLU).
    """
    _refuse_temporal(sae)
    if sae.tied:
        _fold_scale_of_tied(sae, scale)
        return
    if isinstance(scale, Tensor):
        scale = scale.to(sae.device)
    if isinstance(target_scale, Tensor):
        target_scale = target_scale.to(sae.device)
    sae.scale_encoder(scale)
    fold_output_scale(sae, scale, target_scale)


@torch.no_grad()
def fold_output_scale(
    sae: SAE, scale: float | Float[Tensor, " d_in"], target_scale: float | Float[Tensor, " d_out"] | None = None
) -> None:
    """The part of `fold_input_scale` behind the codes, in place: the decoder, its bias and a skip, of untied coders."""
    out = scale if target_scale is None else target_scale
    for block in sae.decoders:
        block.div_(out[-block.shape[1] :] if isinstance(out, Tensor) else out)
    sae.b_dec.div_(out)
    if isinstance(sae, Transcoder) and sae.W_skip is not None:
        sae.W_skip.mul_(scale).div_(out[:, None] if isinstance(out, Tensor) else out)
    if isinstance(sae, CrossLayerTranscoder) and sae.W_skip is not None:
        sae.W_skip.mul_(scale.view(sae.layers, -1, 1) if isinstance(scale, Tensor) else scale)
        sae.W_skip.div_(out.view(sae.layers, 1, -1) if isinstance(out, Tensor) else out)


def _refuse_temporal(sae: SAE) -> None:
    if isinstance(sae, TemporalSAE):
        raise UnweaveError("a temporal SAE attends to codes, so no change of their units is exact: it keeps sae.scale.")


def _fold_scale_of_tied(sae: SAE, scale: float | Tensor) -> None:
    if not sae.activation.scales:
        raise UnweaveError(f"the codes of a {sae.activation.name} SAE do not scale, so a tied one has no exact fold.")
    assert isinstance(scale, float | int)  # a tied SAE reads one hook
    for parameter in (sae.b_enc, sae.b_dec, sae.threshold):
        if parameter is not None:
            parameter.div_(scale)
    sae.activation.scale_parameters(sae, sae.b_enc.new_full((sae.d_sae,), 1 / scale))
    sae.activation = sae.activation.rescaled(1 / scale)


@torch.no_grad()
def fold_normalization(sae: SAE, normalization: Normalization) -> None:
    """Make an SAE that was trained on normalised activations take raw ones, in place. Codes stay what they were.

    Decoder rows take the whitening's directions over, so they lose their unit norm; latents are still ranked, and
    compared with thresholds, by the same numbers.

    Raises:
        UnweaveError: If the normalisation is per token (`layer_norm`, `constant_norm_rescale`), whose factor no weight
            can hold, or a whitening for a tied SAE, or the SAE is a transcoder, whose output is in units of its own.
    """
    if normalization.mean is None:
        raise UnweaveError(
            f"{normalization.kind} has a factor of its own for every token, so it cannot be folded into weights: it "
            "stays with the SAE, as sae.per_token."
        )
    _refuse_temporal(sae)
    if isinstance(sae, Transcoder | CrossLayerTranscoder):
        raise UnweaveError(f"{normalization.kind} is folded into autoencoders, whose output is in units of the input.")
    if sae.tied:
        if normalization.matrix is not None or not sae.apply_b_dec_to_input:
            raise UnweaveError("a tied SAE has one matrix for both ways, which no whitening and no shift can go into.")
        fold_input_scale(sae, normalization.scale)
        sae.b_dec.add_(normalization.mean.to(sae.dtype))
        return
    scale, mean, dtype = normalization.scale, normalization.mean.double(), sae.dtype
    encoders = [(scale * W.double(), b) for W, b in sae.encoders]
    W_dec, b_dec = sae.W_dec.double() / scale, sae.b_dec.double() / scale
    if normalization.matrix is not None:
        assert normalization.inverse is not None
        encoders = [(normalization.matrix @ W, b) for W, b in encoders]
        W_dec, b_dec = W_dec @ normalization.inverse, b_dec @ normalization.inverse
    sae.W_dec.copy_(W_dec)
    sae.b_dec.copy_(b_dec + mean)
    if not sae.apply_b_dec_to_input:
        sae.activation.shift_parameters(sae, (mean @ encoders[0][0]).to(dtype))
    for (own, b), (W, _) in zip(sae.encoders, encoders, strict=True):
        own.copy_(W)
        if not sae.apply_b_dec_to_input:
            b.sub_((mean @ W).to(dtype))


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """Give every decoder row unit norm, in place; codes take the norms over, reconstructions stay.

    Rows of norm 0 stay as they are. Scaling a latent's code scales its threshold alike. A BatchTopK's one threshold
    can follow only a norm that all latents share.

    Raises:
        UnweaveError: If latents are ranked against each other (TopK, BatchTopK) or share a threshold and their norms
            differ, because the fold would change which of them win; or if codes saturate (TanhReLU).
    """
    _refuse_temporal(sae)
    if not sae.activation.scales:
        raise UnweaveError(f"the codes of a {sae.activation.name} SAE do not scale, so they cannot take norms over.")
    # A copy of all rows would be twice as large as the matrix.
    parts = [rows for block in sae.decoders for rows in block.split(_ROWS)]
    norms = torch.cat([rows.double().norm(dim=1) for rows in parts]).to(sae.dtype)  # squares may leave float32's range
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    if sae.tied:
        if not torch.allclose(norms, torch.ones_like(norms), rtol=1e-4):
            raise UnweaveError("the decoder of a tied SAE encodes, too, so its norms have nowhere to be folded into.")
        return
    if sae.activation.needs_unit_norm and not torch.allclose(norms, norms[0], rtol=1e-4):
        raise UnweaveError(
            f"the decoder norms of this {sae.activation.name} SAE differ ({norms.min():.4g} to {norms.max():.4g}), so "
            "folding them would change which latents are selected."
        )
    for block, own in sae.with_decoders(norms):
        block.div_(own[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
    if sae.threshold is not None:
        sae.threshold.mul_(norms if sae.threshold.ndim else norms[0])
    sae.activation.scale_parameters(sae, norms)
