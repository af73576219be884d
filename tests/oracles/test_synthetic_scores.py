"""On equal inputs our scores are those of sae-lens, wherever the definitions agree."""

from __future__ import annotations

import tempfile
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.sae import SAE, JumpReLU, ReLU, SparseCodes, TopK
from unweave.synthetic import classification, counters, matching
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.initialization import init_sae_to_match_feature_dict
from unweave.synthetic.scores import eval_sae_on_synthetic_data

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D, F = 24, 40
N_LATENTS = (16, 40, 64)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    import sae_lens.synthetic.evals

    return sae_lens.synthetic.evals


def sparse(n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, width, generator=generator)
    return values * (torch.rand(n, width, generator=generator) < 0.1)


def vectors(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("m", N_LATENTS)
def test_matching(theirs: ModuleType, m: int) -> None:
    a, b = vectors(m, 0), vectors(F, 1)
    assert matching.mean_correlation_coefficient(a, b) == pytest.approx(
        theirs.mean_correlation_coefficient(a, b), abs=1e-6
    )
    assert matching.feature_uniqueness(a, b) == pytest.approx(theirs.feature_uniqueness(a, b), abs=1e-9)


@pytest.mark.parametrize("m", N_LATENTS)
def test_classification(theirs: ModuleType, m: int) -> None:
    codes, truth, decoder, features = sparse(500, m, 0), sparse(500, F, 1), vectors(m, 2), vectors(F, 3)
    codes[:, :3] = 0  # dead latents
    truth[:, 5] = 0  # a feature that never fires
    expected = vars(theirs.compute_classification_metrics(codes, truth, decoder, features))
    found = classification.compute_classification_metrics(
        SparseCodes.from_dense(codes), SparseCodes.from_dense(truth), decoder, features
    )
    assert vars(found) == pytest.approx(expected, abs=1e-6)


def test_counters(theirs: ModuleType) -> None:
    codes, x, x_hat = sparse(300, 64, 0), sparse(300, D, 1), sparse(300, D, 2)
    codes[:, :7] = 0
    x[:20] = 0
    pairs: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (counters.L0Calculator(), theirs.L0Calculator(), (codes,)),
        (counters.DeadLatentsCalculator(64), theirs.DeadLatentsCalculator(64), (codes,)),
        (counters.ShrinkageCalculator(), theirs.ShrinkageCalculator(), (x_hat, x)),
    ]
    for ours, other, tensors in pairs:
        for part in (slice(0, 100), slice(100, None)):
            for calculator in (ours, other):
                calculator.add_batch(*(t[part] for t in tensors))
        assert ours.compute() == pytest.approx(other.compute(), abs=1e-6)


class Replay:
    """Gives sae-lens the activations that our generator drew."""

    def __init__(self, generator: ActivationGenerator) -> None:
        self.stream = generator.fork(0)

    def sample(self, batch_size: int) -> Tensor:
        return self.stream.sample(batch_size)

    __call__ = sample


@pytest.mark.parametrize("activation", [TopK(4), ReLU(), JumpReLU(0.3)], ids=lambda a: a.name)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_whole_evaluation(theirs: ModuleType, activation: Any, noise: float) -> None:
    from sae_lens import SAE as TheirSAE
    from sae_lens.synthetic import FeatureDictionary as TheirDictionary

    features = FeatureDictionary(F, D, bias=1.0, seed=0)
    generator = ActivationGenerator(F, 0.1, std_firing_magnitudes=0.2, seed=1)
    ours = SAE(D, 50, activation)
    init_sae_to_match_feature_dict(ours, features, noise_level=noise, seed=2)
    their_features = TheirDictionary(F, D, bias=1.0, initializer=None)
    with torch.no_grad():
        their_features.feature_vectors.copy_(features.feature_vectors)
        their_features.bias.copy_(features.bias)
    found = eval_sae_on_synthetic_data(ours, features, generator, 4000, batch_size=1000)
    expected = theirs.eval_sae_on_synthetic_data(
        as_theirs(TheirSAE, ours), their_features, Replay(generator), 4000, batch_size=1000
    )
    agreed = {name: value for name, value in found.to_log_dict().items() if name in expected.to_log_dict()}
    assert set(agreed) == set(expected.to_log_dict())
    assert agreed == pytest.approx(expected.to_log_dict(), abs=2e-4)
    assert found.dead_latents == expected.dead_latents


def as_theirs(kind: Any, sae: SAE) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return kind.load_from_disk(str(sae.save(folder)))


def test_a_run_of_theirs_and_ours_report_the_same_keys(theirs: ModuleType) -> None:
    features = FeatureDictionary(F, D, seed=0)
    ours = eval_sae_on_synthetic_data(SAE(D, 50, TopK(4)), features, ActivationGenerator(F, 0.1), 100).to_dict()
    assert theirs.SyntheticDataEvalResult.__dataclass_fields__.keys() <= ours.keys()
    assert theirs.ClassificationMetrics.__dataclass_fields__.keys() == ours["classification"].keys()
