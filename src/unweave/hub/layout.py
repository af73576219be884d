"""Where each weight is in a foreign file: a table per format, from which names, orientation and shapes follow.

    LAYOUT = {"W_enc": "encoder.weight M d", "b_enc": "encoder.bias M", "W_dec": "W_dec M d", "b_dec": "bias d"}

says that `encoder.weight` has the shape (M, d), where d is the width of the input and M the number of latents (o: the
width of the output, where it may differ), and is therefore the transpose of our `W_enc`, which is (d, M). A name that
ends in `?` may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE, Activation, Transcoder
from unweave.sae.draft import Draft, on_meta
from unweave.sae.normalization import PerToken

Layout = Mapping[str, str]
LENGTHS = {"d": "d_in", "o": "d_out", "M": "d_sae"}
_OURS = {"W_enc": "d M", "W_enc_glu": "d M", "W_dec": "M o", "W_skip": "o d"}


def take(
    tensors: dict[str, Tensor],
    layout: Layout,
    where: object,
    *,
    expected: Mapping[str, int | None] | None = None,
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The weights of a file under our names and in our orientation, as views.

    Args:
        tensors: Those of the file; emptied.
        layout: Where each weight is.
        where: The file, for errors.
        expected: Lengths that a config gives for "d", "o" and "M"; None where it does not.
        ignored: Names of tensors that mean nothing to inference.

    Raises:
        UnweaveError: If a tensor is missing, unknown, or has a shape that contradicts the config or the others.
    """
    lengths = {axis: n for axis, n in (expected or {}).items() if n is not None}
    plan = {}
    for ours, entry in layout.items():
        name, *axes = entry.split()
        optional, name = name.endswith("?"), name.removesuffix("?")
        if name not in tensors:
            if optional:
                continue
            raise UnweaveError(f"{where} lacks the tensor {name!r}.")
        _measure(name, tensors[name].shape, axes, lengths, where)
        plan[ours] = (name, _is_turned(ours, axes))
    known = {name for name, _ in plan.values()} | set(ignored)
    if unknown := sorted(tensors.keys() - known):
        raise UnweaveError(f"{where} holds the tensor {unknown[0]!r}, which this format has not.")
    taken = {ours: tensors[name].T if turned else tensors[name] for ours, (name, turned) in plan.items()}
    tensors.clear()
    return taken


def _measure(name: str, shape: Sequence[int], axes: Sequence[str], lengths: dict[str, int], where: object) -> None:
    """Compare a shape with the lengths that are known, and learn those that are not."""
    wanted = [lengths.get(axis, n) for axis, n in zip(axes, shape, strict=False)]
    if len(shape) != len(axes) or list(shape) != wanted:
        words = ", ".join(f"{LENGTHS[a]}={lengths[a]}" if a in lengths else LENGTHS[a] for a in axes)
        raise UnweaveError(f"{name} in {where} has the shape {tuple(shape)}, and ({words}) was expected.")
    for axis, n in zip(axes, shape, strict=True):
        if lengths.setdefault(axis, n) != n:
            raise UnweaveError(f"{name} in {where} has the shape {tuple(shape)}, which should be square.")


def _is_turned(ours: str, axes: Sequence[str]) -> bool:
    own = _OURS.get(ours, "").split()
    if not own or (ours == "W_skip" and axes[0] == axes[1]):
        return False
    own = own if "o" in axes or ours.startswith("W_enc") else ["d" if axis == "o" else axis for axis in own]
    return list(axes) == own[::-1]


def plain(
    weights: dict[str, Tensor],
    activation: Activation,
    where: object,
    *,
    metadata: dict[str, Any],
    pre_bias: bool = False,
    predicts: bool = False,
    per_token: PerToken | None = None,
    folds: Sequence[Callable[[SAE], None]] = (),
) -> Draft:
    """An SAE, or a transcoder, from weights under our names; biases that a file leaves out are 0.

    Args:
        weights: See `take`.
        activation: The activation function.
        where: The file, for errors.
        metadata: Of the SAE.
        pre_bias: Whether `b_dec` is subtracted from the input.
        predicts: Whether it is a transcoder. It is one anyway if it has a skip: what an SAE with a skip subtracts from
            its input is folded into `b_enc`.
        per_token: How every token is normalised.
        folds: What is done at the end.
    """
    (d, m), o = weights["W_enc"].shape, weights["W_dec"].shape[1]
    weights.setdefault("b_enc", torch.zeros(m))
    weights.setdefault("b_dec", torch.zeros(o))
    skip, glu = "W_skip" in weights, "W_enc_glu" in weights
    if pre_bias and (predicts or skip):
        weights["b_enc"] = without_pre_bias(weights)
        pre_bias = False
    if predicts or skip:
        sae: SAE = on_meta(lambda: Transcoder(d, o, m, activation, skip=skip, glu=glu, metadata=metadata))
    else:
        sae = on_meta(lambda: SAE(d, m, activation, apply_b_dec_to_input=pre_bias, glu=glu, metadata=metadata))
    sae.per_token = per_token
    return Draft(sae, weights, str(where), folds)


def without_pre_bias(weights: Mapping[str, Tensor]) -> Tensor:
    """The encoder's bias of the SAE that gives the same codes without `b_dec` being subtracted from its input."""
    if weights["W_enc"].is_meta:
        return weights["b_enc"]
    b_enc, b_dec = weights["b_enc"].double(), weights["b_dec"].double()
    return (b_enc - product(b_dec, weights["W_enc"])).to(weights["b_enc"].dtype)


def product(vector: Tensor, matrix: Tensor) -> Tensor:
    """`vector @ matrix` in float64, in pieces, without a copy of the matrix."""
    return torch.cat([vector @ part.double() for part in matrix.split(4096, 1)])


def value_of(tensor: Tensor, what: str, where: object) -> float:
    """The number in a tensor of one element.

    Raises:
        UnweaveError: If it has several.
    """
    if tensor.numel() != 1:
        raise UnweaveError(f"{what} in {where} has the shape {tuple(tensor.shape)}, and one number was expected.")
    return float(tensor.item())


def shared_threshold(weights: dict[str, Tensor], threshold: float) -> None:
    """Give every latent the same threshold, in place."""
    weights["threshold"] = torch.full((weights["W_enc"].shape[1],), threshold)


def positive(threshold: Tensor, where: object) -> Tensor:
    """Thresholds of an activation `h * 1[h > threshold]`.

    Raises:
        UnweaveError: If one is below 0, where codes could be negative, which no activation function of ours gives.
    """
    if (threshold < 0).any():
        raise UnweaveError(f"{where} has thresholds below 0 and no ReLU, so its codes may be negative: not readable.")
    return threshold
