"""Feature dictionaries: the known directions that features have in a space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.sae.ops import decode
from unweave.synthetic.arguments import own_generator, require_count, require_number
from unweave.synthetic.directions import (
    bound_cosines,
    cosine_similarities,
    normalize_rows_,
    orthogonalize_embeddings,
    unit_rows,
)
from unweave.synthetic.forms import to_codes

__all__ = [
    "FeatureDictionary",
    "FeatureDictionaryInitializer",
    "bounded_cosine_initializer",
    "cosine_similarities",
    "orthogonal_initializer",
    "orthogonalize_embeddings",
]


FeatureDictionaryInitializer = Callable[["FeatureDictionary"], None]
"""What arranges the vectors of a new dictionary, in place."""


def orthogonal_initializer(
    num_steps: int = 200, lr: float = 0.01, show_progress: bool = False, chunk_size: int = 1024
) -> FeatureDictionaryInitializer:
    """An initializer that applies `orthogonalize_embeddings`, with the same arguments."""

    def initializer(dictionary: FeatureDictionary) -> None:
        dictionary.feature_vectors.data = orthogonalize_embeddings(
            dictionary.feature_vectors, num_steps, lr, show_progress, chunk_size
        )

    return initializer


def bounded_cosine_initializer(
    max_cosine: float, num_steps: int = 500, show_progress: bool = False, chunk_size: int = 1024
) -> FeatureDictionaryInitializer:
    """An initializer that applies `bound_cosines`, with the same arguments."""

    def initializer(dictionary: FeatureDictionary) -> None:
        dictionary.feature_vectors.data = bound_cosines(
            dictionary.feature_vectors, max_cosine, num_steps, show_progress, chunk_size
        )

    return initializer


_ORTHOGONAL = orthogonal_initializer()


class FeatureDictionary(nn.Module):
    """Known features: a unit vector for each, and a bias that is added to every sum of them.

    Attributes:
        feature_vectors: `(num_features, hidden_dim)`.
        bias: `(hidden_dim,)`; trainable only if one was asked for.
    """

    feature_vectors: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        hidden_dim: int,
        bias: bool | float = False,
        initializer: FeatureDictionaryInitializer | None = _ORTHOGONAL,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        """Draw random directions, uniform on the sphere, and let `initializer` arrange them.

        Args:
            num_features: Number of features, K.
            hidden_dim: Width of the space, d.
            bias: False for none, True for a random direction of norm 1, a number for one of that norm.
            initializer: What changes the vectors in place; orthogonalises them by default. None: leave them random.
            device: Where they are kept. They are drawn on the CPU, so that a seed gives the same ones everywhere.
            seed: Of the draws. None: from torch's global state.

        Raises:
            UnweaveError: If an argument is out of range.
        """
        super().__init__()
        self.num_features = require_count("num_features", num_features)
        self.hidden_dim = require_count("hidden_dim", hidden_dim)
        norm = float(bias) if isinstance(bias, bool) else require_number("bias", bias, least=0)
        generator = own_generator(seed)
        vectors = torch.randn(num_features, hidden_dim, generator=generator)
        self.feature_vectors = nn.Parameter(normalize_rows_(vectors).to(device))
        direction = torch.zeros(1, hidden_dim)
        if norm:
            direction = unit_rows(torch.randn(1, hidden_dim, generator=generator)) * norm
        self.bias = nn.Parameter(direction[0].to(device), requires_grad=norm != 0)
        if initializer is not None:
            initializer(self)

    @classmethod
    def from_vectors(
        cls, feature_vectors: Float[Tensor, "num_features hidden_dim"], bias: Float[Tensor, " hidden_dim"] | None = None
    ) -> FeatureDictionary:
        """A dictionary of given features, which may have any norm.

        Args:
            feature_vectors: `(num_features, hidden_dim)`; kept on its device and in its dtype, not copied.
            bias: `(hidden_dim,)`. None: zeros.

        Raises:
            UnweaveError: If a shape is wrong, or a number is not finite.
        """
        if feature_vectors.ndim != 2 or not feature_vectors.numel() or not feature_vectors.is_floating_point():
            raise UnweaveError(
                f"feature_vectors must be a real matrix with rows, got {feature_vectors.dtype} of shape "
                f"{tuple(feature_vectors.shape)}."
            )
        trainable = bias is not None and bool(bias.any())
        bias = feature_vectors.new_zeros(feature_vectors.shape[1]) if bias is None else bias.to(feature_vectors)
        if bias.shape != feature_vectors.shape[1:]:
            raise UnweaveError(f"bias must have the shape {tuple(feature_vectors.shape[1:])}, got {tuple(bias.shape)}.")
        for name, tensor in (("feature_vectors", feature_vectors), ("bias", bias)):
            if not tensor.isfinite().all():
                raise UnweaveError(f"{name} must be finite, and {int((~tensor.isfinite()).sum())} entries are not.")
        dictionary = cls.__new__(cls)
        nn.Module.__init__(dictionary)
        dictionary.num_features, dictionary.hidden_dim = feature_vectors.shape
        dictionary.feature_vectors = nn.Parameter(feature_vectors.detach())
        dictionary.bias = nn.Parameter(bias.detach(), requires_grad=trainable)
        return dictionary

    def forward(
        self, feature_activations: Float[Tensor, "*batch num_features"] | SparseCodes
    ) -> Float[Tensor, "*batch hidden_dim"]:
        """`feature_activations @ feature_vectors + bias`.

        Args:
            feature_activations: Dense, a COO tensor of two dimensions, or sparse codes; of the last two, only the
                features that fire cost anything.

        Raises:
            UnweaveError: If there is not one activation for each feature.
        """
        if not isinstance(feature_activations, SparseCodes):
            self._check_width(feature_activations.shape[-1] if feature_activations.ndim else 0)
            if feature_activations.layout == torch.strided:
                return feature_activations @ self.feature_vectors + self.bias
        codes = _as_codes(feature_activations)
        self._check_width(codes.d_sae)
        return decode(codes.to(self.feature_vectors), self.feature_vectors) + self.bias

    def _check_width(self, width: int) -> None:
        if width != self.num_features:
            raise UnweaveError(f"feature_activations has {width} features, and the dictionary {self.num_features}.")

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, hidden_dim={self.hidden_dim}"


def _as_codes(activations: Tensor | SparseCodes) -> SparseCodes:
    if isinstance(activations, SparseCodes):
        return activations
    if activations.layout != torch.sparse_coo or activations.ndim != 2 or activations.dense_dim():
        raise UnweaveError(
            "sparse feature_activations must be a COO tensor of two dimensions, got "
            f"{activations.layout} of {activations.ndim}."
        )
    return to_codes(activations)
