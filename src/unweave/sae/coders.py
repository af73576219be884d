"""Relatives of the autoencoder that differ in what they read and what they write, and in nothing else.

    Transcoder   codes = activation(x @ W_enc + b_enc)           y_hat   = codes @ W_dec + b_dec [+ x @ W_skip.T]
    Crosscoder   codes = activation(sum_h x_h @ W_enc_h + b_enc)  x_hat_h = codes @ W_dec_h + b_dec_h

Both are SAEs whose activation functions, selection, sparse products, folds and training are those of `SAE`. A
crosscoder is an SAE on its hooks' activations side by side, which is how it takes and returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError, nearest
from unweave.sae import ops
from unweave.sae.activation import Activation
from unweave.sae.sae import SAE

HOOK_OUT = "hf_hook_name_out"
"""Key of the metadata that says where a coder's output belongs in the model."""


def side_by_side(
    activations: Mapping[str, Float[Tensor, "... d_h"]], names: Iterable[str], kind: str
) -> Float[Tensor, "... d"]:
    """Some of the activations, in the order of their names.

    Raises:
        UnweaveError: If one is missing, naming the kind of coder that reads it.
    """
    names = list(names)
    for name in names:
        if name not in activations:
            raise UnweaveError(f"this {kind} also reads {name!r}{nearest(name, list(activations))}")
    return torch.cat([activations[name] for name in names], -1)


class Transcoder(SAE):
    """Predicts one activation from another through sparse codes (Dunefsky et al., arXiv 2406.11944).

    Most often the output of an MLP from its input. A skip transcoder adds a learnt linear map of the raw input, so that
    latents need not spend themselves on it (Paulo et al., arXiv 2501.18823).

    Args:
        d_in: Width of what it reads.
        d_out: Width of what it predicts.
        d_sae: Number of latents.
        activation: As for `SAE`.
        skip: Whether there is a linear map beside the latents; it starts at 0.
        glu: As for `SAE`.
        metadata: As for `SAE`.
        generator: Source of the random initial encoder and decoder; the global one if None.

    Attributes:
        W_enc: `(d_in, d_sae)`.
        b_enc: `(d_sae,)`.
        W_dec: `(d_sae, d_out)`.
        b_dec: `(d_out,)`; never subtracted from the input.
        W_skip: `(d_out, d_in)`, or None.

    Raises:
        UnweaveError: If a width is not positive, or the activation function does not go with d_sae.
    """

    W_skip: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        activation: Activation,
        *,
        skip: bool = False,
        glu: bool = False,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if d_out < 1:
            raise UnweaveError(f"a transcoder needs d_out of at least 1, got d_out={d_out}.")
        super().__init__(
            d_in, d_sae, activation, apply_b_dec_to_input=False, glu=glu, metadata=metadata, generator=generator
        )
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(d_sae, d_out, generator=generator), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(d_out, d_in)) if skip else None)

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The decoder's bias and, with a skip, the linear map of `x`."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, x, self.W_skip.T)

    def extra_repr(self) -> str:
        skip = "" if self.W_skip is None else ", skip=True"
        return f"d_in={self.d_in}, d_out={self.d_out}, d_sae={self.d_sae}, activation={self.activation}{skip}"


class Crosscoder(SAE):
    """One code for several hooks: layers of a model, or the same layer of two models (Anthropic, October 2024).

    Inputs and outputs have the hooks' activations side by side, in the order of `widths`; `join` and `split` translate.
    A latent has one pre-activation, one threshold and one code for all hooks.

    Args:
        widths: Width of the activations at each hook, by name.
        d_sae: Number of latents.
        activation: As for `SAE`.
        metadata: As for `SAE`.
        generator: Source of the random initial decoder; the global one if None.

    Attributes:
        W_enc: `(d, d_sae)`, where d is the sum of the widths; `split` cuts it by hook.
        b_enc: `(d_sae,)`.
        W_dec: `(d_sae, d)`; its rows have unit norm over all hooks together unless trained otherwise.
        b_dec: `(d,)`; never subtracted from the input.

    Raises:
        UnweaveError: If there are fewer than two hooks, a width is not positive, or the activation function does not go
            with d_sae.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        d_sae: int,
        activation: Activation,
        *,
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(widths) < 2 or min(widths.values()) < 1:
            raise UnweaveError(f"a crosscoder needs two or more hooks of positive width, got {dict(widths)}.")
        super().__init__(
            sum(widths.values()), d_sae, activation, apply_b_dec_to_input=False, metadata=metadata, generator=generator
        )
        self.widths = dict(widths)
        rows = [nn.functional.normalize(part, dim=1) for part in self.split(self.W_dec.detach()).values()]
        self.W_dec.data.copy_(torch.cat(rows, 1) / len(widths) ** 0.5)  # every hook has the same share at the start
        self.W_enc.data.copy_(self.W_dec.T)

    def join(self, activations: Mapping[str, Float[Tensor, "... d_h"]]) -> Float[Tensor, "... d"]:
        """Activations by hook, side by side as this crosscoder takes them."""
        return side_by_side(activations, self.widths, "crosscoder")

    def split(self, x: Float[Tensor, "... d"]) -> dict[str, Float[Tensor, "... d_h"]]:
        """What lies side by side (activations, reconstructions, `W_dec`, `W_enc.T`, `b_dec`), by hook; views."""
        return dict(zip(self.widths, x.split(list(self.widths.values()), -1), strict=True))

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The sum over hooks of each latent's decoder norms, which is what the published L1 penalty weighs codes by."""
        return torch.stack([ops.row_norms(part) for part in self.split(self.W_dec).values()]).sum(0)

    def hook_norms(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """Each latent's decoder norm at each hook: where a latent lives, and which model of two has it."""
        return {name: part.detach().norm(dim=1) for name, part in self.split(self.W_dec).items()}

    def at(self, hook: str) -> Transcoder:
        """What this crosscoder predicts at one hook, as a transcoder from all hooks to it; it shares the weights.

        Raises:
            UnweaveError: If it has no such hook.
        """
        if hook not in self.widths:
            raise UnweaveError(f"this crosscoder has no hook {hook!r}{nearest(hook, list(self.widths))}")
        with torch.device("meta"):  # nothing is drawn or allocated: all weights are this crosscoder's
            part = Transcoder(
                self.d_in, self.widths[hook], self.d_sae, self.activation, metadata=self.metadata | {HOOK_OUT: hook}
            )
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in ("W_dec", "b_dec"):
            own[name] = nn.Parameter(self.split(own[name].detach())[hook], requires_grad=False)
        for name, tensor in own.items():
            setattr(part, name, tensor)
        return part

    def extra_repr(self) -> str:
        return f"widths={self.widths}, d_sae={self.d_sae}, activation={self.activation}"
