"""What cross-layer transcoders and their parts share: an encoder, latents and a block of the decoder for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Above, LargestOfBatch, Selection, Spec
from unweave.kernels.select import largest_of_batch
from unweave.sae import ops
from unweave.sae.codes import DenseCodes
from unweave.sae.sae import SAE


class Layered(SAE):
    """An SAE whose inputs are several layers side by side, each with an encoder, a decoder and equally many latents.

    TopK, AbsTopK and GroupMax select by token and layer, so that k is a layer's; BatchTopK selects among all layers of
    the batch, k for each on average, and has one threshold.

    Attributes:
        layers: Number of layers.
        W_enc: `(d, d_sae)`, where d is the width of one layer; layer l has the columns of its latents.
        W_dec: `(d_sae, d_out)`, made from `decoders` whenever it is asked for: a copy, which it is no use to change.
    """

    layers: int

    def __getattr__(self, name: str) -> Any:
        if name == "W_dec" and "W_dec" in self._modules:
            return torch.cat([self._widened(block) for block in self.decoders])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "W_dec" and "W_dec" in self._modules:
            raise UnweaveError(
                "a cross-layer transcoder's decoder is held in blocks, and W_dec is made from them: write to "
                "decoders[i], what layer i's latents write to its own output and all later ones."
            )
        super().__setattr__(name, value)

    def _hold(self, decoders: Iterable[Tensor]) -> None:
        """Take over the decoder, block by block, under the names `W_dec.0`, `W_dec.1`, ..."""
        self._parameters.pop("W_dec", None)
        self.add_module("W_dec", nn.ParameterList(decoders))

    @property
    def decoders(self) -> tuple[Float[Tensor, "m d_b"], ...]:
        """What each layer's latents write: its own output and those of all later layers, side by side."""
        return tuple(self._modules["W_dec"])  # type: ignore[arg-type]

    def _widened(self, rows: Float[Tensor, "c d_b"]) -> Float[Tensor, "c d_out"]:
        return pad(rows, (self.d_out - rows.shape[1], 0))

    def decoder_rows(self, latents: Int64[Tensor, " c"]) -> Float[Tensor, "c d_out"]:
        m = self.latents_per_layer
        found = [self._widened(block[latents[latents // m == i] - i * m]) for i, block in enumerate(self.decoders)]
        return torch.cat(found)

    @property
    def latents_per_layer(self) -> int:
        return self.d_sae // self.layers

    def _per_layer(self, x: Float[Tensor, "n d_in"]) -> list[Float[Tensor, "n d"]]:
        return [part.contiguous() for part in x.chunk(self.layers, 1)]

    def _weights_per_layer(self) -> list[tuple[Float[Tensor, "d m"], Float[Tensor, " m"]]]:
        m = self.latents_per_layer
        return [(rows.T, b) for rows, b in zip(self.W_enc.T.split(m), self.b_enc.split(m), strict=True)]

    def selected(self, centred: Float[Tensor, "n d_in"], spec: Spec, max_density: float = 1.0) -> Selection:
        """What a selection keeps of each layer; of `LargestOfBatch`, of all layers together."""
        inputs, weights = self._per_layer(centred), self._weights_per_layer()

        def select(specs: Sequence[Spec]) -> Selection:
            return _merged(
                [
                    kernels.encode_select(x, W, b, s, max_density=max_density)
                    for x, (W, b), s in zip(inputs, weights, specs, strict=True)
                ],
                self.latents_per_layer,
            )

        if isinstance(spec, Above) and isinstance(spec.bounds, Tensor) and spec.bounds.ndim:
            return select([Above(bounds) for bounds in spec.bounds.split(self.latents_per_layer)])
        if not isinstance(spec, LargestOfBatch):
            return select([spec] * self.layers)
        budget, found = spec.budget * self.layers, None
        if spec.hint is not None:
            found = select([Above(max(spec.hint, 0.0))] * self.layers)
        if found is None or len(found.values) < budget:
            # No layer can win more than all of it.
            found = select([LargestOfBatch(budget)] * self.layers)
        if len(found.values) <= budget:
            return found
        return largest_of_batch(found, budget)

    def strongest(self, centred: Float[Tensor, "n d_in"], latents: Int64[Tensor, " c"], k: int) -> Selection:
        """The `k` strongest of some latents for each token, shared evenly among the layers, at least 1 of each."""
        parts, each = [], max(1, k // self.layers)
        for i, (x, (W, b)) in enumerate(zip(self._per_layer(centred), self._weights_per_layer(), strict=True)):
            own = latents[latents // self.latents_per_layer == i] - i * self.latents_per_layer
            if len(own) == 0:
                empty = torch.zeros(len(x), dtype=torch.int64, device=x.device)
                parts.append(Selection(empty, own, x.new_empty(0)))
                continue
            spec = kernels.Largest(min(each, len(own)), magnitude=self.activation.signed)
            found = kernels.encode_select(x, W.T[own].T, b[own], spec)
            parts.append(found._replace(indices=own[found.indices]))
        return _merged(parts, self.latents_per_layer)

    def pre_activations(self, centred: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        layers = zip(self._per_layer(centred), self._weights_per_layer(), strict=True)
        return torch.cat([torch.addmm(b, x, W) for x, (W, b) in layers], 1)

    def encoded_at(self, x: Float[Tensor, "n d_in"], pre: Any) -> Any:
        none = self.b_enc.new_zeros(self.W_enc.shape[0])  # nothing is subtracted from the input
        if isinstance(pre, DenseCodes):
            parts = zip(
                self._per_layer(x), self._weights_per_layer(), pre.values.split(self.latents_per_layer, 1), strict=True
            )
            return DenseCodes(
                torch.cat([ops.encode_at(x, none, W, b, DenseCodes(values)).values for x, (W, b), values in parts], 1)
            )
        # One row for each token and layer; the entries stay in their order.
        m = self.latents_per_layer
        cut = pre.cut([m * (i + 1) for i in range(self.layers)])
        rows = x.reshape(len(x) * self.layers, self.W_enc.shape[0])
        return pre.with_values(ops.encode_at(rows, none, self.W_enc, self.b_enc, cut).values)

    def by_input(self, x: Tensor, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        of_layer = latents // self.latents_per_layer
        found = [(part, latents[of_layer == i]) for i, part in enumerate(self._per_layer(x))]
        return [(part, own) for part, own in found if len(own)]

    @torch.no_grad()
    def scale_encoder(self, scale: float | Float[Tensor, " d_in"]) -> None:
        if isinstance(scale, Tensor):
            self.W_enc.T.view(self.layers, self.latents_per_layer, -1).mul_(scale.view(self.layers, 1, -1))
        else:
            self.W_enc.mul_(scale)


def _merged(parts: Sequence[Selection], m: int) -> Selection:
    """Selections of the same rows in one: in each row the entries of the first layer, then those of the second."""
    counts = torch.stack([part.counts for part in parts], 1)
    starts = pad(counts.flatten().cumsum(0), (1, 0))[:-1].view_as(counts)
    n = sum(len(part.values) for part in parts)
    indices, values = parts[0].indices.new_empty(n), parts[0].values.new_empty(n)
    for i, (part, start) in enumerate(zip(parts, starts.unbind(1), strict=True)):
        own = pad(part.counts.cumsum(0), (1, 0))[:-1]
        moved = torch.repeat_interleave(start - own, part.counts, output_size=len(part.values))
        to = moved + torch.arange(len(part.values), device=moved.device)
        indices[to], values[to] = part.indices + i * m, part.values
    return Selection(counts.sum(1), indices, values)
