"""Training that starts from an SAE, and what may watch it."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training.config import SAEConfig
from unweave.training.finish import finished_sae
from unweave.training.trainee import Trainee
from unweave.training.trainer import Run, fit

ACTIVATIONS = [TopK(3), BatchTopK(3), ReLU(), JumpReLU(), Gated()]


def trainee_of(start, x, **kwargs):
    config = SAEConfig(d_sae=start.d_sae, activation=start.activation, **kwargs)
    return Trainee(config, x, steps=10, tokens=len(x) * 10, seed=0, start=start)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_the_start_computes_what_the_sae_computed(activation, scale):
    """At the scale of training and, without a step, back in raw units; the SAE itself is not changed."""
    x = scale * (torch.randn(200, 16) + 1)
    start = SAE(16, 24, activation)
    with torch.no_grad():
        start.b_dec.copy_(x.mean(0))
        start.b_enc.copy_(scale * 0.1 * torch.randn(24))
        if start.threshold is not None:
            start.threshold.fill_(0.2 * scale)
        if activation.name in ("relu", "jumprelu", "gated"):
            start.W_dec.mul_(1 + torch.rand(24, 1))
    before = {name: value.clone() for name, value in start.state_dict().items()}
    expected = start(x).detach()
    trainee = trainee_of(start, x)
    torch.testing.assert_close(trainee.sae.W_dec.detach().norm(dim=1), torch.ones(24))
    torch.testing.assert_close(
        trainee.sae(x * trainee.scale).detach() / trainee.scale, expected, rtol=1e-4, atol=1e-5 * scale
    )
    if activation.name != "batchtopk":  # its threshold is calibrated anew
        torch.testing.assert_close(finished_sae(trainee, [x], {})(x).detach(), expected, rtol=1e-4, atol=1e-5 * scale)
    trainee.step(x)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (SAE(8, 24, TopK(3)), "d_in=8, and d_in=16"),
        (SAE(16, 20, TopK(3)), "d_sae=20, and d_sae=24"),
        (SAE(16, 24, ReLU()), r"activation=ReLU\(\), and activation=TopK\(k=3\)"),
        (SAE(16, 24, TopK(3), apply_b_dec_to_input=False), "does not subtract its decoder bias"),
    ],
)
def test_a_start_that_does_not_fit(start, message):
    config = SAEConfig(d_sae=24, activation=TopK(3))
    with pytest.raises(UnweaveError, match=message):
        Trainee(config, torch.randn(10, 16), steps=1, tokens=1, seed=0, start=start)


def test_after_every_step():
    x = torch.randn(50, 16)
    run = Run({"": [trainee_of(SAE(16, 24, TopK(3)), x)]}, 130)
    seen = []
    fit(run, iter([{"": x}] * 3), progress=False, after_step=lambda: seen.append((run.step, run.seen)))
    assert seen == [(1, 50), (2, 100), (3, 130)]
