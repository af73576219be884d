"""Pursuits, tied and archetypal dictionaries in training: they learn, resume, finish in raw units, or are refused."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK
from unweave.sae import (
    SAE,
    ArchetypalDictionary,
    BatchTopK,
    JumpReLU,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    ReLU,
    TanhReLU,
    TiedDictionary,
    TopK,
)
from unweave.training import train_on
from unweave.training.config import SAEConfig, from_dict, to_dict
from unweave.training.resampling import Resampling
from unweave.training.trainee import Trainee

D_IN, D_SAE = 12, 32
CONFIGS = [
    {"activation": MatchingPursuit(k=3)},
    {"activation": MatchingPursuit(k=3), "normalize": "layer_norm"},
    {"activation": OrthogonalMatchingPursuit(k=3, residual_threshold=0.2)},
    {"activation": TopK(3), "dictionary": TiedDictionary()},
    {"activation": BatchTopK(3), "dictionary": TiedDictionary(), "normalize": "center"},
    {"activation": ReLU(), "dictionary": TiedDictionary()},
    {"activation": TopK(3), "dictionary": ArchetypalDictionary(n_points=200)},
    {"activation": ReLU(), "dictionary": ArchetypalDictionary(delta=0.0)},
]


@pytest.fixture(scope="module")
def batches():
    """Sparse mixtures of unit directions, far from the origin and not at the scale of training."""
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    made = []
    for _ in range(80):
        codes = (torch.rand(256, D_SAE, generator=generator) < 0.06) * (
            0.5 + torch.rand(256, D_SAE, generator=generator)
        )
        made.append(5 * codes @ features + 2.0)
    return made


def config(**kwargs):
    return SAEConfig(d_sae=D_SAE, **({"lr": 4e-3} | kwargs))


def explained(sae, x):
    return 1 - ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
def test_training_to_a_finished_sae(kwargs, batches, tmp_path):
    """It explains raw activations, its files give the same codes, and its configuration survives JSON."""
    made = config(**kwargs)
    assert from_dict(SAEConfig, to_dict(made)) == made
    (sae,) = train_on(batches[:-1], [made], progress=False)
    assert explained(sae, batches[-1]) > 0.6
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(loaded.encode(batches[-1]), sae.encode(batches[-1]))
    torch.testing.assert_close(loaded(batches[-1]), sae(batches[-1]))


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
def test_a_resumed_run_takes_the_same_step(kwargs, batches):
    def fresh(seed):
        return Trainee(config(**kwargs), batches[0], steps=20, tokens=20 * 256, seed=seed)

    trainee = fresh(0)
    for batch in batches[:5]:
        trainee.step(batch)
    other = fresh(1)
    other.load_state_dict(copy.deepcopy(trainee.state_dict()))
    for each in (trainee, other):
        each.step(batches[5])
    for name, tensor in trainee.sae.state_dict().items():
        assert torch.equal(tensor, other.sae.state_dict()[name]), name


@pytest.mark.parametrize("kwargs", [CONFIGS[0], *CONFIGS[2:6]], ids=str)  # layer norm has errors in other units
def test_a_finished_sae_trains_on(kwargs, batches):
    """From a finished SAE, whatever its scale is folded into, the first step sees the same reconstruction."""
    made = config(**kwargs, decay=0.0, warmup=0.0)
    (sae,) = train_on(batches[:-1], [made], progress=False)
    trainee = Trainee(made, batches[0], steps=20, tokens=5120, seed=1, start=sae)
    x = batches[-1]
    before = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    sums = trainee.step(x.clone())
    assert sums.squared_error / sums.variance == pytest.approx(before.item(), rel=0.15)


def test_archetypal_atoms_stay_near_the_hull(batches):
    trainee = Trainee(
        config(activation=TopK(3), dictionary=ArchetypalDictionary(n_points=100, delta=0.1)),
        batches[0], steps=60, tokens=60 * 256, seed=0,
    )  # fmt: skip
    start = trainee.sae.W_dec.detach().clone()
    for batch in batches[:60]:
        trainee.step(batch)
    atoms = trainee.atoms
    assert (trainee.sae.W_dec - start).norm() > 0.1 * start.norm()
    assert (atoms.weights >= 0).all()
    torch.testing.assert_close(atoms.weights.sum(1), torch.ones(D_SAE))
    assert (atoms.relaxation.norm(dim=1) <= 0.1 + 1e-6).all()
    torch.testing.assert_close(trainee.sae.W_dec.detach(), atoms.atoms())


def test_dead_latents_of_a_pursuit_come_back(batches):
    """AuxK lets them continue where the others stopped."""

    def dead_after(coefficient):
        made = config(activation=MatchingPursuit(k=3), auxk=AuxK(coefficient=coefficient), dead_after=2000, lr=1e-3)
        trainee = Trainee(made, batches[0], steps=200, tokens=200 * 256, seed=1)
        far = normalize(torch.ones(D_IN), dim=0)
        with torch.no_grad():  # directions that the centred data hardly has, opposite to one another's mean
            trainee.sae.W_dec[: D_SAE // 2] = normalize(0.01 * trainee.sae.W_dec[: D_SAE // 2] - far, dim=1)
        for i in range(200):
            trainee.step(batches[i % len(batches)])
        return int(trainee.dead.sum())

    assert dead_after(0.0) > 4
    assert dead_after(1 / 8) < dead_after(0.0) / 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": MatchingPursuit(k=3), "sparsity": L1(1.0)}, "stops after k atoms"),
        ({"activation": MatchingPursuit(k=3), "normalize": "whiten"}, "no whitening"),
        ({"activation": MatchingPursuit(k=3), "unit_norm": False}, "unit_norm"),
        ({"activation": MatchingPursuit(k=3), "coder": "transcoder"}, "only an SAE can be tied"),
        ({"activation": MatchingPursuit(k=3), "dictionary": ArchetypalDictionary()}, "norms of their own"),
        ({"activation": OrthogonalMatchingPursuit(k=33)}, "larger than the number"),
        ({"activation": ReLU(), "dictionary": TiedDictionary(), "unit_norm": False}, "need unit_norm"),
        ({"activation": TanhReLU(), "dictionary": TiedDictionary()}, "do not scale"),
        ({"activation": JumpReLU(), "dictionary": TiedDictionary(), "coder": "crosscoder"}, "only an SAE can be tied"),
        ({"activation": TopK(3), "dictionary": ArchetypalDictionary(n_points=8)}, "fewer than d_sae"),
        ({"activation": TopK(3), "dictionary": ArchetypalDictionary(), "unit_norm": True}, "leave out unit_norm"),
        ({"activation": TopK(3), "dictionary": ArchetypalDictionary(), "coder": "transcoder"}, "have a dictionary"),
        ({"activation": TopK(3), "dictionary": ArchetypalDictionary(), "resampling": Resampling()}, "combinations"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(UnweaveError, match=message):
        config(**kwargs)


def test_archetypal_needs_enough_activations_and_no_start(batches):
    made = config(activation=TopK(3), dictionary=ArchetypalDictionary(n_points=300))
    with pytest.raises(UnweaveError, match="needs as many activations to begin with, got 256"):
        Trainee(made, batches[0], steps=1, tokens=256, seed=0)
    made = config(activation=TopK(3), dictionary=ArchetypalDictionary())
    with pytest.raises(UnweaveError, match="starts from data points"):
        Trainee(made, batches[0], steps=1, tokens=256, seed=0, start=SAE(D_IN, D_SAE, TopK(3)))
