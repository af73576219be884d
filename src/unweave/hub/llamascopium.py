"""Llamascopium, OpenMOSS' library of today: SAEs, crosscoders and cross-layer transcoders.

Decoders of cross-layer transcoders are grouped by the output that they write to. `dataset-wise` files were trained on
scaled activations; their codes are read as the library's own inference form has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import fill
from unweave.hub.cross_layer import Layer, cross_layer
from unweave.hub.layout import plain, take
from unweave.hub.llama_scope import fold_averages, of_codes
from unweave.hub.source import Source
from unweave.sae import Activation, Crosscoder, JumpReLU, ReLU, TopK
from unweave.sae.draft import Draft, on_meta
from unweave.sae.normalization import PerToken
from unweave.sae.reading import fold_ranking_norms

FILES = (
    "sae_weights.safetensors", "sae_weights.pt", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors",
    "checkpoints/pruned.pt", "checkpoints/final.pt",
)  # fmt: skip
LAYOUT = {"W_enc": "W_E d M", "b_enc": "b_E M", "W_dec": "W_D M o", "b_dec": "b_D? o"}
GLU = {"W_enc_glu": "W_E_glu d M", "b_enc_glu": "b_E_glu M"}
_THRESHOLD, _AVERAGE = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."

_OTHERS = {
    "lorsa": "low-rank sparse attention, whose latents are attention heads",
    "molt": "a mixture of linear transforms, whose latents are matrices",
}


def refuse_distributed(names: Sequence[str], where: object) -> None:
    """Refuse weights in a folder NAME.dcp, if some of the files are in one.

    Raises:
        UnweaveError: With the way out.
    """
    if found := next((part for name in names for part in PurePosixPath(name).parts if part.endswith(".dcp")), None):
        raise UnweaveError(
            f"{where} has its weights in {found!r}, a distributed checkpoint of PyTorch, whose index is a pickle: have "
            "Llamascopium save it as sae_weights.safetensors."
        )


def matches(source: Source) -> bool:
    return source.file is None and source.has("config.json") and "sae_type" in source.json("config.json")


def read(source: Source) -> Draft:
    config = source.json("config.json")
    kinds = {"sae": _sae, "crosscoder": _crosscoder, "clt": _clt}
    if (kind := config["sae_type"]) not in kinds:
        what = f"is {_OTHERS[kind]}" if kind in _OTHERS else "is nothing that is known"
        raise UnweaveError(f"{source} has the sae_type {kind!r}, which {what}; read are {', '.join(kinds)}.")
    name = next((name for name in FILES if source.has(name)), None)
    if name is None:
        refuse_distributed(source.find("*.dcp/*", "*.dcp/.metadata", "checkpoints/*.dcp/*"), source)
        raise UnweaveError(f"{source} has none of the files {', '.join(FILES)}.")
    value = source.torch(name) if name.endswith(".pt") else source.tensors(name)
    tensors = source.only_tensors(value.get("sae", value), name)
    if "W_E_glu" in tensors and kind != "sae":
        raise UnweaveError(f"{source} multiplies its codes by a gate of its own (GLU), which no {kind} here computes.")
    averages = {n.removeprefix(_AVERAGE): tensors.pop(n) for n in list(tensors) if n.startswith(_AVERAGE)}
    if not _has_bias(config):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("b_D")}
    scales = _Scales(config, averages, source)
    return kinds[kind](config, tensors, scales, source)


class _Scales:
    """The factors by which activations were multiplied in training, at each hook."""

    def __init__(self, config: dict[str, Any], averages: dict[str, Tensor], source: Source) -> None:
        kind = config.get("norm_activation")
        if kind not in ("dataset-wise", "inference", "token-wise", "none", None):
            raise UnweaveError(f"{source} has norm_activation={kind!r}, which no SAE here applies.")
        self.per_token, self._source = kind == "token-wise", source
        self._averages = averages if kind == "dataset-wise" else None  # else they are uninitialised memory

    def at(self, hook: str, width: int) -> float:
        if self._averages is None:
            return 1.0
        if hook not in self._averages:
            raise UnweaveError(f"{self._source} has no {_AVERAGE}{hook}, which its norm_activation needs.")
        return float(width**0.5 / self._averages[hook])


def _hooks(config: dict[str, Any], key: str, n: int) -> list[str]:
    found = config.get(key) or config.get("hook_points") or [f"{key}.{i}" for i in range(n)]
    return list(found) if isinstance(found, list) and len(found) == n else [f"{key}.{i}" for i in range(n)]


def _activation(config: dict[str, Any], source: Source) -> Activation:
    match config.get("act_fn"):
        case "relu":
            return ReLU()
        case "jumprelu":
            return JumpReLU()
        case "topk":
            return TopK(int(config["top_k"]))
    raise UnweaveError(f"{source} has the act_fn {config.get('act_fn')!r}, which is none of relu, jumprelu, topk.")


def _has_bias(config: dict[str, Any]) -> bool:
    """Whether decoders have one; a file may hold one all the same, which then means nothing."""
    return bool(config.get("use_decoder_bias", True))


def _expected(config: dict[str, Any]) -> dict[str, int | None]:
    d, factor = config.get("d_model"), config.get("expansion_factor")
    return {"d": d, "M": None if d is None or factor is None else round(d * factor)}


def _sae(config: dict[str, Any], tensors: dict[str, Tensor], scales: _Scales, source: Source) -> Draft:
    activation = _activation(config, source)
    layout = LAYOUT | ({"threshold": f"{_THRESHOLD} M"} if isinstance(activation, JumpReLU) else {})
    layout |= GLU if "W_E_glu" in tensors else {}
    weights = take(tensors, layout, source, expected=_expected(config))
    hook_in = str(config.get("hook_point_in"))
    hook_out = str(config.get("hook_point_out") or hook_in)
    predicts = hook_in != hook_out
    if predicts and scales.per_token:
        raise UnweaveError(f"{source} normalises every token and predicts another hook, which no transcoder here does.")
    f_in, f_out = scales.at(hook_in, weights["W_enc"].shape[0]), scales.at(hook_out, weights["W_dec"].shape[1])
    folds = [lambda sae: fold_averages(sae, f_in, f_out)]
    norms_count = config.get("sparsity_include_decoder_norm")
    if isinstance(activation, JumpReLU):
        threshold = weights["threshold"].float().exp()
        if norms_count:  # h * |w| > threshold: codes need not change for it
            threshold = of_codes(threshold, weights["W_dec"])
        weights["threshold"] = threshold / f_in
    elif norms_count and isinstance(activation, TopK):
        folds.append(fold_ranking_norms)
    metadata = {"hook_name": hook_in} | ({"hook_name_out": hook_out} if predicts else {})
    per_token: PerToken | None = "constant_norm_rescale" if scales.per_token else None
    return plain(weights, activation, source, metadata=metadata, predicts=predicts, per_token=per_token, folds=folds)


def _crosscoder(config: dict[str, Any], tensors: dict[str, Tensor], scales: _Scales, source: Source) -> Draft:
    activation = _activation(config, source)
    if config.get("sparsity_include_decoder_norm") and not isinstance(activation, ReLU):
        raise UnweaveError(
            f"{source} compares with thresholds head by head, weighed by each head's decoder norm, so a latent may be "
            "active at some heads only, which no crosscoder here computes."
        )
    axes = {"W_E": "H d M", "b_E": "H M", "W_D": "H M d"} | ({"b_D": "H d"} if _has_bias(config) else {})
    _check_axes(tensors, axes, _expected(config), source)
    W_E, b_E, W_D = (tensors.pop(name) for name in ("W_E", "b_E", "W_D"))
    heads, d = W_E.shape[:2]
    b_D = tensors.pop("b_D") if _has_bias(config) else W_D.new_zeros(heads, d)
    hooks = _hooks(config, "hook_points", heads)
    factors = torch.tensor([scales.at(hook, d) for hook in hooks])
    if scales.per_token:
        raise UnweaveError(f"{source} normalises every token at every hook, which no crosscoder here does.")
    widths, m = dict.fromkeys(hooks, d), W_E.shape[2]
    made = on_meta(lambda: Crosscoder(widths, m, activation, metadata={"hook_names": hooks}))
    W_enc, W_dec = W_E * factors[:, None, None].to(W_E), W_D / factors[:, None, None].to(W_D)
    weights = {
        "W_enc": W_enc.flatten(0, 1), "b_enc": b_E.sum(0), "W_dec": W_dec.transpose(0, 1).flatten(1),
        "b_dec": (b_D / factors[:, None].to(b_D)).flatten(),
    }  # fmt: skip
    if _THRESHOLD in tensors:
        threshold = tensors.pop(_THRESHOLD).float().exp()
        if threshold.ndim == 2 and not (threshold == threshold[0]).all():
            raise UnweaveError(f"{source} has thresholds for every head, which no crosscoder here computes.")
        weights["threshold"] = threshold[0] if threshold.ndim == 2 else threshold
    if tensors:
        raise UnweaveError(f"{source} holds the tensor {sorted(tensors)[0]!r}, which this format has not.")
    return Draft(made, weights, str(source))


def _clt(config: dict[str, Any], tensors: dict[str, Tensor], scales: _Scales, source: Source) -> Draft:
    activation = _activation(config, source)
    if isinstance(activation, TopK) or config.get("sparsity_include_decoder_norm"):
        raise UnweaveError(
            f"{source} ranks or weighs latents over all layers together, which no cross-layer transcoder here does."
        )
    _check_axes(tensors, {"W_E": "L d M", "b_E": "L M"}, _expected(config), source)
    (n, d, m), W_E, b_E = tensors["W_E"].shape, tensors["W_E"], tensors["b_E"]
    for j in range(n):
        if not _has_bias(config):
            tensors[f"b_D.{j}"] = torch.zeros(d, dtype=W_E.dtype)
        _check_axes(tensors, {f"W_D.{j}": "t M d", f"b_D.{j}": "d"}, {"t": j + 1, "M": m, "d": d}, source)
    reads, writes = _hooks(config, "hook_points_in", n), _hooks(config, "hook_points_out", n)
    f_in, f_out = [scales.at(hook, d) for hook in reads], [scales.at(hook, d) for hook in writes]
    threshold = tensors[_THRESHOLD].float().exp() if isinstance(activation, JumpReLU) else None
    # The decoders into one output, regrouped by the layer that they come from: no file is in memory beside the result.
    decoders = [torch.empty(m, (n - i) * d, dtype=W_E.dtype, device=W_E.device) for i in range(n)]
    for j in range(n):
        for i, block in enumerate(tensors.pop(f"W_D.{j}")):
            fill(decoders[i][:, (j - i) * d : (j - i + 1) * d], block, f_in[i] / f_out[j])
    layers = []
    for i in range(n):
        weights = {"W_enc": W_E[i], "b_enc": b_E[i] / f_in[i], "b_dec": tensors[f"b_D.{i}"] / f_out[i]}
        if threshold is not None:
            weights["threshold"] = threshold[i] / f_in[i]
        layers.append(Layer(weights, decoders[i]))
    widths = [dict.fromkeys(hooks, d) for hooks in (reads, writes)]
    return cross_layer(layers, activation, source, reads=widths[0], writes=widths[1], metadata={})


def _check_axes(
    tensors: dict[str, Tensor], axes: dict[str, str], lengths: Mapping[str, int | None], source: Source
) -> None:
    """Compare shapes with each other and with the lengths that are known."""
    known = {axis: n for axis, n in lengths.items() if n is not None}
    for name, spec in axes.items():
        if name not in tensors:
            raise UnweaveError(f"{source} lacks the tensor {name!r}.")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(spec.split()) or any(
            known.setdefault(axis, n) != n for axis, n in zip(spec.split(), shape, strict=True)
        ):
            raise UnweaveError(f"{name} in {source} has the shape {shape}, and ({spec}) was expected, with {known}.")
