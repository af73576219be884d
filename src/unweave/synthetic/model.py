"""Synthetic models: a feature dictionary and the activations of its features, from one config and one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave._late import late
from unweave.sae.codes import SparseCodes
from unweave.synthetic.arguments import to_dtype
from unweave.synthetic.correlation import LowRankCorrelationMatrix, generate_random_low_rank_correlation_matrix
from unweave.synthetic.dictionary import FeatureDictionary, orthogonal_initializer
from unweave.synthetic.files import MODEL_FILES, read_model, write_model
from unweave.synthetic.forms import to_coo, to_dense
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy, generate_hierarchy
from unweave.synthetic.magnitudes import generate_magnitudes
from unweave.synthetic.model_config import (
    CORRELATION_SEED,
    HIERARCHY_SEED,
    MAGNITUDE_SEEDS,
    STREAM_SEED,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
)

__all__ = ["LowRankCorrelationConfig", "OrthogonalizationConfig", "SyntheticModel", "SyntheticModelConfig"]


class SyntheticModel(nn.Module):
    """Hidden activations with a known explanation: `x = sum of f_j v_j + bias` over the features j that fire.

    Args:
        cfg: What defines it, or the folder of a saved model.
        feature_dict: Features to use in place of drawn ones.
        activation_generator: Activations in place of those that the config asks for; used as it is, on its device.
        hierarchy: A hierarchy in place of a generated one. If the config's `hierarchy` asks for it, probabilities are
            compensated for it.
        correlation_matrix: Correlations in place of generated ones, full or low-rank.
        device: Where hidden activations and features are.

    Attributes:
        cfg: The config.
        feature_dict: The features, `(num_features, hidden_dim)`, and the bias.
        activation_generator: Where the activations come from.
        hierarchy: The trees, or None.

    Raises:
        UnweaveError: If parts do not fit each other, or there is no model in the folder.
    """

    feature_dict: FeatureDictionary
    activation_generator: ActivationGenerator

    def __init__(
        self,
        cfg: SyntheticModelConfig | str | Path,
        feature_dict: FeatureDictionary | None = None,
        activation_generator: ActivationGenerator | None = None,
        hierarchy: Hierarchy | None = None,
        correlation_matrix: LowRankCorrelationMatrix | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if not isinstance(cfg, SyntheticModelConfig):
            given = {"feature_dict": feature_dict, "activation_generator": activation_generator,
                     "hierarchy": hierarchy, "correlation_matrix": correlation_matrix}  # fmt: skip
            for name, part in given.items():
                if part is not None:
                    raise UnweaveError(f"a model that is loaded, as from {str(cfg)!r}, takes no {name}.")
            cfg, feature_dict, activation_generator, hierarchy = read_model(cfg)
            feature_dict, activation_generator = feature_dict.to(device), activation_generator.to(device)
        self.cfg = cfg
        if hierarchy is None and activation_generator is None and cfg.hierarchy is not None:
            hierarchy = generate_hierarchy(cfg.num_features, cfg.hierarchy, cfg.seed_of(HIERARCHY_SEED))
        self.hierarchy = hierarchy
        self.feature_dict = self._features(device) if feature_dict is None else feature_dict
        if activation_generator is None:
            activation_generator = self._generator(correlation_matrix, device)
        elif correlation_matrix is not None:
            raise UnweaveError("an activation_generator has its own correlations: leave correlation_matrix out.")
        self.activation_generator = activation_generator
        sizes = (self.feature_dict.num_features, activation_generator.num_features, self.feature_dict.hidden_dim)
        if sizes != (cfg.num_features, cfg.num_features, cfg.hidden_dim):
            raise UnweaveError(
                f"feature_dict and activation_generator have {sizes[0]} and {sizes[1]} features in {sizes[2]} "
                f"dimensions, and the config says {cfg.num_features} in {cfg.hidden_dim}."
            )

    def _features(self, device: torch.device | str) -> FeatureDictionary:
        how = self.cfg.orthogonalization
        initializer = None if how is None else orthogonal_initializer(how.num_steps, how.lr, chunk_size=how.chunk_size)
        features = FeatureDictionary(
            self.cfg.num_features, self.cfg.hidden_dim, self.cfg.bias, initializer, device, self.cfg.seed_of(0)
        )
        return features.to(to_dtype(self.cfg.dtype))

    def _generator(
        self, correlation: LowRankCorrelationMatrix | Tensor | None, device: torch.device | str
    ) -> ActivationGenerator:
        cfg, k = self.cfg, self.cfg.num_features
        probabilities = cfg.firing_probability.generate(k, cfg.seed_of(0))
        if self.hierarchy is not None and cfg.hierarchy is not None and cfg.hierarchy.compensate_probabilities:
            probabilities = self.hierarchy.compensate(probabilities).firing_probabilities
        how = cfg.correlation
        if correlation is None and how is not None:
            seed = cfg.seed_of(CORRELATION_SEED) if how.seed is None else how.seed
            correlation = generate_random_low_rank_correlation_matrix(k, how.rank, how.correlation_scale, seed)
        std, mean = (
            generate_magnitudes(k, getattr(cfg, name), cfg.seed_of(offset)) for name, offset in MAGNITUDE_SEEDS.items()
        )
        return ActivationGenerator(
            k,
            probabilities,
            std,
            mean,
            None if self.hierarchy is None else self.hierarchy.modifier,
            correlation,
            device,
            cfg.dtype,
            seed=cfg.seed_of(STREAM_SEED),
        )

    @property
    def device(self) -> torch.device:
        """Where hidden activations and features are."""
        return self.feature_dict.feature_vectors.device

    @property
    def correlation_matrix(self) -> LowRankCorrelationMatrix | Tensor | None:
        """The correlations behind the firing, low-rank or full; None if features fire independently."""
        low_rank = self.activation_generator.low_rank_correlation
        return self.activation_generator.correlation_matrix if low_rank is None else low_rank

    @property
    def use_sparse_tensors(self) -> bool:
        """Whether `sample_with_features` returns the activations as a COO tensor."""
        return self.activation_generator.use_sparse_tensors

    @use_sparse_tensors.setter
    def use_sparse_tensors(self, value: bool) -> None:
        self.activation_generator.use_sparse_tensors = value

    @torch.no_grad()
    def sample(self, batch_size: int) -> Float[Tensor, "batch_size hidden_dim"]:
        """The next hidden activations."""
        return self.sample_with_codes(batch_size)[0]

    def forward(self, batch_size: int) -> Float[Tensor, "batch_size hidden_dim"]:
        """`sample`."""
        return self.sample(batch_size)

    @torch.no_grad()
    def sample_with_features(
        self, batch_size: int
    ) -> tuple[Float[Tensor, "batch_size hidden_dim"], Float[Tensor, "batch_size num_features"]]:
        """The next hidden activations and the features' activations, dense, or COO with `use_sparse_tensors`."""
        hidden, codes = self.sample_with_codes(batch_size)
        return hidden, to_coo(codes) if self.use_sparse_tensors else to_dense(codes)

    @torch.no_grad()
    def sample_with_codes(self, batch_size: int) -> tuple[Float[Tensor, "batch_size hidden_dim"], SparseCodes]:
        """The next hidden activations and the features' activations as sparse codes; never a tensor of all features."""
        codes = self.activation_generator.sample_codes(batch_size)
        return self.feature_dict(codes), codes

    def fork(self, seed: int | None = None) -> Self:
        """The same parameters with a stream of its own, at its start; see `ActivationGenerator.fork`."""
        return type(self)(self.cfg, self.feature_dict, self.activation_generator.fork(seed), self.hierarchy)

    def save(self, path: str | Path) -> Path:
        """Write everything that the model is to a folder (made if missing), and return the folder; see `files`.

        Raises:
            UnweaveError: If it has modifiers other than its hierarchy, which no file can hold.
        """
        return write_model(self, path)

    @classmethod
    def load_from_disk(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """A saved model, ours or SAELens', its stream at the start.

        Raises:
            UnweaveError: If there is none, or a file is damaged or contradicts another.
        """
        return cls(path, device=device)

    @classmethod
    def load_from_source(cls, source: SyntheticModelConfig | str | Path, device: torch.device | str = "cpu") -> Self:
        """A model made from a config, or a saved one from its folder; errors as in `load_from_disk`."""
        return cls(source, device=device)

    @classmethod
    def from_pretrained(
        cls, repo_id: str | Path, model_path: str | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """A saved model from a local folder, or from a repository on the Hub.

        Args:
            repo_id: The folder; or where there is none of this name, the repository (OWNER/NAME).
            model_path: A folder below it.
            device: Where features and hidden activations are.

        Raises:
            UnweaveError: As in `load_from_disk`, or the repository cannot be read.
        """
        folder = Path(repo_id)
        if isinstance(repo_id, str) and repo_id.count("/") == 1 and not folder.exists():
            return cls(late("pull")(repo_id, model_path or "", only=MODEL_FILES), device=device)
        return cls(folder / (model_path or ""), device=device)
