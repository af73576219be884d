"""Worlds whose features are known: data to train on, and the truth to judge what was recovered.

    a dictionary of directions  +  which features fire, and how strongly  =  activations  ->  the ordinary trainer
    -> an SAE  ->  its latents compared with the true features

Every draw comes from a generator of its own, so that a seed gives the same stream whatever else runs. Activations of
features are sparse throughout: a world of a million features costs what fires.
"""

from unweave.synthetic.absorption import HierarchyCalculator, HierarchyScores
from unweave.synthetic.classification import (
    ClassificationMetrics,
    ClassificationMetricsCalculator,
    compute_classification_metrics,
)
from unweave.synthetic.coefficients import CoefficientCalculator
from unweave.synthetic.correlation import (
    CorrelationMatrixStats,
    LowRankCorrelationMatrix,
    compute_correlation_matrix_stats,
    compute_low_rank_correlation_matrix_stats,
    create_correlation_matrix_from_correlations,
    generate_random_correlation_matrix,
    generate_random_correlations,
    generate_random_low_rank_correlation_matrix,
    repair_correlation_matrix,
)
from unweave.synthetic.counters import DeadLatentsCalculator, L0Calculator, ShrinkageCalculator
from unweave.synthetic.dictionary import (
    FeatureDictionary,
    FeatureDictionaryInitializer,
    bounded_cosine_initializer,
    orthogonal_initializer,
)
from unweave.synthetic.directions import cosine_similarities, orthogonalize_embeddings
from unweave.synthetic.files import (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
)
from unweave.synthetic.generator import (
    ActivationGenerator,
    ActivationsModifier,
    ActivationsModifierInput,
    CorrelationMatrixInput,
)
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig, generate_hierarchy
from unweave.synthetic.initialization import init_sae_to_match_feature_dict
from unweave.synthetic.magnitudes import (
    ConstantMagnitudeConfig,
    ExponentialMagnitudeConfig,
    FoldedNormalMagnitudeConfig,
    LinearMagnitudeConfig,
    MagnitudeConfig,
    generate_magnitudes,
    get_magnitude_class,
    register_magnitude,
)
from unweave.synthetic.matching import feature_uniqueness, mean_correlation_coefficient
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.model_config import LowRankCorrelationConfig, OrthogonalizationConfig, SyntheticModelConfig
from unweave.synthetic.modifier import HierarchyModifier, hierarchy_modifier
from unweave.synthetic.node import HierarchyNode
from unweave.synthetic.ordering import (
    find_best_feature_ordering,
    find_best_feature_ordering_across_saes,
    find_best_feature_ordering_from_sae,
)
from unweave.synthetic.plots import plot_recovery, plot_sae_feature_similarity, plot_similarity_across_saes
from unweave.synthetic.probabilities import (
    ConstantFiringProbabilityConfig,
    FiringProbabilityConfig,
    LinearFiringProbabilityConfig,
    RandomFiringProbabilityConfig,
    ZipfianFiringProbabilityConfig,
    get_firing_probability_class,
    linear_firing_probabilities,
    random_firing_probabilities,
    register_firing_probability,
    zipfian_firing_probabilities,
)
from unweave.synthetic.runner import RUNNER_CONFIG_FILENAME, SyntheticSAERunner, SyntheticSAERunnerResult
from unweave.synthetic.runner_config import SyntheticSAERunnerConfig
from unweave.synthetic.scores import SyntheticDataEvalResult, eval_sae_on_synthetic_data
from unweave.synthetic.superposition import SuperpositionStats, compute_superposition_stats
from unweave.synthetic.training import SyntheticActivationIterator, train_toy_sae
from unweave.synthetic.world_plots import plot_firing_correlations, plot_firing_rates, plot_superposition
from unweave.synthetic.worlds import World, load_world, world_names

__all__ = [
    "RUNNER_CONFIG_FILENAME", "SYNTHETIC_MODEL_CONFIG_FILENAME", "SYNTHETIC_MODEL_HIERARCHY_FILENAME",
    "SYNTHETIC_MODEL_WEIGHTS_FILENAME", "ActivationGenerator", "ActivationsModifier", "ActivationsModifierInput",
    "ClassificationMetrics", "ClassificationMetricsCalculator", "CoefficientCalculator",
    "ConstantFiringProbabilityConfig", "ConstantMagnitudeConfig", "CorrelationMatrixInput", "CorrelationMatrixStats",
    "DeadLatentsCalculator", "ExponentialMagnitudeConfig", "FeatureDictionary", "FeatureDictionaryInitializer",
    "FiringProbabilityConfig", "FoldedNormalMagnitudeConfig", "Hierarchy", "HierarchyCalculator", "HierarchyConfig",
    "HierarchyModifier", "HierarchyNode", "HierarchyScores", "L0Calculator", "LinearFiringProbabilityConfig",
    "LinearMagnitudeConfig", "LowRankCorrelationConfig", "LowRankCorrelationMatrix", "MagnitudeConfig",
    "OrthogonalizationConfig", "RandomFiringProbabilityConfig", "ShrinkageCalculator", "SuperpositionStats",
    "SyntheticActivationIterator", "SyntheticDataEvalResult", "SyntheticModel", "SyntheticModelConfig",
    "SyntheticSAERunner", "SyntheticSAERunnerConfig", "SyntheticSAERunnerResult", "World",
    "ZipfianFiringProbabilityConfig", "bounded_cosine_initializer", "compute_classification_metrics",
    "compute_correlation_matrix_stats", "compute_low_rank_correlation_matrix_stats", "compute_superposition_stats",
    "cosine_similarities", "create_correlation_matrix_from_correlations", "eval_sae_on_synthetic_data",
    "feature_uniqueness", "find_best_feature_ordering", "find_best_feature_ordering_across_saes",
    "find_best_feature_ordering_from_sae", "generate_hierarchy", "generate_magnitudes",
    "generate_random_correlation_matrix", "generate_random_correlations",
    "generate_random_low_rank_correlation_matrix", "get_firing_probability_class", "get_magnitude_class",
    "hierarchy_modifier", "init_sae_to_match_feature_dict", "linear_firing_probabilities", "load_world",
    "mean_correlation_coefficient", "orthogonal_initializer", "orthogonalize_embeddings", "plot_firing_correlations",
    "plot_firing_rates", "plot_recovery", "plot_sae_feature_similarity", "plot_similarity_across_saes",
    "plot_superposition", "random_firing_probabilities", "register_firing_probability", "register_magnitude",
    "repair_correlation_matrix", "train_toy_sae", "world_names", "zipfian_firing_probabilities",
]  # fmt: skip
