"""The sparse autoencoder: an encoder, an activation function and a decoder.

    pre   = (x - b_dec) @ W_enc + b_enc
    codes = activation(pre)
    x_hat = codes @ W_dec + b_dec

One class serves every activation function, in training and in inference. A finished SAE takes raw activations: the
scale it was trained at is folded into its weights. Inference treats each token by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Selection
from unweave.kernels.encode_select import CHUNK_ROWS
from unweave.sae import ops
from unweave.sae.activation_fns import Activation, JumpReLU, ReLU
from unweave.sae.codes import Codes, DenseCodes, SparseCodes

DENSE_ABOVE = 0.05
"""Density of a training step's entries above which dense products are faster than sparse ones."""


class TrainingCodes(NamedTuple):
    """What the encoder gives to a training step."""

    pre: Codes
    """Pre-activations at the entries that the step looks at."""
    codes: Codes
    """Codes at the same entries."""
    aux: SparseCodes | None
    """Pre-activations of the strongest dead latents of each row, if any were asked for."""


class SAE(nn.Module):
    """A sparse autoencoder.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        activation: `ReLU()`, `TopK(k)`, `BatchTopK(k)` or `JumpReLU()`.
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input before encoding.
        metadata: Where the SAE comes from (model, hook, data, ...); JSON values, saved with the weights.
        generator: Source of the random initial decoder; the global one if None.

    Attributes:
        W_enc: `(d_in, d_sae)`, laid out latent by latent in memory.
        b_enc: `(d_sae,)`.
        W_dec: `(d_sae, d_in)`, rows of unit norm unless trained otherwise.
        b_dec: `(d_in,)`.
        threshold: float32; `(d_sae,)` for JumpReLU, a scalar (NaN until calibrated) for BatchTopK, else None.

    Raises:
        UnweaveError: If a width is not positive, or k is larger than d_sae.
    """

    threshold: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        apply_b_dec_to_input: bool = True,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise UnweaveError(f"an SAE needs d_in and d_sae of at least 1, got d_in={d_in} and d_sae={d_sae}.")
        k = getattr(activation, "k", 1)
        if k > d_sae:
            raise UnweaveError(f"k={k} is larger than the number of latents, d_sae={d_sae}.")
        self.d_in, self.d_sae, self.activation = d_in, d_sae, activation
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.metadata: dict[str, Any] = dict(metadata or {})

        W_dec = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(
            W_dec.clone().T
        )  # a transposed view of its own storage: (d_in, d_sae), latent by latent
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if activation.threshold_shape == "vector":
            self.threshold = nn.Parameter(torch.full((d_sae,), activation.init_threshold))  # type: ignore[union-attr]
        else:
            scalar = torch.tensor(float("nan")) if activation.threshold_shape == "scalar" else None
            self.register_buffer("threshold", scalar)

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def _rows(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "n d_in"]:
        if x.shape[-1:] != (self.d_in,):
            raise UnweaveError(
                f"this SAE takes activations of width {self.d_in}, got a tensor of shape {tuple(x.shape)}."
            )
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _bias_of_input(self) -> Float[Tensor, " d_in"]:
        return self.b_dec if self.apply_b_dec_to_input else torch.zeros_like(self.b_dec)

    def _codes(self, selection: Selection) -> SparseCodes:
        offsets = nn.functional.pad(selection.counts.cumsum(0), (1, 0))
        return SparseCodes(selection.indices, selection.values, offsets, self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "... d_in"]) -> SparseCodes:
        """The codes of each token by itself, as `SparseCodes` whose rows are the flattened leading dimensions."""
        x = self._rows(x)
        with torch.no_grad():
            centred = x - self._bias_of_input()
            select = [lambda pre: self.activation.infer(pre, self.threshold)]
            (selection,) = kernels.encode_select(centred, self.W_enc, self.b_enc, select)
        pre = ops.encode_at(x, self._bias_of_input(), self.W_enc, self.b_enc, self._codes(selection))
        return pre.with_values(pre.values.relu())

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """The codes as a dense tensor."""
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.d_sae)

    def decode(self, features: Float[Tensor, "... d_sae"] | Codes) -> Float[Tensor, "... d_in"]:
        """The reconstruction of codes, dense or sparse; sparse codes give one row each."""
        if isinstance(features, SparseCodes):
            return ops.decode(features, self.W_dec) + self.b_dec
        if isinstance(features, DenseCodes):
            features = features.values
        return features.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """The reconstruction of `x`, in the shape and dtype of `x`."""
        return self.decode(self.encode_sparse(x)).reshape(x.shape).to(x.dtype)

    def training_codes(
        self, x: Float[Tensor, "n d_in"], dead: Bool[Tensor, " d_sae"] | None = None, k_aux: int = 0
    ) -> TrainingCodes:
        """Codes of a training batch, with gradients; the batch's tokens may be coupled (BatchTopK).

        Args:
            x: Inputs, at the scale of training.
            dead: Latents that count as dead, of which the `k_aux` strongest of each row are returned too.
            k_aux: Number of dead latents for each row; 0 for none.
        """
        bias = self._bias_of_input()
        with torch.no_grad():
            centred, latents = x - bias, None if dead is None or k_aux == 0 else dead.nonzero().flatten()
            pre, aux = self._select(centred, latents, k_aux)
        pre = ops.encode_at(x, bias, self.W_enc, self.b_enc, pre)
        if aux is not None:
            aux = ops.encode_at(x, bias, self.W_enc, self.b_enc, aux)
        return TrainingCodes(pre, self.activation.apply(pre, self.threshold), aux)

    def _select(self, centred: Tensor, latents: Tensor | None, k_aux: int) -> tuple[Codes, SparseCodes | None]:
        activation = self.activation
        select = [activation.selector(self.threshold, len(centred))]
        if latents is not None and len(latents):
            select.append(lambda pre: kernels.topk_among(pre, k_aux, latents))
        if isinstance(activation, ReLU | JumpReLU):
            # How many entries there are is known only now; the first rows tell whether sparse products would pay.
            (probe,) = kernels.encode_select(centred[:CHUNK_ROWS], self.W_enc, self.b_enc, select[:1])
            if len(probe.indices) > DENSE_ABOVE * len(probe.counts) * self.d_sae:
                pre = torch.addmm(self.b_enc, centred, self.W_enc)
                return DenseCodes(pre), self._codes(select[1](pre)) if len(select) > 1 else None
        selections = kernels.encode_select(centred, self.W_enc, self.b_enc, select)
        if isinstance(select[0], kernels.BatchTopKCandidates) and select[0].missed:
            select[0] = kernels.BatchTopKCandidates(select[0].budget)
            selections = kernels.encode_select(centred, self.W_enc, self.b_enc, select)
        main = activation.finish(selections[0], len(centred))
        return self._codes(main), self._codes(selections[1]) if len(selections) > 1 else None

    def save(self, folder: str | Path) -> Path:
        """Write the inference form in SAELens' layout; see `unweave.sae.files.save`."""
        from unweave.sae import files

        return files.save(self, folder)

    @staticmethod
    def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> SAE:
        """Read an SAE from a folder in SAELens' layout; see `unweave.sae.files.load`."""
        from unweave.sae import files

        return files.load(folder, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation}"
