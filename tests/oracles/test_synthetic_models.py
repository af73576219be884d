"""SAELens' synthetic models load here and ours load there; activations of equal parameters have equal statistics.

Statistics of two samples are compared at fixed seeds by standardised differences, with Z = 5: 6e-7 for each comparison.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig
from unweave.synthetic.magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from unweave.synthetic.model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)
from unweave.synthetic.modifier import hierarchy_modifier
from unweave.synthetic.node import HierarchyNode
from unweave.synthetic.probabilities import (
    ConstantFiringProbabilityConfig,
    LinearFiringProbabilityConfig,
    RandomFiringProbabilityConfig,
)

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

Z = 5.0
K, D, N = 48, 16, 100_000


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    import sae_lens.synthetic

    return sae_lens.synthetic


def assert_equal_means(a: Tensor, b: Tensor) -> None:
    """The means over rows of two samples of the same law."""
    a, b = a.double(), b.double()
    spread = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt().clamp(min=1e-12)
    assert ((a.mean(0) - b.mean(0)).abs() / spread).max() < Z


def assert_equal_laws(a: Tensor, b: Tensor) -> None:
    """Rates, magnitudes where features fire, their squares, and how often each pair fires together."""
    assert_equal_means(a > 0, b > 0)
    assert_equal_means(a, b)
    assert_equal_means(a.square(), b.square())
    a, b = (a > 0).double(), (b > 0).double()
    both_a, both_b = a.T @ a / len(a), b.T @ b / len(b)
    p = (both_a + both_b) / 2
    spread = (p * (1 - p) * (1 / len(a) + 1 / len(b))).sqrt().clamp(min=1e-12)
    assert ((both_a - both_b).abs() / spread).max() < Z


def full_matrix() -> Tensor:
    factor = torch.linspace(-0.8, 0.8, K)[:, None] * torch.tensor([[1.0, 0.5]])
    return factor @ factor.T + (1 - factor.square().sum(1)).diag()


def low_rank() -> tuple[Tensor, Tensor]:
    factor = torch.linspace(-0.6, 0.6, K)[:, None] * torch.tensor([[1.0, 0.5]])
    return factor, 1 - factor.square().sum(1)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "coo"])
@pytest.mark.parametrize("correlation", [None, full_matrix(), low_rank()], ids=["independent", "full", "low-rank"])
def test_generators_with_the_same_parameters(theirs: ModuleType, correlation: Any, sparse: bool) -> None:
    # Their magnitudes may be cut off at 0 where ours are not (D-SY-6): here that is 5 standard deviations away.
    p, mean = torch.linspace(0.02, 0.7, K), torch.linspace(1, 3, K)
    arguments = (K, p, 0.2 * mean, mean, None, correlation, "cpu", "float32", sparse)
    torch.manual_seed(0)
    b = theirs.ActivationGenerator(*arguments).sample(N)
    a = ActivationGenerator(*arguments, seed=0).sample(N)  # type: ignore[arg-type]
    assert a.layout == b.layout
    assert_equal_laws(a.to_dense(), b.to_dense())


def trees(node: Any) -> list[Any]:
    leaves = [node(feature_index=i) for i in range(4, 10)]
    return [
        node(feature_index=0, children=leaves[:3], mutually_exclusive_children=True),
        node(feature_index=1, children=[node(feature_index=2, children=leaves[3:])], scale_children_by_parent=True),
    ]


def test_generators_with_a_hierarchy(theirs: ModuleType) -> None:
    p = torch.linspace(0.2, 0.7, 12)
    torch.manual_seed(0)
    b = theirs.ActivationGenerator(12, p, 0.2, 1.5, theirs.hierarchy_modifier(trees(theirs.HierarchyNode))).sample(N)
    a = ActivationGenerator(12, p, 0.2, 1.5, hierarchy_modifier(trees(HierarchyNode)), seed=0).sample(N)
    assert_equal_laws(a, b)


# Theirs and ours have the same names, so a config can be made of either.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unseeded": {"seed": None, "mean_firing_magnitudes": ("LinearMagnitudeConfig", {"start": 1.0, "end": 2.0})},
    "random": {
        "firing_probability": ("RandomFiringProbabilityConfig", {"max_prob": 0.4, "min_prob": 0.05}),
        "std_firing_magnitudes": ("FoldedNormalMagnitudeConfig", {"mean": 0.2, "std": 0.05}),
        "mean_firing_magnitudes": ("FoldedNormalMagnitudeConfig", {"mean": 3.0, "std": 0.2}),
        "orthogonalization": ("OrthogonalizationConfig", {"num_steps": 5}),
        "bias": False,
    },
    "correlated": {
        "firing_probability": ("LinearFiringProbabilityConfig", {"max_prob": 0.5, "min_prob": 0.02}),
        "correlation": ("LowRankCorrelationConfig", {"rank": 4, "correlation_scale": 0.2}),
        "bias": True,
    },
    "hierarchical": {
        "firing_probability": ("ConstantFiringProbabilityConfig", {"probability": 0.3}),
        "hierarchy": (
            "HierarchyConfig",
            {"total_root_nodes": 5, "branching_factor": (2, 4), "max_depth": 2, "mutually_exclusive_portion": 0.5},
        ),
    },
}
OURS = {
    c.__name__: c
    for c in (
        SyntheticModelConfig, RandomFiringProbabilityConfig, LinearFiringProbabilityConfig, LowRankCorrelationConfig,
        ConstantFiringProbabilityConfig, FoldedNormalMagnitudeConfig, LinearMagnitudeConfig, OrthogonalizationConfig,
        HierarchyConfig,
    )
}  # fmt: skip


def make(library: Any, name: str) -> Any:
    def build(value: Any) -> Any:
        return library(value[0])(**value[1]) if isinstance(value, tuple) else value

    options = {key: build(value) for key, value in CONFIGS[name].items()}
    return library("SyntheticModelConfig")(**({"num_features": K, "hidden_dim": D, "seed": 7} | options))


def assert_equal_models(ours: SyntheticModel, theirs: Any) -> None:
    assert torch.equal(ours.feature_dict.feature_vectors, theirs.feature_dict.feature_vectors)
    assert torch.equal(ours.feature_dict.bias, theirs.feature_dict.bias)
    a, b = ours.activation_generator, theirs.activation_generator
    assert torch.equal(a.firing_probabilities, b.firing_probabilities)
    assert (ours.hierarchy is None) == (theirs.hierarchy is None)
    if ours.hierarchy is not None:
        assert ours.hierarchy == Hierarchy.from_dict(theirs.hierarchy.to_dict())
    assert (ours.correlation_matrix is None) == (theirs.correlation_matrix is None)
    if ours.correlation_matrix is not None:
        for mine, other in zip(ours.correlation_matrix, theirs.correlation_matrix, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_theirs(theirs: ModuleType, tmp_path: Path, name: str) -> None:
    saved = theirs.SyntheticModel(make(lambda n: getattr(theirs, n), name))
    saved.save(tmp_path)
    loaded = SyntheticModel.load_from_disk(tmp_path)
    assert loaded.cfg == make(OURS.__getitem__, name)
    assert_equal_models(loaded, saved)
    a, b = loaded.activation_generator, saved.activation_generator
    torch.testing.assert_close(a.mean_firing_magnitudes, b.mean_firing_magnitudes)
    torch.testing.assert_close(a.std_firing_magnitudes, b.std_firing_magnitudes)
    torch.manual_seed(0)
    assert_equal_laws(loaded.fork(0).sample_with_features(N)[1], b.sample(N))


@pytest.mark.parametrize("name", CONFIGS)
def test_they_load_ours(theirs: ModuleType, tmp_path: Path, name: str) -> None:
    saved = SyntheticModel(make(OURS.__getitem__, name))
    loaded = theirs.SyntheticModel.load_from_disk(saved.save(tmp_path))
    assert_equal_models(saved, loaded)


@pytest.mark.parametrize("name", ["plain", "random", "correlated"])
def test_equal_configs_and_seeds_give_equal_probabilities(theirs: ModuleType, name: str) -> None:
    ours, other = (
        SyntheticModel(make(OURS.__getitem__, name)),
        theirs.SyntheticModel(make(lambda n: getattr(theirs, n), name)),
    )
    a, b = ours.activation_generator, other.activation_generator
    for of in ("firing_probabilities", "mean_firing_magnitudes", "std_firing_magnitudes"):
        torch.testing.assert_close(getattr(a, of), getattr(b, of), rtol=1e-6, atol=1e-7)
    if name == "correlated":
        torch.testing.assert_close(ours.correlation_matrix[0], other.correlation_matrix[0], rtol=1e-6, atol=1e-7)
