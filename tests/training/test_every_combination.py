"""Every activation function with every objective: it trains with finite gradients, or is refused with the reason."""

import dataclasses

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import (
    PENALTIES,
    AuxK,
    GhostGradients,
    KSchedule,
    Matryoshka,
    MultiTopK,
    PreActivation,
    RandomMatryoshka,
    Reanimation,
)
from unweave.sae import ACTIVATIONS, SAE
from unweave.training import L0Controller, Resampling
from unweave.training.config import SAEConfig, from_dict, to_dict
from unweave.training.finish import finished_sae
from unweave.training.trainee import Trainee

D_IN, D_SAE, ROWS, STEPS = 12, 24, 32, 3
OTHERS = {
    "auxk": {"auxk": AuxK(k=4)},
    "variance": {"error": "variance"},
    "token": {"error": "token"},
    "matryoshka": {"matryoshka": Matryoshka((0.25, 0.5))},
    "sqrt": {"matryoshka": RandomMatryoshka(3)},
    "inverse_sqrt": {"matryoshka": RandomMatryoshka(3, law="inverse_sqrt")},
    "multi_topk": {"multi_topk": MultiTopK(8)},
    "ghost": {"ghost": GhostGradients()},
    "pre_act": {"pre_act": PreActivation()},
    "reanimation": {"reanimation": Reanimation()},
    "resampling": {"resampling": Resampling(at=(0.4,))},
    "k_schedule": {"k_schedule": KSchedule(8)},
    "l0_controller": {"l0_controller": L0Controller(4)},
}
PAIRS = [(a, o) for a in ACTIVATIONS for o in (*PENALTIES, *OTHERS)]


def sized(cls, field):
    """A part with the L0 of these tests, if it has such a field."""
    return cls(**{field: 4} if field in {f.name for f in dataclasses.fields(cls)} else {})


def config_of(name, objective):
    activation = sized(ACTIVATIONS[name], "k")
    changes = OTHERS[objective] if objective in OTHERS else {"sparsity": sized(PENALTIES[objective], "l0")}
    return SAEConfig(d_sae=D_SAE, activation=activation, dead_after=1, sparsity_warmup=0.0, **changes)


def expected_to_be_refused(name, objective):
    """The rules, apart from the code that applies them."""
    cls = ACTIVATIONS[name]
    pursuit = name.endswith("matching_pursuit")
    has_k = "k" in {f.name for f in dataclasses.fields(cls)}
    if objective in ("l0", "quadratic_l0", "target_l0"):
        return name != "jumprelu"  # counts reach thresholds alone
    if objective in PENALTIES:
        return pursuit and (objective != "contrastive" or name == "orthogonal_matching_pursuit")
    return {
        "multi_topk": name not in ("topk", "abstopk", "batchtopk"),
        "pre_act": has_k,
        "k_schedule": not has_k or name == "groupmax",
        "l0_controller": has_k,
    }.get(objective, False)


@pytest.mark.parametrize(("name", "objective"), PAIRS, ids=lambda value: value)
def test_it_trains_or_is_refused_with_the_reason(name, objective):
    if expected_to_be_refused(name, objective):
        with pytest.raises(UnweaveError) as refused:
            config_of(name, objective)
        reason = str(refused.value)
        assert reason.endswith(".")
        assert ACTIVATIONS[name].__name__ in reason  # it says of what
        return
    config = config_of(name, objective)
    assert from_dict(SAEConfig, to_dict(config)) == config
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(STEPS, ROWS, D_IN, generator=generator)
    trainee = Trainee(config, batches[0], steps=STEPS, tokens=STEPS * ROWS, seed=0)
    if config.ghost or config.pre_act or objective == "auxk":
        trainee.tokens_since_fired[:6] = 10  # some latents are dead from the start
    before = {n: p.detach().clone() for n, p in trainee.sae.named_parameters()}
    reached = dict.fromkeys(trainee.optimizer.parameters, False)
    for x in batches:
        trainee.step(x)
        # Adam's first moment is a mean of the gradients.
        for parameter, (first, _) in trainee.optimizer.moments.items():
            assert first.isfinite().all(), parameter
            reached[parameter] |= bool(first.count_nonzero())
    assert not [parameter for parameter, was in reached.items() if not was]
    moved = {n: not torch.equal(p.detach(), before[n]) for n, p in trainee.sae.named_parameters()}
    assert all(moved.values()), moved
    sae = finished_sae(trainee, [batches.flatten(0, 1)], {})
    assert isinstance(sae, SAE)
    assert sae(batches[0]).isfinite().all()


def test_every_activation_function_goes_with_some_objective_of_each_kind():
    for name in ACTIVATIONS:
        goes = {o for a, o in PAIRS if a == name and not expected_to_be_refused(a, o)}
        assert {"matryoshka", "variance", "token", "resampling"} <= goes
