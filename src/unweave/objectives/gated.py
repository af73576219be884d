"""What a gate learns from: its own reconstruction, since a step function hands it no gradient (arXiv 2404.16014)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from unweave.objectives.reconstruction import squared_error
from unweave.sae import ops
from unweave.sae.codes import Codes


def open_gate(pre: Codes) -> Codes:
    """The gate's pre-activations where it is open, else 0: what the gate is penalised for, and reconstructs with."""
    return pre.with_values(pre.values.relu())


def gate_error(
    gate: Codes,
    W_dec: ops.Decoder,
    b_dec: Float[Tensor, "*n d"],
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Squared error of the reconstruction `gate @ W_dec + b_dec`.

    The decoder and its bias are frozen here: they serve the codes, and the gate has to make do with them.

    Args:
        gate: From `open_gate`.
        W_dec: Decoder; gets no gradient.
        b_dec: Decoder bias; gets no gradient.
        x: Inputs.
        weights: Of each token's error; see `error_weights`.
    """
    detached = W_dec.detach() if isinstance(W_dec, Tensor) else [block.detach() for block in W_dec]
    return squared_error(ops.decode(gate, detached) + b_dec.detach(), x, weights)
