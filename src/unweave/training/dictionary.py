"""Dictionaries that are tied or archetypal: which SAEs they go with, and how the latter start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives import Contrastive
from unweave.sae import SAE
from unweave.sae.archetypal import ArchetypalAtoms, ArchetypalDictionary, TiedDictionary
from unweave.sae.pursuit import Pursuit
from unweave.training.sites import PREDICTS

if TYPE_CHECKING:
    from unweave.training.config import SAEConfig, TrainConfig


def is_tied(config: SAEConfig) -> bool:
    """Whether the decoder's rows encode, too."""
    return config.activation.tied or isinstance(config.dictionary, TiedDictionary)


def check_dictionary(config: SAEConfig) -> None:
    """Refuse dictionaries that do not go with the activation function, the coder or the normalisation.

    Raises:
        UnweaveError: With the reason.
    """
    activation, name = config.activation, type(config.activation).__name__
    if config.temporal is not None:
        _check_temporal(config)
    elif config.unit_norm is False and activation.needs_unit_norm and config.coder not in PREDICTS:
        why = "ranks latents against each other" if activation.ranked else "shares one threshold"
        raise UnweaveError(f"{name} {why}, so its decoder rows need unit_norm.")
    if is_tied(config):
        if config.normalize == "whiten":
            raise UnweaveError("a tied dictionary has one matrix for both ways, which no whitening can be folded into.")
        if config.unit_norm is False:
            raise UnweaveError("a tied dictionary measures inputs by its rows, which need unit_norm.")
        if not activation.scales:
            raise UnweaveError(f"the codes of {name} do not scale with the inputs, so a tied one could not be folded.")
    if isinstance(activation, Pursuit):
        if any(not isinstance(term, Contrastive) for term in config.sparsity_terms):
            raise UnweaveError(
                f"{name} stops after k atoms, and a penalty on the codes it measures has nothing to choose."
            )
        if config.sparsity_terms and not activation.differentiable:
            raise UnweaveError(f"the codes of {name} have no gradient, so Contrastive could not change anything.")
    if isinstance(config.dictionary, ArchetypalDictionary):
        config.dictionary.points_for(config.d_sae)
        if is_tied(config):
            raise UnweaveError(f"{name} encodes with unit decoder rows, and archetypal atoms have norms of their own.")
        if config.unit_norm is True:
            raise UnweaveError("archetypal atoms have the norms of points of the hull: leave out unit_norm.")
        if config.resampling is not None or config.W_dec_init != "random":
            raise UnweaveError(
                "archetypal atoms are combinations of points: resampling and W_dec_init would overwrite them."
            )


def _check_temporal(config: SAEConfig) -> None:
    assert config.temporal is not None
    config.temporal.check(config.d_sae, config.activation)
    if config.coder != "sae" or config.dictionary is not None:
        raise UnweaveError("a temporal SAE is an autoencoder, and tied or not by a setting of its own, Temporal.tied.")
    if config.normalize != "scalar":
        raise UnweaveError(f"a temporal SAE keeps one factor for its inputs: normalize={config.normalize!r} has more.")
    if config.unit_norm:
        raise UnweaveError("a temporal SAE's codes are small and its decoder rows long: leave out unit_norm.")
    if config.resampling is not None or config.W_dec_init != "random":
        raise UnweaveError("resampling and W_dec_init write unit rows, and a temporal SAE's decoder rows are long.")


def check_order(config: TrainConfig) -> None:
    """Refuse what reads tokens in order, for a run that shuffles them.

    Raises:
        UnweaveError: With what to do instead.
    """
    # What is trained end to end or further reads whole rows.
    if any(sae.temporal for sae in config.saes) and config.end_to_end is None and config.start is None:
        what = "a temporal SAE reads whole sequences"
    elif any(isinstance(term, Contrastive) for sae in config.saes for term in sae.sparsity_terms):
        what = "Contrastive compares pairs of neighbours"
    else:
        return
    raise UnweaveError(f"{what}, and a run on a model shuffles their tokens: pass batches in order to train_on.")


def check_fresh(saes: Sequence[SAEConfig]) -> None:
    """Refuse fresh SAEs that are to keep something.

    Raises:
        UnweaveError: With the reason.
    """
    if any(sae.unit_norm == "keep" for sae in saes):
        raise UnweaveError("unit_norm='keep' is for an SAE that is trained further: a fresh one has no norms to keep.")


@torch.no_grad()
def archetypal_atoms(
    dictionary: ArchetypalDictionary, sae: SAE, sample: Float[Tensor, "n d_in"], generator: torch.Generator
) -> ArchetypalAtoms:
    """The parameters of a fresh SAE's archetypal dictionary, which the SAE's weights are set to.

    Args:
        dictionary: What kind.
        sae: The SAE; points are measured from its bias.
        sample: Inputs at the scale of training, of which the points are drawn.
        generator: Source of the draw, on the CPU.

    Raises:
        UnweaveError: If the sample has fewer rows than points are wanted.
    """
    n_points = dictionary.points_for(sae.d_sae)
    if n_points > len(sample):
        raise UnweaveError(
            f"an archetypal dictionary of {n_points} points needs as many activations to begin with, got {len(sample)}."
        )
    drawn = torch.randperm(len(sample), generator=generator)[:n_points].to(sample.device)
    points = sample[drawn].to(sae.dtype) - sae.b_dec.to(sample.device)
    made = ArchetypalAtoms(points, sae.d_sae, dictionary.delta)
    atoms = made.atoms()
    sae.W_dec.copy_(atoms)
    # Beside free norms the encoder starts small, as in `fresh_coder`: the codes of unit rows are so large that
    # TanhReLU's saturate, and a penalty strong enough for so many active latents shrinks the others, too.
    small = 0.1 if sae.activation.free_norms else 1.0
    sae.W_enc.copy_(small * torch.nn.functional.normalize(atoms, dim=1).T)
    return made


def hand_over(atoms: ArchetypalAtoms, sae: SAE) -> None:
    """Turn the gradient of the SAE's decoder into those of the parameters that it is made of."""
    assert sae.W_dec.grad is not None
    for parameter, grad in zip(atoms.parameters(), atoms.gradients(sae.W_dec.grad, sae.W_dec), strict=True):
        parameter.grad = grad
    sae.W_dec.grad = None


@torch.no_grad()
def renew(atoms: ArchetypalAtoms, sae: SAE) -> None:
    """Bring parameters that were moved back to where they are allowed, and the SAE's decoder up to date."""
    atoms.project()
    sae.W_dec.copy_(atoms.atoms())
