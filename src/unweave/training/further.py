"""Training an SAE further: which one, how it is set up, and whether it fits the model that it is trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.models import LoadedModel, capture, differences, resolve_hooks, trained_at
from unweave.objectives import L1, AuxK, TargetL0
from unweave.sae import SAE, Crosscoder, CrossLayerTranscoder, TemporalSAE, TiedDictionary, Transcoder
from unweave.sae.clt import CrossLayerPart
from unweave.training.combinations import check_in_step
from unweave.training.config import SAEConfig, Start, TrainConfig
from unweave.training.controller import L0Controller
from unweave.training.decoder_tuning import check_tunable, move_bias, tuned_trainee
from unweave.training.dictionary import check_fresh
from unweave.training.sites import Site, check_sites
from unweave.training.trainees import MakeTrainee

_DECODER_RATE, _SHARE = 3e-3, 0.25
"""Learning rate for a decoder alone, and, for all weights, the share of what fresh ones have: that makes 5e-5 at 16,384
latents (arXiv 2503.17272)."""
_ROUNDED = 2e-3
"""By how much norms may differ that are one: saved in bfloat16, unit rows are no closer."""


def resolved(config: TrainConfig, start: SAE | None) -> tuple[TrainConfig, SAE | None]:
    """The config with the settings of the SAE that is trained further, and that SAE; None for fresh SAEs.

    Raises:
        UnweaveError: The SAE cannot be read, or cannot be trained in this way.
    """
    if config.start is None:
        if start is None:
            check_fresh(config.saes)
            check_sites(config.saes, config.targets)
            return config, None
        config = replace(config, start=Start())
    wanted = config.start
    assert wanted is not None
    if start is None:
        if wanted.sae is None:
            raise UnweaveError("which SAE is to be trained further? Name it in Start, or pass start=...")
        start = SAE.from_pretrained(wanted.sae, wanted.id)
    if wanted.method is not None:
        check_tunable(start)
        if isinstance(start, TemporalSAE):
            check_in_step(config, "a temporal SAE, which reads whole rows,")
    elif isinstance(start, CrossLayerPart):
        raise UnweaveError("a part of a cross-layer transcoder shares its weights with others: train the whole.")
    if config.saes in ((SAEConfig(),), (own := settings_of(start, wanted),)):
        config = replace(config, saes=(own,))
    elif wanted.method is None:
        for sae in config.saes:
            check_same(start, sae)
    else:
        raise UnweaveError("an SAE that is fine-tuned has its settings in itself: leave out saes, and give start.lr.")
    return config, start


def check_same(start: SAE, config: SAEConfig) -> None:
    """Refuse settings of another SAE.

    Raises:
        UnweaveError: If the number of latents, the activation function or the kind of coder differs, or the decoder's
            rows would be brought to norm 1, which changes the codes.
    """
    own = settings_of(start, Start())
    for name in ("d_sae", "activation", "coder", "skip", "glu"):
        value, expected = getattr(own, name), getattr(config, name)
        if value != expected:
            raise UnweaveError(f"the SAE to start from has {name}={value}, and {name}={expected} is to be trained.")
    if own.unit_norm == "keep" and config.decoder_is_unit:
        raise UnweaveError(
            f"the decoder rows of this {start.activation.name} SAE have different norms, and norm 1 would change its "
            "codes: give unit_norm='keep', or leave out saes."
        )


def settings_of(sae: SAE, start: Start) -> SAEConfig:
    """How an SAE is trained further: a short warm-up, a long decay, and nothing that would revive latents.

    The sparsity term stays that of the activation function, at a strength that holds L0 (see `holding`).
    """
    only_decoder = start.method is not None
    coder, d_sae = "sae", sae.d_sae
    match sae:
        case CrossLayerTranscoder():
            coder, d_sae = "clt", sae.latents_per_layer
        case Crosscoder():
            coder = "crosscoder"
        case Transcoder():
            coder = "transcoder"
    ties = sae.tied and not isinstance(sae, TemporalSAE)  # which says so in its own settings
    rate = _DECODER_RATE if only_decoder else _SHARE * SAEConfig(d_sae=d_sae, activation=sae.activation).learning_rate
    settings = SAEConfig(
        d_sae=d_sae,
        activation=sae.activation,
        sparsity=() if only_decoder else None,
        auxk=AuxK(coefficient=0),
        lr=rate if start.lr is None else start.lr,
        decay=0.5,
        sparsity_warmup=0.0,
        grad_clip=None if only_decoder else 1.0,
        normalize=sae.per_token or "scalar",
        coder=coder,  # type: ignore[arg-type]
        glu=sae.glu,
        skip=getattr(sae, "W_skip", None) is not None,
        dictionary=TiedDictionary() if ties and not sae.activation.tied and not only_decoder else None,
        temporal=sae.settings if isinstance(sae, TemporalSAE) else None,
    )
    keeps = not only_decoder and settings.decoder_is_unit and not _may_be_unit(sae)
    return replace(settings, unit_norm="keep") if keeps else settings


def _may_be_unit(sae: SAE) -> bool:
    """Whether bringing the decoder's rows to norm 1 leaves the codes what they are, up to a common factor."""
    if not (sae.tied or sae.activation.needs_unit_norm):
        return True  # norms go into the encoder
    norms = sae.decoders[0].detach().double().norm(dim=1)
    one = torch.ones_like(norms) if sae.tied else norms[:1].expand_as(norms)
    # Those of a crosscoder are over all hooks, at the scale that each of them has in training.
    return not isinstance(sae, Crosscoder) and torch.allclose(norms, one, rtol=_ROUNDED)


def as_trained(sae: SAE) -> SAE:
    """A copy of an SAE as training has it: in float32, and of an autoencoder the bias is subtracted from the input."""
    made = copy.deepcopy(sae).float()
    if type(sae) is not SAE:
        return made
    move_bias(made, subtracted=True)
    if (made.tied or made.activation.needs_unit_norm) and _may_be_unit(made):  # what was rounded is made exact
        norms = made.W_dec.detach().norm(dim=1, keepdim=True)
        made.W_dec.data.mul_((1.0 if made.tied else norms.mean()) / norms)
    return made


def holding(config: SAEConfig, sae: SAE, x: Float[Tensor, "n d_in"]) -> SAEConfig:
    """The settings with a sparsity term that holds the L0 that an SAE has on some activations; TopK's needs none."""
    kind = sae.activation.default_sparsity
    if kind is None:
        return config
    known = sae.metadata.get("sparsity_coefficients") or []
    strength = L1(known[0]) if kind == "l1" and len(known) == 1 and math.isfinite(known[0]) else None
    if isinstance(sae, TemporalSAE):  # no controller can hold its L0
        if strength is None:
            raise UnweaveError(
                "the temporal SAE does not say which L1 coefficient its ReLU was trained with: give saes with its "
                "settings and a sparsity."
            )
        return replace(config, sparsity=strength)
    l0 = float(sae.encode_sparse(x).l0().double().mean())
    if not l0 > 0:
        raise UnweaveError("the SAE has no active latent on the first tokens: is this the model and hook it is of?")
    if kind == "target_l0":
        return replace(config, sparsity=TargetL0(l0))
    return replace(config, sparsity=strength, l0_controller=L0Controller(l0))


def widths_at(model: LoadedModel, hooks: Sequence[str]) -> dict[str, int]:
    """Widths of the activations at some hooks, from a pass over one blank token or image."""
    words = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    blank = words if model.vision is None else model.vision.blank()
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in blank.items()}
    seen = capture(model.module, resolve_hooks(model.module, list(hooks)), **inputs)
    return {name: x.shape[-1] for name, x in seen.items()}


def hooks_of_coder(sae: SAE) -> tuple[list[str], list[str]]:
    """The hooks that a coder reads, and those that it predicts besides, as far as it says; in the order that it has."""
    metadata = sae.metadata
    if isinstance(sae, Crosscoder):
        return list(metadata.get("hf_hook_names") or sae.widths), []
    if isinstance(sae, CrossLayerTranscoder):
        return (
            list(metadata.get("hf_hook_names") or sae.reads),
            list(metadata.get("hf_hook_names_out") or sae.writes),
        )
    reads, writes = trained_at(metadata), metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")
    return [reads] if reads else [], [writes] if writes and isinstance(sae, Transcoder) else []


def site_of_start(
    sae: SAE, sites: Sequence[Site], widths: Mapping[str, int], model: LoadedModel | Mapping[str, Any]
) -> Site:
    """Where an SAE is trained further: its hooks, in the order in which they lie side by side in its weights.

    What is not as in its own training, such as a model of another name, is a warning.

    Args:
        sae: The SAE.
        sites: Those that the run names, as `sites_of` makes them.
        widths: Of the activations at its hooks.
        model: Of cached activations, what their metadata say.

    Raises:
        UnweaveError: It belongs elsewhere, or not all of it has a hook.
    """
    if len(sites) != 1:
        several = len({hook for site in sites for hook in site.inputs})
        raise UnweaveError(f"an SAE is trained further at its one hook, and {several} are named.")
    own = hooks_of_coder(sae)
    known = [_places(names, model) for names in own]
    inputs, targets = map(_in_order, known, (sites[0].inputs, sites[0].targets))
    for verb, hooks, wanted in (
        ("takes", inputs, sae.widths if isinstance(sae, Crosscoder) else getattr(sae, "reads", sae.d_in)),
        ("predicts", targets, getattr(sae, "writes", sae.d_out)),
    ):
        needed = list(wanted.values()) if isinstance(wanted, Mapping) else [wanted]
        found = [widths[hook] for hook in hooks]
        if hooks and needed != found:
            what, those, places = (", ".join(map(str, each)) for each in (needed, found, map(repr, hooks)))
            raise UnweaveError(
                f"the SAE {verb} activations of width {what}, and those at {places} have width {those}: it is of "
                "another model or hook."
            )
    for names, places_known, hooks in zip(own, known, (inputs, targets), strict=True):
        others = [place.partition("#")[0] for place in places_known] != [hook.partition("#")[0] for hook in hooks]
        if hooks and places_known and isinstance(model, LoadedModel) and others:
            theirs, ours = (", ".join(map(repr, each)) for each in (names, hooks))
            one, are = "hook" if len(names) == 1 else "hooks", "is" if len(hooks) == 1 else "are"
            raise UnweaveError(f"the SAE is of the {one} {theirs}, and {ours} {are} named.")
    differences(sae.metadata, model, inputs, stacklevel=5)  # the line that calls `train`
    return Site(inputs, targets)


def _places(names: Sequence[str], model: LoadedModel | Mapping[str, Any]) -> list[str]:
    """What names stand for in a model; nothing where one of them is unknown to it."""
    if not isinstance(model, LoadedModel):
        return list(names)
    places = []
    for name in names:
        try:
            (place,) = resolve_hooks(model.module, [name])
        except (UnweaveError, ValueError):  # a model whose modules have other names
            return []
        places.append(str(place))
    return places


def _in_order(own: Sequence[str], named: tuple[str, ...]) -> tuple[str, ...]:
    """The hooks that a run names; in a coder's own order, if they are its own."""
    return tuple(own) if len(own) == len(named) and set(own) == set(named) else named


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
