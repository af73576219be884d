"""Llama Scope (He et al., arXiv 2410.20526), as published in 2024, and its R1-distilled sequel.

Trained on inputs and outputs that were scaled by averages over the data, with JumpReLU's one threshold compared after
all of these and the decoder's norms are folded. The order of the folds therefore matters.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, positive, take, without_pre_bias
from unweave.hub.saelens import SCALE
from unweave.hub.source import Source
from unweave.sae import SAE, Activation, JumpReLU, ReLU, TopK, fold_input_scale
from unweave.sae.draft import Draft
from unweave.sae.reading import fold_ranking_norms

CONFIG, WEIGHTS = "hyperparams.json", ("checkpoints/final.safetensors", "final.safetensors")
LAYOUT = {
    "W_enc": "encoder.weight M d", "b_enc": "encoder.bias M", "W_dec": "decoder.weight o M", "b_dec": "decoder.bias? o",
}  # fmt: skip
DISTILLED = LAYOUT | {"threshold": "log_jumprelu_threshold M"}


def matches(source: Source) -> bool:
    return source.file is None and source.has(CONFIG) and bool(source.find(*WEIGHTS))


def read(source: Source) -> Draft:
    config = source.json(CONFIG)
    for key in ("d_model", "act_fn", "norm_activation"):
        if key not in config:
            raise UnweaveError(f"the {CONFIG} of {source} lacks the key {key!r}.")
    expected = {"d": config["d_model"], "M": config.get("d_sae")}
    weights = take(source.tensors(source.one(*WEIGHTS)), LAYOUT, source, expected=expected)
    d, o = weights["W_enc"].shape[0], weights["W_dec"].shape[1]
    if not config.get("use_decoder_bias", True):
        weights.pop("b_dec", None)
    if config.get("apply_decoder_bias_to_pre_encoder") and "b_dec" in weights:
        weights["b_enc"] = without_pre_bias(weights)
    activation: Activation
    match config["act_fn"]:
        case "jumprelu":
            activation = JumpReLU()
            threshold = torch.full((weights["W_enc"].shape[1],), float(config["jump_relu_threshold"]))
            weights["threshold"] = positive(threshold, source)
        case "relu":
            activation = ReLU()
        case "topk":
            activation = TopK(int(config["top_k"]))
        case other:
            raise UnweaveError(f"{source} has the act_fn {other!r}, which is none of jumprelu, relu, topk.")
    scale_in, scale_out = _scales(config, d, o, source)
    folds = [lambda sae: fold_averages(sae, scale_in, scale_out)]
    if config.get("sparsity_include_decoder_norm"):
        folds.append(fold_ranking_norms)  # and the threshold stays: it is compared after this
    hooks = config.get("hook_point_in"), config.get("hook_point_out")
    predicts = hooks[0] != hooks[1]
    metadata = {"hook_name": hooks[0]} | ({"hook_name_out": hooks[1]} if predicts else {})
    return plain(weights, activation, source, metadata=metadata, predicts=predicts, folds=folds)


def _scales(config: dict[str, Any], d: int, o: int, source: Source) -> tuple[float, float]:
    """Factors of inputs and outputs in training."""
    match config["norm_activation"]:
        case "dataset-wise":
            averages = config["dataset_average_activation_norm"]
            return d**0.5 / averages["in"], o**0.5 / averages["out"]
        case "inference" | "none" | None:
            return 1.0, 1.0
    raise UnweaveError(
        f"{source} has norm_activation={config['norm_activation']!r}, which is none of dataset-wise, inference."
    )


def fold_averages(sae: SAE, scale_in: float, scale_out: float) -> None:
    """Take raw inputs to raw outputs, in place; codes become 1/scale_in of the trained ones."""
    sae.b_enc.div_(scale_in)
    if sae.W_enc_glu is not None:
        sae.W_enc_glu.mul_(scale_in)  # a sigmoid's argument stays what it was
    sae.b_dec.div_(scale_out)
    sae.W_dec.mul_(scale_in / scale_out)


def of_codes(threshold: Tensor, W_dec: Tensor) -> Tensor:
    """Thresholds that codes are compared with, of those that are compared with codes times the norms of the decoder."""
    return threshold if W_dec.is_meta else threshold / torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float32)


def matches_distilled(source: Source) -> bool:
    if source.file is not None or not (source.has("config.json") and source.has("sae_weights.safetensors")):
        return False
    return "encoder.weight" in source.keys("sae_weights.safetensors")


def read_distilled(source: Source) -> Draft:
    config = source.json("config.json")
    d = config.get("d_model")
    latents = None if d is None or "expansion_factor" not in config else round(d * config["expansion_factor"])
    weights = take(source.tensors("sae_weights.safetensors"), DISTILLED, source, expected={"d": d, "M": latents})
    threshold = weights["threshold"].float().exp()
    if config.get("sparsity_include_decoder_norm"):
        threshold = of_codes(threshold, weights["W_dec"])
    weights["threshold"] = threshold
    if SCALE not in source.hints:
        raise UnweaveError(
            f"{source} was trained on scaled activations, and its files do not say by which factor: pass {SCALE}=, "
            "which SAELens' directory of releases has, or 1 if your activations are scaled already."
        )
    scale, hook = float(source.hints[SCALE]), config.get("hook_point_in")
    layer = re.search(r"/L(\d+)R", source.address)
    hook = hook or (f"blocks.{layer[1]}.hook_resid_post" if layer else None)
    metadata = {} if hook is None else {"hook_name": hook}
    return plain(weights, JumpReLU(), source, metadata=metadata, folds=[lambda sae: fold_input_scale(sae, scale)])
