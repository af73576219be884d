"""Fine-tuning of a temporal SAE's decoder: encoder and attention stay, and what they make of a token follows.

A temporal SAE takes out of a token what its decoder makes of the codes that earlier tokens predict, and encodes the
rest. So with another decoder there is another rest, and codes move a little even though what encodes does not. What is
trained is the same as for other coders, with the gradients of the whole forward pass: through the projection on the
prediction, the novel codes and the output.

It reads whole sequences. Of those, the tokens that masks leave out are read, as evaluation reads them, and count for
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

from unweave.sae import SAE, TemporalSAE, ops
from unweave.sae.codes import SparseCodes
from unweave.training.decoder_tuning import DecoderTuning
from unweave.training.fresh import Scale

Sequences: TypeAlias = tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]
"""Raw activations of whole sequences, and which of their tokens count."""


class TemporalTuning(DecoderTuning):
    """A temporal SAE of which only (parts of) the decoder are trained, at the scale that it has.

    Attributes:
        read: Gives the sequences whose first so many tokens that count are those of the step.
    """

    read: Callable[[int], Sequences]

    def _to_training(
        self,
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"] | None,
        widths: Mapping[str, int] | None,
        target_widths: Mapping[str, int] | None,
    ) -> tuple[Scale, Scale | None]:
        assert isinstance(self.sae, TemporalSAE)
        return self.sae.scale, None

    def _to_raw(self, sae: SAE) -> None:
        pass  # it keeps its factor

    def outputs(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None
    ) -> tuple[SparseCodes, Float[Tensor, "n d_out"], Float[Tensor, "n d_out"]]:
        sae = self.sae
        assert isinstance(sae, TemporalSAE)
        sequences, counts = self.read(len(x))
        W_dec, kept = sae.W_dec * self.row_norms[:, None], counts.flatten()
        rest, constant = sae.split_sequences(sequences.detach().to(x) * self.scale, W_dec)
        codes = SAE.encode_sparse(sae, rest[kept])
        return codes, ops.decode(codes, W_dec) + constant[kept], x * self.scale
