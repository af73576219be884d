"""Training an SAE further: which one, how it is set up, and whether it fits the model that it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.models import LoadedModel, capture, differences, resolve_hooks, trained_at
from unweave.objectives import L1, AuxK, TargetL0
from unweave.sae import SAE, TiedDictionary
from unweave.training.config import SAEConfig, Start, TrainConfig
from unweave.training.controller import L0Controller
from unweave.training.finetune import check_tunable, tuned_trainee
from unweave.training.trainees import MakeTrainee

_DECODER_RATE, _SHARE = 1e-3, 0.25
"""Learning rate for a decoder alone, and, for all weights, the share of what fresh ones have: that makes 5e-5 at 16,384
latents (arXiv 2503.17272)."""


def resolved(config: TrainConfig, start: SAE | None) -> tuple[TrainConfig, SAE | None]:
    """The config with the settings of the SAE that is trained further, and that SAE; None for fresh SAEs.

    Raises:
        UnweaveError: The SAE cannot be read, or cannot be trained in this way.
    """
    if config.start is None:
        if start is None:
            return config, None
        config = replace(config, start=Start())
    wanted = config.start
    assert wanted is not None
    if start is None:
        if wanted.sae is None:
            raise UnweaveError("which SAE is to be trained further? Name it in Start, or pass start=...")
        start = SAE.from_pretrained(wanted.sae, wanted.id)
    if type(start) is not SAE:
        raise UnweaveError(f"fine-tuning takes an autoencoder, and this is a {type(start).__name__}.")
    if wanted.method is not None:
        check_tunable(start)
    elif start.per_token is not None:
        raise UnweaveError(f"an end-to-end loss takes no SAE with {start.per_token}: its decoder can be fine-tuned.")
    elif start.activation.needs_unit_norm and not _of_one_norm(start.W_dec):
        raise UnweaveError(
            f"the decoder rows of this {start.activation.name} SAE have different norms, and training all of it would "
            "bring them to one, which changes the codes: its decoder can be fine-tuned."
        )
    if config.saes in ((SAEConfig(),), (own := settings_of(start, wanted),)):
        config = replace(config, saes=(own,))
    elif wanted.method is None:
        for sae in config.saes:
            check_same(start, sae)
    else:
        raise UnweaveError("an SAE that is fine-tuned has its settings in itself: leave out saes, and give start.lr.")
    return config, start


def _of_one_norm(W_dec: Float[Tensor, "d_sae d_in"]) -> bool:
    norms = W_dec.detach().double().norm(dim=1)
    return bool(torch.allclose(norms, norms[0], rtol=2e-3))  # saved in bfloat16, unit rows are no closer


def check_same(start: SAE, config: SAEConfig) -> None:
    """Refuse settings of another SAE.

    Raises:
        UnweaveError: If the number of latents or the activation function differs.
    """
    for name in ("d_sae", "activation"):
        value, expected = getattr(start, name), getattr(config, name)
        if value != expected:
            raise UnweaveError(f"the SAE to start from has {name}={value}, and {name}={expected} is to be trained.")


def settings_of(sae: SAE, start: Start) -> SAEConfig:
    """How an SAE is trained further: a short warm-up, a long decay, and nothing that would revive latents.

    The sparsity term stays that of the activation function, at a strength that holds L0 (see `holding`).
    """
    only_decoder = start.method is not None
    fresh = SAEConfig(d_sae=sae.d_sae, activation=sae.activation)
    rate = _DECODER_RATE if only_decoder else _SHARE * fresh.learning_rate
    return SAEConfig(
        d_sae=sae.d_sae,
        activation=sae.activation,
        sparsity=() if only_decoder else None,
        auxk=AuxK(coefficient=0),
        lr=rate if start.lr is None else start.lr,
        decay=0.5,
        sparsity_warmup=0.0,
        grad_clip=None if only_decoder else 1.0,
        normalize=sae.per_token or "scalar",
        dictionary=TiedDictionary() if sae.tied and not sae.activation.tied else None,
    )


def holding(config: SAEConfig, sae: SAE, x: Float[Tensor, "n d_in"]) -> SAEConfig:
    """The settings with a sparsity term that holds the L0 that an SAE has on some activations; TopK's needs none."""
    kind = sae.activation.default_sparsity
    if kind is None:
        return config
    l0 = float(sae.encode_sparse(x).l0().double().mean())
    if not l0 > 0:
        raise UnweaveError("the SAE has no active latent on the first tokens: is this the model and hook it is of?")
    if kind == "target_l0":
        return replace(config, sparsity=TargetL0(l0))
    known = sae.metadata.get("sparsity_coefficients") or []
    strength = L1(known[0]) if kind == "l1" and len(known) == 1 and math.isfinite(known[0]) else None
    return replace(config, sparsity=strength, l0_controller=L0Controller(l0))


def widths_at(model: LoadedModel, hooks: Sequence[str]) -> dict[str, int]:
    """Widths of the activations at some hooks, from a pass over one blank token or image."""
    words = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    blank = words if model.vision is None else model.vision.blank()
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in blank.items()}
    seen = capture(model.module, resolve_hooks(model.module, list(hooks)), **inputs)
    return {name: x.shape[-1] for name, x in seen.items()}


def check_start_fits(
    sae: SAE, widths: Mapping[str, int], hooks: Sequence[str], model: LoadedModel | Mapping[str, Any]
) -> None:
    """Refuse an SAE of another width or hook; say so if only the model has another name.

    Of cached activations, `model` is what their metadata say.

    Raises:
        UnweaveError: It does not fit.
    """
    if len(hooks) != 1:
        raise UnweaveError(f"an SAE is trained further at its one hook, and {len(hooks)} are named.")
    if widths[hooks[0]] != sae.d_in:
        raise UnweaveError(
            f"the SAE takes activations of width {sae.d_in}, and those at {hooks[0]!r} have width {widths[hooks[0]]}: "
            "it is of another model or hook."
        )
    own, place = trained_at(sae.metadata), None
    if isinstance(model, LoadedModel) and own is not None:
        with suppress(UnweaveError, ValueError):  # a model whose modules have other names
            (place,) = resolve_hooks(model.module, [own])
    if place is not None and str(place).partition("#")[0] != hooks[0].partition("#")[0]:
        raise UnweaveError(f"the SAE is of the hook {own!r}, and {hooks[0]!r} is named.")
    differences(sae.metadata, model, hooks, stacklevel=5)  # the line that calls `train`


def tuning_of(start: SAE, config: TrainConfig) -> MakeTrainee:
    """What makes the trainee of a run that fine-tunes a decoder."""
    assert config.start is not None
    assert config.start.method is not None
    return partial(tuned_trainee, start, config.start.method)


def furthered(start: SAE, config: TrainConfig, lr: float, metadata: dict[str, Any]) -> dict[str, Any]:
    """What is known of an SAE that was trained further: where it came from, and how."""
    assert config.start is not None
    how = {
        "sae": config.start.sae,
        "id": config.start.id,
        "method": config.start.method or "end_to_end",
        "tokens": config.tokens,
        "lr": lr,
    }
    made = start.metadata | metadata | {"finetuning": how}
    if "training_tokens" in start.metadata:
        made["training_tokens"] = start.metadata["training_tokens"]
    return made
