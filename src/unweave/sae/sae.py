"""The sparse autoencoder: an encoder, an activation function and a decoder.

    pre   = (x - b_dec) @ W_enc + b_enc
    codes = activation(pre)
    x_hat = codes @ W_dec + b_dec

One class serves every activation function, in training and in inference. A finished SAE takes raw activations: the
scale it was trained at is folded into its weights. Inference treats each token by itself.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Selection
from unweave.sae import ops
from unweave.sae.activation_fns import Activation, BatchTopK, Gated, TopK
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
    extra: SparseCodes | None = None
    """Pre-activations that a larger k selects beside the entries of `codes`, if one was asked for."""


class SAE(nn.Module):
    """A sparse autoencoder.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        activation: `ReLU()`, `TopK(k)`, `BatchTopK(k)`, `JumpReLU()` or `Gated()`.
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input before encoding.
        metadata: Where the SAE comes from (model, hook, data, ...); JSON values, saved with the weights.
        generator: Source of the random initial decoder; the global one if None.

    Attributes:
        W_enc: `(d_in, d_sae)`, laid out latent by latent in memory.
        b_enc: `(d_sae,)`; of a Gated SAE, the gate's bias.
        W_dec: `(d_sae, d_in)`, rows of unit norm unless trained otherwise.
        b_dec: `(d_in,)`.
        threshold: float32; `(d_sae,)` for JumpReLU, a scalar (NaN until calibrated) for BatchTopK, else None.
        r_mag, b_mag: `(d_sae,)`, log gain and bias of a Gated SAE's codes, else None.

    Raises:
        UnweaveError: If a width is not positive, or k is larger than d_sae.
    """

    threshold: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None

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
        gated = isinstance(activation, Gated)
        for name in ("r_mag", "b_mag"):
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)) if gated else None)

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
            spec = self.activation.inference(self.threshold)
            selection = kernels.encode_select(centred, self.W_enc, self.b_enc, spec)
        pre = ops.encode_at(x, self._bias_of_input(), self.W_enc, self.b_enc, self._codes(selection))
        if isinstance(self.activation, Gated):
            return self.activation.magnitudes(pre, self.b_enc, self.r_mag, self.b_mag)
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
        self, x: Float[Tensor, "n d_in"], dead: Bool[Tensor, " d_sae"] | None = None, k_aux: int = 0, k_multi: int = 0
    ) -> TrainingCodes:
        """Codes of a training batch, with gradients; the batch's tokens may be coupled (BatchTopK).

        Args:
            x: Inputs, at the scale of training.
            dead: Latents that count as dead, of which the `k_aux` strongest of each row are returned too.
            k_aux: Number of dead latents for each row; 0 for none.
            k_multi: A k larger than the activation function's: one selection with it gives the codes, and beside them
                the entries of rank k + 1 to `k_multi`. 0 for none.
        """
        bias = self._bias_of_input()
        with torch.no_grad():
            centred, latents = x - bias, None if dead is None or k_aux == 0 else dead.nonzero().flatten()
            pre: Codes
            extra = None
            if k_multi:
                pre, extra, aux = self._select_wider(centred, latents, k_aux, k_multi)
            else:
                pre, aux = self._select(centred, latents, k_aux)
        pre = ops.encode_at(x, bias, self.W_enc, self.b_enc, pre)
        if aux is not None:
            aux = ops.encode_at(x, bias, self.W_enc, self.b_enc, aux)
        if extra is not None:
            extra = ops.encode_at(x, bias, self.W_enc, self.b_enc, extra)
        if isinstance(self.activation, Gated):
            codes: Codes = self.activation.magnitudes(pre, self.b_enc, self.r_mag, self.b_mag)
        else:
            codes = self.activation.apply(pre, self.threshold)
        return TrainingCodes(pre, codes, aux, extra)

    def _select_wider(
        self, centred: Tensor, latents: Tensor | None, k_aux: int, k: int
    ) -> tuple[SparseCodes, SparseCodes, SparseCodes | None]:
        """`_select` with a larger k: what its own k would have given, the rest, and the dead latents."""
        assert isinstance(self.activation, TopK | BatchTopK)
        wider = copy.copy(self)  # the same weights under another activation function
        wider.activation = dataclasses.replace(self.activation, k=k)
        wider._buffers = {"threshold": None}  # that of the smaller k would be a poor guess
        pre, aux = wider._select(centred, latents, k_aux)
        assert isinstance(pre, SparseCodes)
        chosen = self.activation.strongest(pre.values, len(centred))
        return pre.where(chosen), pre.where(~chosen), aux

    def _select(self, centred: Tensor, latents: Tensor | None, k_aux: int) -> tuple[Codes, SparseCodes | None]:
        spec = self.activation.selection(self.threshold, len(centred))
        pre: Codes
        try:
            most = DENSE_ABOVE if isinstance(spec, kernels.Above) else 1.0
            pre = self._codes(kernels.encode_select(centred, self.W_enc, self.b_enc, spec, max_density=most))
        except kernels.TooDense:
            pre = DenseCodes(torch.addmm(self.b_enc, centred, self.W_enc))
        if latents is None or len(latents) == 0:
            return pre, None
        # The dead are few: their columns by themselves cost less than looking for them among all the others.
        W_dead = self.W_enc.T[latents].T
        aux = kernels.encode_select(centred, W_dead, self.b_enc[latents], kernels.Largest(min(k_aux, len(latents))))
        return pre, self._codes(aux._replace(indices=latents[aux.indices]))

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
