"""Temporal SAEs: what earlier tokens predict of a token is taken out first, and only the rest is encoded sparsely.

Lubana et al., arXiv 2511.01836. On a sequence `x` of width d, with `r = x - b_dec` at first, each attention layer does

    z = relu(r @ W_enc)                     codes of the residual so far, at every token
    p = relu(attention(from z, to the z of earlier tokens))
    a = (p @ W_dec) . r / |p @ W_dec|^2     how much of the residual points along the prediction
    r <- r - a p @ W_dec                    and the predicted codes gain a p

and an activation function then encodes what is left, which is the novel part: `x_hat = (predicted + novel) @ W_dec +
b_dec`. The published encoder is `W_enc = W_dec.T / (4 d)`. The predicted codes are dense, the novel ones sparse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.sae.activation import Activation
from unweave.sae.activation_fns import ReLU, TopK
from unweave.sae.codes import Codes, SparseCodes
from unweave.sae.sae import SAE

_EPS = 1e-6


@dataclass(frozen=True)
class Temporal:
    """A temporal SAE's attention, and the sequences that it is trained on.

    Attributes:
        context: Tokens in a sequence. The rows of every batch are whole sequences, one after the other, in order.
        n_heads: Attention heads.
        n_layers: Attention layers.
        bottleneck: Factor by which keys and queries are narrower than the dictionary.
        tied: Whether the encoder is the decoder transposed, or a matrix of its own.
    """

    context: int = 128
    n_heads: int = 8
    n_layers: int = 1
    bottleneck: int = 64
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "n_heads", "n_layers", "bottleneck"):
            if getattr(self, name) < 1:
                raise UnweaveError(f"a temporal SAE needs {name} of at least 1, got {getattr(self, name)}.")

    def check(self, d_sae: int, activation: Activation) -> None:
        """Refuse what the heads do not divide, and activation functions that it is not defined with.

        Raises:
            UnweaveError: With the reason.
        """
        if d_sae % (self.n_heads * self.bottleneck):
            raise UnweaveError(
                f"a temporal SAE's heads have d_sae / (bottleneck * n_heads) dimensions: {d_sae} is no multiple of "
                f"{self.bottleneck} * {self.n_heads}."
            )
        if type(activation) not in (ReLU, TopK):
            raise UnweaveError(f"a temporal SAE encodes with ReLU or TopK, not with {type(activation).__name__}.")


class Prediction(NamedTuple):
    """What earlier tokens tell of each token."""

    codes: Float[Tensor, "b t d_sae"]
    output: Float[Tensor, "b t d_in"]
    """`codes @ W_dec`."""


class CausalAttention(nn.Module):
    """Attention from each token's codes to those of the tokens before it; the parameters are named as in SAELens.

    Args:
        d_sae: Width of the codes.
        settings: Heads and bottleneck.
        generator: Source of the initial weights, whose rows have the norm 1 / sqrt(head width).
    """

    def __init__(self, d_sae: int, settings: Temporal, generator: torch.Generator | None) -> None:
        super().__init__()
        self.n_heads, narrow = settings.n_heads, d_sae // settings.bottleneck
        self.k_ctx, self.q_target = nn.Linear(d_sae, narrow), nn.Linear(d_sae, narrow)
        self.v_ctx, self.c_proj = nn.Linear(d_sae, d_sae), nn.Linear(d_sae, d_sae)
        heads = (narrow // self.n_heads, narrow // self.n_heads, d_sae // self.n_heads, d_sae)
        for layer, head in zip((self.k_ctx, self.q_target, self.v_ctx, self.c_proj), heads, strict=True):
            rows = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data.copy_(nn.functional.normalize(rows, dim=1) / head**0.5)
            # Biases of 0 would predict exactly nothing of a first token, where the projection has no gradient.
            layer.bias.data.uniform_(-(d_sae**-0.5), d_sae**-0.5, generator=generator)

    def forward(self, z: Float[Tensor, "b t d_sae"]) -> Float[Tensor, "b t d_sae"]:
        before = nn.functional.pad(z[:, :-1], (0, 0, 1, 0))  # at each token, the codes of the one before it
        q, k, v = (
            project.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.q_target(z), self.k_ctx(before), self.v_ctx(before))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return made


class TemporalSAE(SAE):
    """An SAE that reads whole sequences `(..., tokens, d_in)`.

    `encode` and `encode_sparse` give the novel codes, `predicted` what earlier tokens tell, and `full_codes` their sum,
    which is what `decode` turns into what `forward` returns.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents, a multiple of `bottleneck * n_heads`.
        activation: `TopK(k)` or `ReLU()`, for the novel part.
        settings: The attention.
        apply_b_dec_to_input: As for `SAE`.
        metadata: As for `SAE`.
        generator: Source of the random initial weights; the global one if None.

    Attributes:
        scale: What inputs are multiplied by and outputs divided by. It cannot be folded into the weights: projections
            and attention are not linear in it.
        attn_layers: The attention layers.
        W_enc, W_dec, b_dec: As in an SAE. Decoder rows have no unit norm, and there is no encoder bias.

    Raises:
        UnweaveError: If widths, heads and activation function do not go together.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        settings: Temporal,
        *,
        apply_b_dec_to_input: bool = True,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        settings.check(d_sae, activation)
        super().__init__(
            d_in, d_sae, activation, apply_b_dec_to_input=apply_b_dec_to_input, tied=settings.tied, metadata=metadata,
            generator=generator,
        )  # fmt: skip
        self.settings, self.scale = settings, 1.0
        del self.b_enc
        self.register_buffer("b_enc", torch.zeros(d_sae), persistent=False)
        self.W_dec.data.copy_(torch.randn(d_sae, d_in, generator=generator))
        if not settings.tied:
            self.W_enc.data.copy_(torch.randn(d_sae, d_in, generator=generator).T * self.encoder_scale)
        self.attn_layers = nn.ModuleList(CausalAttention(d_sae, settings, generator) for _ in range(settings.n_layers))

    @property
    def encoder_scale(self) -> float:
        """What the published matrix is multiplied by in encoding; `W_enc` holds the product."""
        return 1 / (4 * self.d_in)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * self.encoder_scale if name == "W_enc" and self.tied else found

    def _sequences(self, x: Float[Tensor, "... t d_in"]) -> Float[Tensor, "b t d_in"]:
        if x.ndim < 3 or x.shape[-1] != self.d_in:
            raise UnweaveError(
                f"this temporal SAE takes sequences (..., tokens, {self.d_in}), got a tensor of shape {tuple(x.shape)}."
            )
        return x.flatten(0, -3).to(self.dtype) * self.scale

    def _predicted(self, x: Float[Tensor, "b t d_in"], W_dec: Float[Tensor, "d_sae d_in"] | None = None) -> Prediction:
        W_enc, W_dec = self.W_enc, self.W_dec if W_dec is None else W_dec
        residual = x - self._bias_of_input()
        codes, output = x.new_zeros(*x.shape[:2], self.d_sae), torch.zeros_like(x)
        for layer in self.attn_layers:
            p = layer((residual @ W_enc).relu()).relu()
            direction = p @ W_dec
            norm = direction.norm(dim=2, keepdim=True) + _EPS
            along = torch.linalg.vecdot(direction, residual).unsqueeze(2) / norm.square()
            codes, output = codes + along * p, output + along * direction
            residual = residual - along * direction
        return Prediction(codes, output)

    def predicted(self, x: Float[Tensor, "... t d_in"]) -> Float[Tensor, "... t d_sae"]:
        """The codes that earlier tokens predict, dense."""
        return self._predicted(self._sequences(x)).codes.reshape(*x.shape[:-1], self.d_sae)

    def _both(self, x: Float[Tensor, "... t d_in"]) -> tuple[Prediction, SparseCodes]:
        sequences = self._sequences(x)
        prediction = self._predicted(sequences)
        return prediction, super().encode_sparse((sequences - prediction.output).flatten(0, 1))

    def encode_sparse(self, x: Float[Tensor, "... t d_in"]) -> SparseCodes:
        """The novel codes of each token, as `SparseCodes` whose rows are the flattened leading dimensions."""
        return self._both(x)[1]

    def full_codes(self, x: Float[Tensor, "... t d_in"]) -> Float[Tensor, "... t d_sae"]:
        """The predicted and the novel codes together, dense: `decode(full_codes(x))` is `forward(x)`."""
        prediction, novel = self._both(x)
        return (prediction.codes.flatten(0, 1) + novel.to_dense()).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, features: Float[Tensor, "... d_sae"] | Codes) -> Float[Tensor, "... d_in"]:
        """What codes stand for, in the units of the inputs; of novel codes alone, without what was predicted."""
        return super().decode(features) / self.scale

    def output(self, codes: Codes, x: Float[Tensor, "... t d_in"]) -> Float[Tensor, "n d_in"]:
        """The output for sequences whose novel codes are known."""
        predicted = self._predicted(self._sequences(x)).output.flatten(0, 1)
        return self.decode(codes) + predicted / self.scale

    def forward(self, x: Float[Tensor, "... t d_in"]) -> Float[Tensor, "... t d_in"]:
        """The reconstruction of sequences, in their shape and dtype."""
        prediction, novel = self._both(x)
        made = self.decode(novel) + prediction.output.flatten(0, 1) / self.scale
        return made.reshape(x.shape).to(x.dtype)

    def split_input(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """`split_sequences` of rows that are whole sequences of `settings.context` tokens.

        Raises:
            UnweaveError: If the number of rows is no multiple of the context.
        """
        if len(x) % self.settings.context:
            raise UnweaveError(
                f"a temporal SAE's batches are whole sequences of {self.settings.context} tokens, and {len(x)} rows "
                "are no multiple."
            )
        return self.split_sequences(x.reshape(-1, self.settings.context, self.d_in))

    def split_sequences(
        self, x: Float[Tensor, "b t d_in"], W_dec: Float[Tensor, "d_sae d_in"] | None = None
    ) -> tuple[Float[Tensor, "b*t d_in"], Float[Tensor, "b*t d_in"]]:
        """Sequences at the scale of training, without what is predicted of each token.

        Args:
            x: The sequences, multiplied by `scale`.
            W_dec: What stands in the decoder's place, for its gradients; it does not encode.

        Returns:
            What is left to encode, and what the output is without novel codes.
        """
        predicted = self._predicted(x, W_dec).output.flatten(0, 1)
        return x.flatten(0, 1) - predicted, self.b_dec + predicted

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, settings={self.settings}"
