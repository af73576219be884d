"""The cross-layer transcoder: every layer has codes of its own, and they write to that layer and all later ones.

    codes_l = activation(x_l @ W_enc_l + b_enc_l)
    y_hat_l = sum over i <= l of codes_i @ W_dec_{i->l} + b_dec_l [+ x_l @ W_skip_l]

It is an SAE whose latents come layer after layer: those of layer l are `l * M` to `(l + 1) * M`. Each layer is encoded
by itself, with the SAE's own selection; everything behind the encoder is the SAE's on all codes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError, nearest
from unweave.sae.activation import Activation
from unweave.sae.coders import HOOK_OUT, Crosscoder, Transcoder, side_by_side
from unweave.sae.layered import Layered
from unweave.sae.sae import SAE


class CrossLayerTranscoder(Layered):
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
        decoders: What is held, and trained: for each layer `(latents_per_layer, ...)`, what its latents write to its
            own output and all later ones, side by side. `decoder` gives one output's.
        W_dec: `(d_sae, d_out)`, where d_out is the sum of the outputs' widths; 0 where a layer would write to an
            earlier one. Made from `decoders` whenever it is asked for, with gradients: a copy of up to twice their
            size, which it is no use to change.
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
        drawn = (torch.randn(latents_per_layer, width, generator=generator) for width in self._widths())
        self._hold([nn.Parameter(nn.functional.normalize(block, dim=1)) for block in drawn])
        self.b_dec = nn.Parameter(torch.zeros(sum(writes.values())))
        maps = torch.zeros(layers, widths[0], max(writes.values())) if skip else None
        self.register_parameter("W_skip", None if maps is None else nn.Parameter(maps))

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The decoder's bias and, with a skip, the linear map of each layer's input."""
        if self.W_skip is None:
            return self.b_dec
        mapped = zip(self._per_layer(x), self.W_skip, strict=True)
        return self.b_dec + torch.cat([part @ S for part, S in mapped], 1)

    def _widths(self) -> list[int]:
        """Width of what each layer's latents write."""
        return list(accumulate(reversed(self.writes.values())))[::-1]

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
        widths = list(self.writes.values())[source:]
        return self.decoders[source].split(widths, 1)[target_layer - source]

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
        views = [self.decoder(i, target).detach() for i in range(layers)]
        part._hold([nn.Parameter(view, requires_grad=False) for view in views])
        for name, tensor in (dict(self._parameters) | dict(self._buffers)).items():
            if tensor is None:
                continue
            tensor = tensor.detach()
            match name:
                case "W_enc":
                    view = tensor[:, :n]
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


class CrossLayerPart(Layered, Transcoder):
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
