"""From a trained state to an SAE that anyone can use: calibrated, in raw units, saved in both forms."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives import L0, L1, Lp, QuadraticL0, Tanh, TargetL0
from unweave.sae import (
    SAE,
    Crosscoder,
    CrossLayerTranscoder,
    Gated,
    JumpReLU,
    ReLU,
    TemporalSAE,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.files import save_training_form
from unweave.sae.normalization import token_statistics
from unweave.training.config import SAEConfig, to_dict
from unweave.training.decoder_tuning import DecoderTuning
from unweave.training.fresh import Scale
from unweave.training.trainee import Trainee


@torch.no_grad()
def calibrate_threshold(sae: SAE, batches: Iterable[Float[Tensor, "n d_in"]]) -> int:
    """Set a BatchTopK SAE's threshold such that on these activations the mean L0 is k; return their number of tokens.

    Raises:
        UnweaveError: If there are no activations, or the SAE has no scalar threshold.
    """
    if not sae.activation.calibrated or sae.threshold is None:
        raise UnweaveError(f"only BatchTopK SAEs have a threshold to calibrate, this one is {sae.activation}.")
    rows = torch.cat([b.to(sae.device, sae.dtype) for b in batches] or [torch.empty(0, sae.d_in)])
    if len(rows) == 0:
        raise UnweaveError("there are no activations to calibrate the threshold on.")
    if sae.per_token is not None:
        rows = token_statistics(rows, sae.per_token).apply(rows)
    centred = rows - sae.b_dec if sae.apply_b_dec_to_input else rows
    # Training's estimate saves most of the candidates.
    spec = sae.activation.selection(sae.threshold, len(rows))
    chosen = sae.selected(centred, spec)
    lowest = chosen.values.amin() if len(chosen.values) else chosen.values.new_zeros(())
    sae.threshold.copy_(torch.nextafter(lowest, lowest.new_tensor(0.0)))  # inference compares strictly
    return len(rows)


def calibrates(trainee: Trainee) -> bool:
    """Whether a threshold is estimated when a trainee is finished; not where codes stay what they are."""
    return trainee.sae.activation.calibrated and not isinstance(trainee, DecoderTuning)


def finished_sae(trainee: Trainee, calibration: list[Float[Tensor, "n d_in"]], metadata: dict[str, Any]) -> SAE:
    """A copy of the trainee's SAE for raw activations, with unit decoder rows where these fold, and its threshold.

    Args:
        trainee: What was trained.
        calibration: Raw activations, held out where there are any.
        metadata: Where the SAE comes from.
    """
    if isinstance(trainee, DecoderTuning):
        return trainee.finished(metadata)
    sae = copy.deepcopy(trainee.sae).requires_grad_(False)
    sae.activation = trainee.config.activation  # whose window may have been widened
    sae.metadata = dict(metadata)
    if isinstance(sae, TemporalSAE):
        sae.scale = float(trainee.scale)
    elif trainee.normalization is None:
        fold_input_scale(sae, trainee.scale, trainee.target_scale)
    elif trainee.normalization.per_token is None:
        fold_normalization(sae, trainee.normalization)
    else:
        sae.per_token = trainee.normalization.per_token
    one_norm = type(sae) is SAE and trainee.config.normalize != "whiten" and trainee.atoms is None
    folds = sae.activation.scales and not isinstance(sae, TemporalSAE) and trainee.config.unit_norm != "keep"
    if folds and (one_norm or not sae.activation.needs_unit_norm):
        # Whitened, of several hooks' scales, or with free norms, rows that are ranked keep theirs: no fold is exact.
        fold_decoder_norms(sae)
    if sae.activation.calibrated:
        sae.metadata["threshold_calibration_tokens"] = calibrate_threshold(sae, calibration)
    if trainee.widths:
        sae.metadata["matryoshka_widths"] = list(trainee.widths)
    sae.metadata |= {
        "training": to_dict(trainee.config),
        "training_steps": trainee.step_count,
        "input_scale": _plain(trainee.scale, _widths(sae)[0]),
        "num_dead_features": int(trainee.dead.sum()),
        "sparsity_coefficients": [trainee.sparsity.coefficient(i) for i in range(len(trainee.sparsity.terms))],
    }
    if trainee.target_scale is not None:
        sae.metadata["target_scale"] = _plain(trainee.target_scale, _widths(sae)[1])
    return sae


def _widths(sae: SAE) -> tuple[list[int], list[int]]:
    """Widths of the hooks that lie side by side in the inputs and in the outputs."""
    if isinstance(sae, CrossLayerTranscoder):
        return list(sae.reads.values()), list(sae.writes.values())
    widths = list(sae.widths.values()) if isinstance(sae, Crosscoder) else [sae.d_in]
    return widths, widths


def _plain(scale: Scale, widths: list[int]) -> float | list[float]:
    """A scale as a JSON value: one number, or one for each hook."""
    return scale if isinstance(scale, float) else [float(part[0]) for part in scale.split(widths)]


def save_finished(sae: SAE, config: SAEConfig, folder: Path) -> Path:
    """Write the inference form to `folder` and the training form to `folder/training`."""
    save_training_form(sae, folder / "training", _sae_lens_training_keys(config, sae.d_out))
    return sae.save(folder)


def _sae_lens_training_keys(config: SAEConfig, d_in: int) -> dict[str, Any]:
    """SAELens' training keys. Its reductions are ours, at inputs of mean (not root mean square) norm sqrt(d)."""
    keys: dict[str, Any] = {"decoder_init_norm": 1.0 if config.decoder_is_unit else 0.1}
    match config.activation, config.sparsity_term:
        case ReLU(), Lp(_, p, True, _) as lp:
            keys |= {"l1_coefficient": lp.coefficient_for(d_in), "lp_norm": p, "l1_warm_up_steps": 0}
        case ReLU(), L1() as l1:
            keys |= {"l1_coefficient": l1.coefficient_for(d_in), "lp_norm": 1.0, "l1_warm_up_steps": 0}
        case Gated(), L1() as l1:
            keys |= {"l1_coefficient": l1.coefficient_for(d_in), "l1_warm_up_steps": 0}
        case JumpReLU() as jump, (L0() | QuadraticL0() | TargetL0() | Tanh()) as term:
            keys |= _sae_lens_l0_keys(term, d_in) | {
                "jumprelu_init_threshold": jump.init_threshold,
                "jumprelu_bandwidth": jump.bandwidth,
                "jumprelu_ste_to_input": jump.ste_to_input,
                "l0_warm_up_steps": 0,
                "pre_act_loss_coefficient": config.pre_act.coefficient if config.pre_act else None,
            }
        case _:
            keys |= {"aux_loss_coefficient": config.auxk.coefficient}
    return keys


def _sae_lens_l0_keys(term: L0 | QuadraticL0 | TargetL0 | Tanh, d_in: int) -> dict[str, Any]:
    """How SAELens names a JumpReLU SAE's penalty."""
    coefficient = term.coefficient_for(d_in)
    match term:
        case L0():
            return {"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": coefficient}
        case Tanh(_, c, _):
            return {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": coefficient, "jumprelu_tanh_scale": c}
        case TargetL0(l0, _):
            # Theirs is 2 / target * (L0 - target)^2 of each token, ours (L0 / target - 1)^2 of their mean.
            coefficient /= 2 * l0
    return {"jumprelu_sparsity_loss_mode": "quadratic", "l0_coefficient": coefficient, "target_l0": term.l0}
