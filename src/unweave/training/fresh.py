"""A coder before its first step: the scales of what it sees, its initial weights and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    ArchetypalDictionary,
    Crosscoder,
    CrossLayerTranscoder,
    Normalization,
    TemporalSAE,
    Transcoder,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.init import data_directions, middle
from unweave.training.config import SAEConfig
from unweave.training.dictionary import is_tied

_PART = 1024  # rows that are squared at a time

Scale = float | Float[Tensor, " d"]
"""What activations are multiplied by in training: one factor, or for several hooks side by side one per dimension."""


def scale_of(sample: Float[Tensor, "n d"], widths: Mapping[str, int] | None = None) -> Scale:
    """The factor that gives a sample the mean squared norm d; each hook has its own.

    Args:
        sample: Activations.
        widths: Widths of the hooks that lie side by side in the sample; None: it is of one hook.

    Raises:
        UnweaveError: If all of the sample, or all of it at one hook, is 0.
    """
    if widths is None:
        # In float64, as a square may leave float32's range; part by part, as that takes twice the memory.
        total = sum(part.double().square().sum() for part in sample.detach().split(_PART))
        mean_square = float(total) / len(sample)
        if mean_square == 0:
            raise UnweaveError("all activations of the first batch are 0, so there is nothing to train on.")
        return float((sample.shape[1] / mean_square) ** 0.5)
    parts = sample.split(list(widths.values()), 1)
    return torch.cat([torch.full((p.shape[1],), scale_of(p), device=sample.device) for p in parts])  # type: ignore[arg-type]


def fresh_coder(
    config: SAEConfig,
    sample: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"] | None,
    widths: Mapping[str, int] | None,
    scale: Scale,
    target_scale: Scale | None,
    generator: torch.Generator,
    target_widths: Mapping[str, int] | None = None,
) -> SAE:
    """A coder of the configured kind with its initial weights, on the CPU.

    Where there is no pre-encoder bias, `b_enc` centres the inputs instead. The decoders of transcoders start at 0, so
    that they first predict the mean (Paulo et al., arXiv 2501.18823), unless their rows are to have unit norm.

    Args:
        config: What is trained.
        sample: Raw inputs.
        target: Raw targets, for a transcoder.
        widths: Widths of the hooks of a crosscoder or a cross-layer transcoder.
        scale: What training multiplies inputs by.
        target_scale: What it multiplies targets by.
        generator: Source of the random weights.
        target_widths: Widths of a cross-layer transcoder's targets.
    """
    d_in, d_sae, activation = sample.shape[1], config.d_sae, config.activation
    small = not config.decoder_is_unit
    if config.coder == "transcoder":
        assert target is not None
        sae: SAE = Transcoder(
            d_in, target.shape[1], d_sae, activation, skip=config.skip, glu=config.glu, generator=generator
        )
        if small:
            sae.W_dec.data.zero_()
    elif config.coder == "clt":
        assert widths is not None
        assert target_widths is not None
        sae = CrossLayerTranscoder(widths, target_widths, d_sae, activation, skip=config.skip, generator=generator)
        if small:
            for block in sae.decoders:
                block.data.zero_()
    elif config.coder == "crosscoder":
        assert widths is not None
        sae = Crosscoder(widths, d_sae, activation, generator=generator)
        if small:
            # Norm 0.1 at each hook, as published.
            sae.W_dec.data.mul_(0.1 * len(widths) ** 0.5)
            sae.W_enc.data.mul_(0.1 * len(widths) ** 0.5)
    elif config.temporal is not None:
        sae = TemporalSAE(d_in, d_sae, activation, config.temporal, generator=generator)
    else:
        sae = SAE(d_in, d_sae, activation, tied=is_tied(config), glu=config.glu, generator=generator)
        if small:
            # A small start lets an L1 penalty's norms grow where they are needed (Anthropic, April 2024).
            sae.W_dec.data.mul_(0.1)
            sae.W_enc.data.mul_(0.1)
    if config.W_dec_init == "data":
        rows = data_directions(sample.float() * scale, d_sae, generator) * sae.W_dec.detach().norm(dim=1)[:, None]
        sae.W_dec.data.copy_(rows)
        sae.W_enc.data.copy_(rows.T)
    if config.b_dec_init != "zeros":
        mean = middle(sample, config.b_dec_init) * scale
        if not sae.apply_b_dec_to_input:
            pre = sae.pre_activations(mean.cpu()[None]).detach()[0]  # b_enc is 0 here, and a gate 1/2
            sae.b_enc.data.copy_(-2 * pre if sae.glu else -pre)
        if target is not None and target_scale is not None:
            mean = middle(target, config.b_dec_init) * target_scale
        sae.b_dec.data.copy_(mean)
    return sae


@torch.no_grad()
def take_over(
    start: SAE,
    fresh: SAE,
    config: SAEConfig,
    scale: Scale,
    target_scale: Scale | None,
    normalization: Normalization | None,
) -> Scale:
    """Give a fresh coder the weights of a finished one, in place, as training has them; return the scale of inputs.

    Args:
        start: The finished coder, which takes raw activations.
        fresh: The fresh one.
        config: How it is trained.
        scale: What training multiplies inputs by; a temporal SAE keeps its own factor instead.
        target_scale: What it multiplies targets by.
        normalization: What it does to inputs beyond that.

    Raises:
        UnweaveError: If `start` cannot be trained on as the configured one.
    """
    check_start(start, fresh)
    if isinstance(config.dictionary, ArchetypalDictionary):
        raise UnweaveError("an archetypal dictionary starts from data points, not from an SAE that has atoms.")
    if start.per_token != (normalization and normalization.per_token):
        raise UnweaveError(f"the SAE to start from has per_token={start.per_token}, not {config.normalize}.")
    fresh.load_state_dict(start.state_dict())
    if isinstance(start, TemporalSAE):
        fresh.apply_b_dec_to_input = start.apply_b_dec_to_input
        return start.scale
    if normalization is None:
        fold_input_scale(fresh, 1 / scale, None if target_scale is None else 1 / target_scale)
    elif normalization.mean is not None:
        fold_normalization(fresh, normalization.to(fresh.device).reversed())
    activation = config.activation
    if activation.scales and config.unit_norm != "keep" and (config.decoder_is_unit or not activation.needs_unit_norm):
        fold_decoder_norms(fresh)
    fresh.activation = activation  # a pursuit's threshold is in units of training already
    return scale


def check_start(start: SAE, fresh: SAE) -> None:
    """Refuse an SAE that cannot be trained on as the configured one.

    Raises:
        UnweaveError: If a width, the activation function or the kind of coder differs.
    """
    for name in ("d_in", "d_out", "d_sae", "activation", "glu"):
        value, expected = getattr(start, name), getattr(fresh, name)
        if value != expected:
            raise UnweaveError(f"the SAE to start from has {name}={value}, and {name}={expected} is to be trained.")
    if isinstance(start, TemporalSAE) and isinstance(fresh, TemporalSAE):
        settings = dataclasses.replace(start.settings, context=fresh.settings.context)
        if settings != fresh.settings:
            raise UnweaveError(f"the SAE to start from has {settings}, and {fresh.settings} is to be trained.")
    if type(start) is not type(fresh):
        raise UnweaveError(f"a {type(start).__name__} cannot be trained further as {type(fresh).__name__}.")
    if start.apply_b_dec_to_input != fresh.apply_b_dec_to_input and not isinstance(start, TemporalSAE):
        raise UnweaveError("an SAE that does not subtract its decoder bias from its input cannot be trained further.")
