"""Which parts of an SAE's training go together: what makes no sense is refused with the reason before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unweave._errors import UnweaveError
from unweave.objectives import AuxK, Penalty, RandomMatryoshka, TargetL0
from unweave.sae import Gated
from unweave.training.sites import PREDICTS

if TYPE_CHECKING:
    from unweave.training.config import SAEConfig, TrainConfig


def check_objectives(config: SAEConfig) -> None:
    """Refuse objectives that do not go with the activation function or with each other.

    Raises:
        UnweaveError: With the reason.
    """
    name = type(config.activation).__name__
    _check_sparsity(config)
    if config.glu:
        _check_glu(config)
    if isinstance(config.matryoshka, RandomMatryoshka):
        config.matryoshka.check(config.d_sae)
    elif config.matryoshka is not None:
        config.matryoshka.widths_for(config.d_sae)
    if config.multi_topk is not None:
        if not config.activation.widens:
            raise UnweaveError(f"Multi-TopK is a second, larger k beside the first, and {name} has none.")
        config.multi_topk.k_for(_k_of(config), config.d_sae)
    if config.pre_act is not None and config.activation.ranked:
        raise UnweaveError(
            f"the pre-activation loss compares a latent with a bound of its own, and {name} ranks latents against "
            "each other: AuxK is what revives them."
        )
    if config.ghost is not None:
        if config.auxk == AuxK():
            object.__setattr__(config, "auxk", AuxK(coefficient=0))
        if config.auxk.coefficient > 0:
            raise UnweaveError(
                "ghost gradients and AuxK both reconstruct the residual with dead latents: give one of them."
            )
    if config.W_dec_init == "data" and config.coder in PREDICTS:
        raise UnweaveError(f"W_dec_init='data' takes directions of the inputs, and a {config.coder} writes elsewhere.")
    _check_schedules(config)


def _check_glu(config: SAEConfig) -> None:
    if config.coder not in ("sae", "transcoder") or config.temporal is not None:
        kind = "temporal SAE" if config.temporal is not None else config.coder
        raise UnweaveError(f"a gated linear unit multiplies what SAEs and transcoders encode: a {kind} has none.")
    if config.dictionary is not None or config.activation.tied or isinstance(config.activation, Gated):
        raise UnweaveError(
            "a gated linear unit has a second encoder of its own: leave out glu, or the dictionary that encodes and "
            f"{type(config.activation).__name__}."
        )
    for name in ("pre_act", "ghost", "reanimation"):
        if getattr(config, name) is not None:
            raise UnweaveError(f"{name} pushes at a latent's encoder, which with glu has two factors: take AuxK.")


def _k_of(config: SAEConfig) -> Any:
    return getattr(config.activation, "k", None)


def _check_sparsity(config: SAEConfig) -> None:
    for term in config.sparsity_terms:
        if not isinstance(term, Penalty):
            raise UnweaveError(f"sparsity takes penalties such as L1(...), got {term!r}.")
        if reason := term.goes_with(config.activation):
            raise UnweaveError(reason)
        # A default that nobody asked for does not stand in the way; of a clt, d_sae is one layer's.
        if config.sparsity is not None and config.coder != "clt" and (l0 := getattr(term, "l0", 0)) > config.d_sae:
            raise UnweaveError(f"a target L0 of {l0} is larger than d_sae={config.d_sae}.")
    if config.l0_controller is None:
        return
    if config.activation.ranked:
        raise UnweaveError(
            f"an L0 controller moves a sparsity coefficient, and the L0 of {type(config.activation).__name__} is its k."
        )
    if config.temporal is not None:
        raise UnweaveError(
            "under a penalty that a controller moves, a temporal SAE's ReLU codes became small before they became few, "
            "and explained nothing: ask for an L0 with TopK."
        )
    if not config.sparsity_terms:
        raise UnweaveError("an L0 controller moves the coefficient of a penalty: give sparsity=L1() or another one.")
    if not any(term.decides_l0 for term in config.sparsity_terms):
        names = ", ".join(type(term).__name__ for term in config.sparsity_terms)
        raise UnweaveError(
            f"an L0 controller moves a penalty that decides L0, and {names} does not: add L1() or another."
        )
    if any(isinstance(term, TargetL0) or hasattr(term, "l0") for term in config.sparsity_terms):
        raise UnweaveError(
            "an L0 controller moves the coefficient until L0 is reached, and TargetL0 and QuadraticL0 have a target of "
            "their own: control L0() or another penalty."
        )
    if config.sparsity_warmup >= 1 and any(term.schedule is None for term in config.sparsity_terms):
        raise UnweaveError("an L0 controller begins when the coefficient has warmed up: it needs sparsity_warmup < 1.")
    if config.coder != "clt" and config.l0_controller.target > config.d_sae:
        raise UnweaveError(f"a target L0 of {config.l0_controller.target} is larger than d_sae={config.d_sae}.")


def _check_schedules(config: SAEConfig) -> None:
    if config.threshold_schedule is not None and (
        config.activation.threshold_shape is None or config.activation.calibrated
    ):
        raise UnweaveError(
            f"threshold_schedule moves the learning rate of learnt thresholds, and {type(config.activation).__name__} "
            "has none."
        )
    if config.k_schedule is None:
        return
    if _k_of(config) is None:
        raise UnweaveError(f"k_schedule anneals k, and {type(config.activation).__name__} has none.")
    if config.multi_topk is not None:
        raise UnweaveError("Multi-TopK's larger k stands beside a k that stays: leave out k_schedule or multi_topk.")
    if config.k_schedule.start > config.d_sae:
        raise UnweaveError(f"k_schedule starts at {config.k_schedule.start}, above d_sae={config.d_sae}.")
    config.activation.with_k(config.k_schedule.start)


def check_run(config: TrainConfig) -> None:
    """Refuse SAEs that cannot be trained end to end, or an SAE to train further without saying how.

    Raises:
        UnweaveError: With the reason.
    """
    if config.start is not None:
        if (config.start.method is None) == (config.end_to_end is None):
            raise UnweaveError(
                "an SAE is trained further by one of two: start.method fine-tunes its decoder, and end_to_end trains "
                "all of it against the model."
            )
        if config.start.lr is not None and not config.start.lr > 0:
            raise UnweaveError(f"start.lr must be above 0, got {config.start.lr}.")
    if config.end_to_end is None:
        return
    for sae in config.saes:
        if sae.matryoshka or sae.error != "squared":
            raise UnweaveError(
                "an end-to-end loss takes the place of the one squared error: leave out matryoshka and error."
            )
    check_in_step(config, "an end-to-end loss")


def check_in_step(config: TrainConfig, what: str) -> None:
    """Refuse settings of a model that runs by itself.

    Raises:
        UnweaveError: Naming what needs each pass of the model as it is.
    """
    if config.model_precision == "bf16" or config.background is True or config.model_device is not None:
        raise UnweaveError(
            f"{what} runs the model as it is, beside the SAE and in step with it: leave out model_precision, "
            "background and model_device."
        )
