"""The sparse autoencoder: an encoder, an activation function and a decoder.

    pre   = (x - b_dec) @ W_enc + b_enc
    codes = activation(pre)
    x_hat = codes @ W_dec + b_dec

One class serves every activation function, in training and in inference. A finished SAE takes raw activations: the
scale it was trained at is folded into its weights. Inference treats each token by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Selection
from unweave.kernels.scratch import scratch_if_small
from unweave.sae import encoding, ops
from unweave.sae.activation import Activation
from unweave.sae.activation_fns import AbsTopK, BatchTopK, Gated, TopK
from unweave.sae.codes import Codes, DenseCodes, SparseCodes
from unweave.sae.normalization import PerToken, token_statistics
from unweave.sae.persistence import Persistent
from unweave.sae.pursuit import Pursuit
from unweave.sae.weights import Weights

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


class SAE(Persistent, Weights, nn.Module):
    """A sparse autoencoder.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        activation: `TopK(k)`, `ReLU()` or another of `unweave.sae.ACTIVATIONS`.
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input before encoding.
        tied: Whether the decoder's rows encode too, so that W_enc is W_dec transposed. Pursuits always are.
        glu: Whether pre-activations are multiplied by `sigmoid((x - b_dec) @ W_enc_glu + b_enc_glu)`, which starts at
            1/2 everywhere; see `unweave.sae.encoding`.
        metadata: Where the SAE comes from (model, hook, data, ...); JSON values, saved with the weights.
        generator: Source of the random initial decoder; the global one if None.

    Attributes:
        per_token: "layer_norm" or "constant_norm_rescale" where every token is normalised before it is encoded, and
            its reconstruction scaled back; None (default) where it is not.
        W_enc: `(d_in, d_sae)`, laid out latent by latent in memory.
        b_enc: `(d_sae,)`; of a Gated SAE, the gate's bias.
        W_enc_glu, b_enc_glu: The second factor's, as `W_enc` and `b_enc`; None without one.
        W_dec: `(d_sae, d_in)`, rows of unit norm unless trained otherwise.
        b_dec: `(d_in,)`.
        threshold: float32; `(d_sae,)` for JumpReLU, a scalar (NaN until calibrated) for BatchTopK, else None.
        r_mag, b_mag: `(d_sae,)`, log gain and bias of a Gated SAE's codes; other SAEs have none.

    Raises:
        UnweaveError: If a width is not positive, or the activation function does not go with d_sae or with `glu`.
    """

    W_enc_glu: Tensor | None
    b_enc_glu: Tensor | None
    threshold: Tensor | None
    r_mag: Tensor
    b_mag: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        apply_b_dec_to_input: bool = True,
        tied: bool = False,
        glu: bool = False,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise UnweaveError(f"an SAE needs d_in and d_sae of at least 1, got d_in={d_in} and d_sae={d_sae}.")
        activation.check(d_sae)
        self.d_in, self.d_sae, self.activation = d_in, d_sae, activation
        self.apply_b_dec_to_input, self.tied = apply_b_dec_to_input, tied or activation.tied
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.per_token: PerToken | None = None

        W_dec = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(W_dec)
        if not self.tied:
            # A transposed view of its own storage: (d_in, d_sae), latent by latent.
            self.W_enc = nn.Parameter(W_dec.clone().T)
        if isinstance(activation, Pursuit):
            self.register_buffer("b_enc", torch.zeros(d_sae), persistent=False)
        else:
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
        if glu and (self.tied or isinstance(activation, Gated)):
            kind = "a tied" if self.tied else "a Gated"
            raise UnweaveError(f"a gated linear unit is a second encoder, and {kind} SAE's codes follow from one.")
        self.register_parameter("W_enc_glu", nn.Parameter(torch.zeros(d_sae, d_in).T) if glu else None)
        self.register_parameter("b_enc_glu", nn.Parameter(torch.zeros(d_sae)) if glu else None)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        threshold = None
        if activation.threshold_shape is not None:
            shape = (d_sae,) if activation.threshold_shape == "vector" else ()
            threshold = torch.full(shape, activation.initial_threshold)
        if threshold is None or activation.calibrated:
            self.register_buffer("threshold", threshold)
        else:
            self.threshold = nn.Parameter(threshold)
        for name, initial in activation.parameters(d_sae).items():
            self.register_parameter(name, nn.Parameter(initial))

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and self.__dict__.get("tied"):
            return self.W_dec.T
        return super().__getattr__(name)

    def _rows(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "n d_in"]:
        if x.shape[-1:] != (self.d_in,):
            raise UnweaveError(
                f"this SAE takes activations of width {self.d_in}, got a tensor of shape {tuple(x.shape)}."
            )
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _bias_of_input(self) -> Float[Tensor, " d_in"]:
        return self.b_dec if self.apply_b_dec_to_input else self.b_dec.new_zeros(self.d_in)

    def _centred(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Inputs less their bias, without a gradient; valid until the next ones, whose memory it is on a CPU."""
        bias = self._bias_of_input()
        if x.device.type != "cpu":
            return x - bias
        return torch.sub(x, bias, out=scratch_if_small("centred inputs", tuple(x.shape), x.dtype))

    def _codes(self, selection: Selection) -> SparseCodes:
        offsets = nn.functional.pad(selection.counts.cumsum(0), (1, 0))
        return SparseCodes(selection.indices, selection.values, offsets, self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "... d_in"]) -> SparseCodes:
        """The codes of each token by itself, as `SparseCodes` whose rows are the flattened leading dimensions."""
        x = self._rows(x)
        if self.per_token is not None:
            x = token_statistics(x, self.per_token).apply(x)
        if isinstance(self.activation, Pursuit):
            return self.activation.encode(x - self._bias_of_input(), self.W_dec)
        with torch.no_grad():
            centred = self._centred(x)
            spec = self.activation.inference(self.threshold)
            selection = self.selected(centred, spec)
        codes = self.activation.infer(self.encoded_at(x, self._codes(selection)), self)
        assert isinstance(codes, SparseCodes)
        return codes

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """The codes as a dense tensor."""
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.d_sae)

    def decode(self, features: Float[Tensor, "... d_sae"] | Codes) -> Float[Tensor, "... d_in"]:
        """The reconstruction of codes, dense or sparse; sparse codes give one row each.

        Raises:
            UnweaveError: If every token is normalised by itself: `output` then takes the tokens too.
        """
        if self.per_token is not None:
            raise UnweaveError(
                f"this SAE undoes {self.per_token} on its output, which takes the tokens: call output(codes, x)."
            )
        if isinstance(features, SparseCodes):
            return ops.decode(features, self.decoders) + self.b_dec
        if isinstance(features, DenseCodes):
            features = features.values
        rows = DenseCodes(features.to(self.dtype).reshape(-1, self.d_sae))
        return ops.decode(rows, self.decoders).reshape(*features.shape[:-1], self.d_out) + self.b_dec

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """What the output is where no latent fires: the decoder's bias. A coder with a skip adds that of `x`."""
        return self.b_dec

    def output(self, codes: Codes, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """The output for inputs `x` whose codes are known."""
        x = x.to(self.dtype)
        made = ops.decode(codes, self.decoders) + self.constant(x)
        return made if self.per_token is None else token_statistics(x, self.per_token).undo(made)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The reconstruction of `x`, in the shape and dtype of `x`; of a transcoder, the output that it predicts."""
        rows = self._rows(x)
        return self.output(self.encode_sparse(rows), rows).reshape(*x.shape[:-1], self.d_out).to(x.dtype)

    def training_codes(
        self,
        x: Float[Tensor, "n d_in"],
        dead: Int64[Tensor, " c"] | None = None,
        k_aux: int = 0,
        k_multi: int = 0,
        k: float | None = None,
    ) -> TrainingCodes:
        """Codes of a training batch, with gradients; the batch's tokens may be coupled (BatchTopK).

        Args:
            x: Inputs, at the scale of training.
            dead: Latents that count as dead, ascending; the `k_aux` strongest of them in each row are returned too.
            k_aux: Number of dead latents for each row; 0 for none.
            k_multi: A k larger than the activation function's: one selection with it gives the codes, and beside them
                the entries of rank k + 1 to `k_multi`. 0 for none.
            k: Takes the place of the activation function's k, for a schedule. None: its own.
        """
        activation = self.activation if k is None else self.activation.with_k(k)
        if isinstance(activation, Pursuit):
            found, aux = activation.training_codes(self, x, dead, k_aux)
            return TrainingCodes(found, found, aux)
        bias = self._bias_of_input()
        with torch.no_grad():
            centred, latents = x - bias, dead if k_aux else None
            pre: Codes
            extra = None
            if k_multi:
                pre, extra, aux = self._select_wider(activation, centred, latents, k_aux, k_multi)
            else:
                pre, aux = self._select(activation.selection(self.threshold, len(x)), centred, latents, k_aux)
        pre = self.encoded_at(x, pre)
        if aux is not None:
            aux = self.encoded_at(x, aux)
        if extra is not None:
            extra = self.encoded_at(x, extra)
        return TrainingCodes(pre, activation.codes(pre, self), aux, extra)

    def _select_wider(
        self, activation: Activation, centred: Tensor, latents: Tensor | None, k_aux: int, k: int
    ) -> tuple[SparseCodes, SparseCodes, SparseCodes | None]:
        """`_select` with a larger k: what its own k would have given, the rest, and the dead latents."""
        assert isinstance(activation, TopK | AbsTopK | BatchTopK)
        # The threshold is that of the smaller k, a poor guess here.
        pre, aux = self._select(activation.with_k(k).selection(None, len(centred)), centred, latents, k_aux)
        assert isinstance(pre, SparseCodes)
        chosen = activation.strongest(pre.values, len(centred))
        return pre.where(chosen), pre.where(~chosen), aux

    def _select(
        self, spec: kernels.Spec, centred: Tensor, latents: Tensor | None, k_aux: int
    ) -> tuple[Codes, SparseCodes | None]:
        pre: Codes
        try:
            most = DENSE_ABOVE if isinstance(spec, kernels.Above) else 1.0
            pre = self._codes(self.selected(centred, spec, most))
        except kernels.TooDense:
            pre = DenseCodes(self.pre_activations(centred))
        if latents is None or len(latents) == 0:
            return pre, None
        return pre, self._codes(self.strongest(centred, latents, k_aux))

    # A coder with several encoders overrides the following, and nothing else of the encoder.

    def selected(self, centred: Float[Tensor, "n d_in"], spec: kernels.Spec, max_density: float = 1.0) -> Selection:
        """What a selection keeps of the pre-activations; see `unweave.kernels.encode_select`."""
        return encoding.encode_select(centred, self.encoders, spec, max_density)

    def strongest(self, centred: Float[Tensor, "n d_in"], latents: Int64[Tensor, " c"], k: int) -> Selection:
        """The `k` strongest of some latents for each token."""
        # The dead are few: their columns by themselves cost less than looking for them among all the others.
        spec = kernels.Largest(min(k, len(latents)), magnitude=self.activation.signed)
        found = encoding.encode_select(centred, [(W.T[latents].T, b[latents]) for W, b in self.encoders], spec)
        return found._replace(indices=latents[found.indices])

    def pre_activations(self, centred: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """All pre-activations, as a dense tensor; a pre-encoder bias is subtracted already."""
        return encoding.pre_activations(centred, self.encoders)

    def encoded_at(self, x: Float[Tensor, "n d_in"], pre: ops.AnyCodes) -> ops.AnyCodes:
        """Pre-activations that are known at some entries, with gradients."""
        return encoding.encoded_at(x, self._bias_of_input(), self.encoders, pre)

    def by_input(self, x: Float[Tensor, "n d_in"], latents: Int64[Tensor, " c"]) -> list[tuple[Tensor, Tensor]]:
        """Inputs, and those of the latents that read them."""
        return [(x, latents)]

    def decoder_rows(self, latents: Int64[Tensor, " c"]) -> Float[Tensor, "c d_out"]:
        """Rows of the decoder, of latents in ascending order, with their gradients."""
        return self.W_dec[latents]

    @torch.no_grad()
    def scale_encoder(self, scale: float | Float[Tensor, " d_in"]) -> None:
        """Multiply the encoder's rows, each by the factor of its input."""
        for W, _ in self.encoders:
            W.mul_(scale[:, None] if isinstance(scale, Tensor) else scale)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation}"
