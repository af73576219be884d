"""What an activation function is: the base class of all, and the register by which names find them.

An activation function says which pre-activations a training step looks at, what their codes are, and what inference
keeps. Everything else about an SAE (products, gradients, files, folds, configuration) follows from a few attributes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import Spec
from unweave.sae.codes import Codes

if TYPE_CHECKING:
    from unweave.sae.sae import SAE

Threshold = Float[Tensor, "..."] | None

ACTIVATIONS: dict[str, type[Any]] = {}
"""Every activation function, by the name that configurations, the command line and files use."""


class Activation(ABC):
    """Base of all activation functions, which are frozen dataclasses made known by `register_activation`.

    A subclass needs `name` and `selection`; what it inherits is a function of one token alone whose codes are
    `relu(pre)` at the selected entries, in training and in inference.

    Attributes:
        name: Name in configurations, on the command line and in files.
        ranked: Latents are ranked against each other. Their decoder rows then need unit norm, and folding norms into
            the encoder is refused, because it would change which latents win.
        signed: Codes may be negative.
        free_norms: Decoder rows are trained without a constraint on their norms, unless a configuration says otherwise.
        scales: `apply(c * pre)` with thresholds times c is `c * apply(pre)` for c > 0, so that decoder norms fold.
        calibrated: The threshold is not learnt but estimated: training tracks the smallest code of each batch, and
            calibrates the threshold on held-out tokens at its end.
        widens: A larger k selects the same latents and more (Multi-TopK needs that).
        tied: It encodes with the decoder's rows; the SAE has no encoder weights of its own.
        default_sparsity: Name of the sparsity term that training adds if a configuration gives none; None for none.
    """

    name: ClassVar[str]
    ranked: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    free_norms: ClassVar[bool] = False
    scales: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    tied: ClassVar[bool] = False
    default_sparsity: ClassVar[str | None] = None

    @property
    def threshold_shape(self) -> Literal["scalar", "vector"] | None:
        """Whether the SAE keeps a float32 threshold: one for all latents, one for each, or none."""
        return None

    @property
    def initial_threshold(self) -> float:
        """Where thresholds start; NaN where they are calibrated."""
        return float("nan")

    @property
    def needs_unit_norm(self) -> bool:
        """Whether decoder norms that differ could not be folded: latents are ranked, or share a threshold."""
        return self.ranked or self.threshold_shape == "scalar"

    def check(self, d_sae: int) -> None:
        """Raise an UnweaveError if it does not go with this number of latents: by default, if it has a larger k."""
        k = getattr(self, "k", 1)
        if k > d_sae:
            raise UnweaveError(f"k={k} is larger than the number of latents, d_sae={d_sae}.")

    def parameters(self, d_sae: int) -> dict[str, Tensor]:
        """Initial values of what the SAE learns beside weights, biases and thresholds, under these names."""
        return {}

    @abstractmethod
    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        """The entries that a training step on `n_rows` tokens looks at."""

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        """The codes at the selected entries, with gradients."""
        return pre.with_values(pre.values.relu())

    def codes(self, pre: Codes, sae: SAE) -> Codes:
        """The codes at the entries of a training step; overridden where they take `parameters`."""
        return self.apply(pre, sae.threshold)

    def inference(self, threshold: Threshold) -> Spec:
        """The entries that inference keeps: a function of one token alone."""
        return self.selection(threshold, 1)

    def infer(self, pre: Codes, sae: SAE) -> Codes:
        """The codes at the entries that inference keeps."""
        return self.codes(pre, sae)

    def with_k(self, k: float) -> Activation:
        """The same with another k, for a schedule's step.

        Raises:
            UnweaveError: If it has no k.
        """
        raise UnweaveError(f"{type(self).__name__} has no k that could change.")

    def rescaled(self, factor: float) -> Activation:
        """The same for inputs and codes that are multiplied by a factor: settings in their units change with them."""
        return self

    @torch.no_grad()
    def scale_parameters(self, sae: SAE, factor: Float[Tensor, " d_sae"]) -> None:
        """Multiply those of the SAE's `parameters` that are in units of codes, in place, when codes take a factor.

        Raises:
            UnweaveError: If it has parameters and does not override this.
        """
        if self.parameters(sae.d_sae):
            raise UnweaveError(f"{type(self).__name__} does not say how its parameters scale, so norms are not folded.")

    @torch.no_grad()
    def shift_parameters(self, sae: SAE, shift: Float[Tensor, " d_sae"]) -> None:
        """Change the SAE's `parameters`, in place, such that codes stay as they are when `b_enc` falls by `shift` and
        pre-activations without the bias rise by it.

        Raises:
            UnweaveError: If it has parameters and does not override this.
        """
        if self.parameters(sae.d_sae):
            raise UnweaveError(f"{type(self).__name__} does not say how its parameters follow a shift of the input.")


AnyActivation = TypeVar("AnyActivation", bound=Activation)


def register_activation(cls: type[AnyActivation]) -> type[AnyActivation]:
    """Make an activation function known by its name, as a class decorator above `@dataclass(frozen=True)`.

    Raises:
        UnweaveError: If it has no name, another one has its name, or it is not a dataclass.
    """
    if not (isinstance(cls, type) and issubclass(cls, Activation) and "__dataclass_params__" in vars(cls)):
        raise UnweaveError(f"an activation function is a frozen dataclass derived from Activation, got {cls!r}.")
    name = getattr(cls, "name", "")
    if not name:
        raise UnweaveError(f"the activation function {cls.__name__} has no name.")
    known = ACTIVATIONS.get(name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise UnweaveError(f"there is an activation function {name!r} already: {known.__name__}.")
    ACTIVATIONS[name] = cls
    return cls


def describe(activation: Activation) -> dict[str, Any]:
    """An activation function as JSON values: its fields, and its name as `type`."""
    return {"type": activation.name} | dataclasses.asdict(activation)  # type: ignore[call-overload]
