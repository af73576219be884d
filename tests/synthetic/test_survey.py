"""Surveys of worlds: counts are those of the samples, and samples are as requested."""

import json

import pytest
import torch

from unweave import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic import survey as module
from unweave.synthetic.hierarchy import HierarchyConfig
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.model_config import LowRankCorrelationConfig, SyntheticModelConfig
from unweave.synthetic.node import HierarchyNode, walk
from unweave.synthetic.probabilities import ConstantFiringProbabilityConfig, ZipfianFiringProbabilityConfig
from unweave.synthetic.survey import survey
from unweave.synthetic.tables import tabulate


def model(**settings):
    zipf = ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=0.05)
    defaults = {"firing_probability": zipf, "std_firing_magnitudes": 0.3, "seed": 0}
    return SyntheticModel(SyntheticModelConfig(30, 8, **defaults | settings))


CORRELATED = {"correlation": LowRankCorrelationConfig(rank=2, correlation_scale=0.3)}
HIERARCHICAL = {
    "hierarchy": HierarchyConfig(4, 3, 2, mutually_exclusive_portion=1.0),
    "firing_probability": ConstantFiringProbabilityConfig(0.5),
}


@pytest.mark.parametrize("settings", [{}, CORRELATED, HIERARCHICAL], ids=["independent", "correlated", "hierarchical"])
def test_counts_are_those_of_the_samples(settings, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 700)
    world = model(**settings)
    before = world.activation_generator.fork(9).sample(1)
    found = survey(world, 2000, seed=5)
    assert torch.equal(world.activation_generator.fork(9).sample(1), before)
    stream = world.activation_generator.fork(5)
    sample = torch.cat([stream.sample(n) for n in (700, 700, 600)])
    fires = (sample > 0).double()
    assert torch.equal(found.counts, (sample > 0).sum(0))
    assert found.l0_mean == pytest.approx(float(fires.sum(1).mean()))
    assert found.l0_std == pytest.approx(float(fires.sum(1).std(correction=0)))
    assert found.magnitude == pytest.approx(float(sample.double().sum() / fires.sum()))
    torch.testing.assert_close(found.correlations, torch.corrcoef(fires.T), atol=1e-9, rtol=0)


@pytest.mark.parametrize("settings", [{}, CORRELATED, HIERARCHICAL], ids=["independent", "correlated", "hierarchical"])
def test_samples_are_as_requested(settings):
    """z-bounds of 5: 6e-7 for each of 30 rates and of up to 435 correlations."""
    n = 40_000
    world = model(**settings)
    found = survey(world, n)
    assert (found.rate_deviations.abs() < 5).all()
    assert found.magnitude == pytest.approx(found.requested_magnitude, rel=0.01)
    if found.requested_correlations is not None:
        # The standard error of a correlation r of z and w is that of the mean of z w - r (z² + w²) / 2.
        fires = (world.activation_generator.fork(0).sample(n) > 0).double()
        z = (fires - fires.mean(0)) / fires.std(0, correction=0)
        r, both = found.correlations, z.square().T @ z.square() / n
        fourth, third = z.pow(4).mean(0), z.pow(3).T @ z / n
        variance = both + r.square() / 4 * (fourth + fourth[:, None] + 2 * both) - r * (third + third.T)
        variance = variance.clamp(min=0)  # 0 on the diagonal
        error = (found.correlations - found.requested_correlations).fill_diagonal_(0)
        assert (error.abs() < 5 * (variance / n).sqrt() + 1e-12).all()
    hierarchical = settings is HIERARCHICAL
    assert found.requested_correlations is None or not hierarchical
    assert (found.orphans, found.rivals) == ((0, 0) if hierarchical else (None, None))


def test_only_the_most_frequent_pairs_are_counted(monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 4)
    world = model(firing_probability=ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=0.01))
    found = survey(world, 500)
    assert found.pair_features.tolist() == [0, 1, 2, 3]
    assert found.together.shape == (4, 4)
    assert torch.equal(found.together.diagonal(), found.counts[:4])


def test_broken_rules_are_found():
    trees = [HierarchyNode(0, [HierarchyNode(i) for i in (1, 2, 3)], mutually_exclusive_children=True)]
    tables = tabulate(walk(trees))
    acts = torch.tensor([[1.0, 1, 0, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]])
    assert module._broken_rules(SparseCodes.from_dense(acts), tables) == (3, 3)


def test_correlations_with_a_hierarchy_are_not_exact():
    found = survey(model(**CORRELATED | HIERARCHICAL), 100)
    assert not found.exact
    assert found.requested_correlations is None
    assert survey(model(**HIERARCHICAL), 100).exact


def test_the_summary_is_json():
    for samples in (1, 1000):
        text = json.dumps(survey(model(**HIERARCHICAL), samples).summary(), allow_nan=False)
        assert json.loads(text)["samples"] == samples


def test_progress_and_bad_input():
    seen = []
    survey(model(), 10_000, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8192, 10_000), (10_000, 10_000)]
    with pytest.raises(UnweaveError, match=r"samples.*0"):
        survey(model(), 0)
