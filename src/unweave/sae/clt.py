"""The cross-layer transcoder: every layer has codes of its own, and they write to that layer and all later ones.

    codes_l = activation(x_l @ W_enc_l + b_enc_l)
    y_hat_l = sum over i <= l of codes_i @ W_dec_{i->l} + b_dec_l [+ x_l @ W_skip_l]

It is an SAE whose latents come layer after layer: those of layer l are `l * M` to `(l + 1) * M`. Each layer is encoded
by itself, with the SAE's own selection; everything behind the encoder is the SAE's on all codes together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad

from unweave import kernels
from unweave._errors import UnweaveError, nearest
from unweave.kernels import Above, LargestOfBatch, Selection, Spec
from unweave.kernels.select import largest_of_batch
from unweave.sae import ops
from unweave.sae.activation import Activation
from unweave.sae.coders import HOOK_OUT, Crosscoder, Transcoder, side_by_side
from unweave.sae.codes import DenseCodes
from unweave.sae.sae import SAE


class LayeredEncoder(SAE):
    """An SAE whose inputs are several layers side by side, each with an encoder and an equal number of latents.

    TopK, AbsTopK and GroupMax select by token and layer, so that k is a layer's; BatchTopK selects among all layers of
    the batch, k for each on average, and has one threshold.

    Attributes:
        layers: Number of layers.
        W_enc: `(d, d_sae)`, where d is the width of one layer; layer l has the columns of its latents.
    """

    layers: int

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
        return largest_of_batch(found, budget, found.values.topk(budget, sorted=False).values.amin())

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


class CrossLayerTranscoder(LayeredEncoder):
    """Predicts the outputs of several layers from their inputs; a layer's codes write to all later outputs, too.

    From "Circuit Tracing" (Ameisen et al., 2025). Inputs and outputs lie side by side, in the order of `reads` and of
    `writes`; `join` and `split` translate. All layers' inputs have one width.

    Args:
        reads: Width of the input of each layer, by name, from the first layer to the last.
        writes: Width of the output of each layer, by name, in the same order.
        latents_per_layer: Number of latents of each layer.
        activation: As for `SAE`; its k is a layer's.
        skip: Whether each layer has a linear map from its input to its output beside the latents; it starts at 0.
        metadata: As for `SAE`.
        generator: Source of the random initial encoder and decoder; the global one if None.

    Attributes:
        d_sae: Number of latents of all layers together.
        W_enc: `(d, d_sae)`, where d is the width of one input; `b_enc`, thresholds and the rows of `W_dec` alike have
            the latents layer after layer.
        W_dec: `(d_sae, d_out)`, where d_out is the sum of the outputs' widths; 0 where a layer would write to an
            earlier one, which costs at most as much memory again as the decoders, and files leave out.
        b_dec: `(d_out,)`; never subtracted from the input.
        W_skip: `(layers, d, d_l)`, where all outputs have the width d_l; or None.

    Raises:
        UnweaveError: If there are fewer than two layers, not one output for each input, inputs of different widths (or
            outputs, if there is a skip), a width that is not positive, or the activation function does not go with the
            number of latents of a layer.
    """

    W_skip: Tensor | None

    def __init__(
        self,
        reads: Mapping[str, int],
        writes: Mapping[str, int],
        latents_per_layer: int,
        activation: Activation,
        *,
        skip: bool = False,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        layers, widths = len(reads), sorted(set(reads.values()))
        if layers < 2 or len(writes) != layers:
            raise UnweaveError(
                f"a cross-layer transcoder needs two or more layers with an input and an output each, got {layers} "
                f"inputs and {len(writes)} outputs."
            )
        if len(widths) > 1:
            raise UnweaveError(f"the inputs of a cross-layer transcoder have one width, got {widths}.")
        if min(writes.values()) < 1:
            raise UnweaveError(f"a cross-layer transcoder needs outputs of positive width, got {dict(writes)}.")
        if skip and len(set(writes.values())) > 1:
            raise UnweaveError(f"the outputs of a transcoder with a skip have one width, got {dict(writes)}.")
        if latents_per_layer < 1:
            raise UnweaveError(f"a layer needs at least one latent, got {latents_per_layer}.")
        activation.check(latents_per_layer)
        super().__init__(
            widths[0], layers * latents_per_layer, activation, apply_b_dec_to_input=False, metadata=metadata,
            generator=generator,
        )  # fmt: skip
        self.layers, self.d_in = layers, layers * widths[0]
        self.reads, self.writes = dict(reads), dict(writes)
        W_dec = torch.randn(self.d_sae, sum(writes.values()), generator=generator)
        self._clear(W_dec)
        self.W_dec = nn.Parameter(nn.functional.normalize(W_dec, dim=1))
        self.b_dec = nn.Parameter(torch.zeros(W_dec.shape[1]))
        maps = torch.zeros(layers, widths[0], max(writes.values())) if skip else None
        self.register_parameter("W_skip", None if maps is None else nn.Parameter(maps))

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The decoder's bias and, with a skip, the linear map of each layer's input."""
        if self.W_skip is None:
            return self.b_dec
        mapped = zip(self._per_layer(x), self.W_skip, strict=True)
        return self.b_dec + torch.cat([part @ S for part, S in mapped], 1)

    def _clear(self, decoder: Float[Tensor, "d_sae d_out"]) -> None:
        """Set to 0, in place, what would write to earlier layers."""
        for i, part in enumerate(self.split(decoder).values(), start=1):
            part[i * self.latents_per_layer :].zero_()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """No gradient for what would write to earlier layers, which therefore stays 0."""
        if self.W_dec.grad is not None:
            self._clear(self.W_dec.grad)

    def join(self, activations: Mapping[str, Float[Tensor, "... d"]]) -> Float[Tensor, "... d_in"]:
        """Inputs by name, side by side as this transcoder takes them."""
        return side_by_side(activations, self.reads, "cross-layer transcoder")

    def split(self, y: Float[Tensor, "... d_out"]) -> dict[str, Float[Tensor, "... d_l"]]:
        """What lies side by side (predictions, targets, `W_dec`, `b_dec`), by output; views."""
        return dict(zip(self.writes, y.split(list(self.writes.values()), -1), strict=True))

    def decoder(self, source: int, target: str) -> Float[Tensor, "m d_l"]:
        """What the latents of a layer write to an output: `W_dec_{source->target}`, a view.

        Args:
            source: The layer, from 0.
            target: The output's name, of this layer or a later one.

        Raises:
            UnweaveError: If there is no such layer or output, or the output is an earlier layer's.
        """
        target_layer = self._layer_of(target)
        if not 0 <= source <= target_layer:
            raise UnweaveError(f"the codes of layer {source} do not write to {target!r}, the output of {target_layer}.")
        m = self.latents_per_layer
        return self.split(self.W_dec)[target][source * m : (source + 1) * m]

    def _layer_of(self, target: str) -> int:
        if target not in self.writes:
            raise UnweaveError(f"this transcoder does not write to {target!r}{nearest(target, list(self.writes))}")
        return list(self.writes).index(target)

    def at(self, target: str) -> CrossLayerPart:
        """What this transcoder predicts at one output, from the inputs up to its layer; it shares the weights.

        Raises:
            UnweaveError: If it has no such output.
        """
        layers = self._layer_of(target) + 1
        n, reads = layers * self.latents_per_layer, list(self.reads)[:layers]
        metadata = {name: value for name, value in self.metadata.items() if name != "hf_hook_names_out"}
        for name in metadata.keys() & {"hook_names", "hook_names_out"}:
            metadata[name] = metadata[name][:layers]
        if "hook_names_out" in metadata:
            metadata["hook_name_out"] = metadata.pop("hook_names_out")[-1]
        metadata |= {"hf_hook_names": reads, HOOK_OUT: target}
        d, skip = self.d_in // self.layers, self.W_skip is not None
        with torch.device("meta"):  # nothing is drawn or allocated: all weights are this transcoder's
            part = CrossLayerPart(layers, d, self.writes[target], n, self.activation, skip, metadata)
        for name, tensor in (dict(self.named_parameters()) | dict(self.named_buffers())).items():
            tensor = tensor.detach()
            match name:
                case "W_enc":
                    view = tensor[:, :n]
                case "W_dec":
                    view = self.split(tensor)[target][:n]
                case "W_skip":
                    view = tensor[layers - 1].T
                case "b_dec":
                    view = self.split(tensor)[target]
                case _:
                    view = tensor[:n] if tensor.ndim else tensor
            is_parameter = isinstance(getattr(part, name), nn.Parameter)
            setattr(part, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
        return part

    def extra_repr(self) -> str:
        return (
            f"reads={self.reads}, writes={self.writes}, latents_per_layer={self.latents_per_layer}, "
            f"activation={self.activation}"
        )


class CrossLayerPart(LayeredEncoder, Transcoder):
    """What a cross-layer transcoder predicts at one output; made by `CrossLayerTranscoder.at`, and not saved."""

    def __init__(
        self, layers: int, d: int, d_out: int, d_sae: int, activation: Activation, skip: bool, metadata: dict[str, Any]
    ) -> None:
        Transcoder.__init__(self, d, d_out, d_sae, activation, skip=skip, metadata=metadata)
        self.layers, self.d_in = layers, layers * d

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The decoder's bias and, with a skip, the linear map of the last layer's input."""
        return super().constant(x[:, -self.W_enc.shape[0] :])


def by_target(coder: SAE) -> dict[str, SAE]:
    """A coder as the parts that predict at one hook each, by the hook's name; "" where it predicts at one anyway."""
    if isinstance(coder, CrossLayerTranscoder):
        return {hook: coder.at(hook) for hook in coder.writes}
    return {hook: coder.at(hook) for hook in coder.widths} if isinstance(coder, Crosscoder) else {"": coder}
