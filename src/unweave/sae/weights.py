"""The weights of an SAE as they are held: an encoder of one factor or two, a decoder in one block or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.sae import ops
from unweave.sae.encoding import Encoders

if TYPE_CHECKING:
    from unweave.sae.sae import SAE


class Weights:
    """What `SAE` inherits beside `nn.Module`."""

    @property
    def device(self: SAE) -> torch.device:  # type: ignore[misc]
        return self.b_dec.device

    @property
    def dtype(self: SAE) -> torch.dtype:  # type: ignore[misc]
        return self.b_dec.dtype

    @property
    def d_out(self: SAE) -> int:  # type: ignore[misc]
        """Width of the output: that of the input, but for transcoders."""
        return len(self.b_dec)

    @property
    def glu(self: SAE) -> bool:  # type: ignore[misc]
        """Whether a second factor multiplies the pre-activations."""
        return self.W_enc_glu is not None

    @property
    def encoders(self: SAE) -> Encoders:  # type: ignore[misc]
        """Weights and bias of each factor of the pre-activations: of one, or of two."""
        if self.W_enc_glu is None or self.b_enc_glu is None:
            return ((self.W_enc, self.b_enc),)
        return (self.W_enc, self.b_enc), (self.W_enc_glu, self.b_enc_glu)

    @property
    def decoders(self: SAE) -> tuple[Float[Tensor, "m d_b"], ...]:  # type: ignore[misc]
        """The decoder as it is held and changed in place: `W_dec`; of a cross-layer transcoder one block per layer."""
        return (self.W_dec,)

    def with_decoders(self: SAE, per_latent: Float[Tensor, " d_sae"]) -> list[tuple[Tensor, Tensor]]:  # type: ignore[misc]
        """Each block of the decoder with what belongs to its latents."""
        return list(zip(self.decoders, per_latent.split([len(block) for block in self.decoders]), strict=True))

    def decoder_rows(self: SAE, latents: Int64[Tensor, " c"]) -> Float[Tensor, "c d_out"]:  # type: ignore[misc]
        """Rows of the decoder, of latents in ascending order, with their gradients."""
        return self.W_dec[latents]

    def decoder_norms(self: SAE) -> Float[Tensor, " d_sae"]:  # type: ignore[misc]
        """Norm of each latent's decoder row, as penalties weigh its codes; finite gradients for rows of zeros."""
        return torch.cat([ops.row_norms(block) for block in self.decoders])
