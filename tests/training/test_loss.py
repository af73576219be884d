"""The whole loss of a step, in every combination of its terms, against dense formulas in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, TargetL0
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig
from unweave.training.trainee import Trainee

N, D, M = 40, 6, 24
DEAD = [2, 3, 11, 20]
PREFIXES = Matryoshka((3, 0.5))

CONFIGS = [
    SAEConfig(d_sae=M, activation=Gated(), sparsity=L1(0.7)),
    SAEConfig(d_sae=M, activation=Gated(), sparsity=L1(0.7), unit_norm=False, pre_act=PreActivation(0.3)),
    SAEConfig(d_sae=M, activation=Gated(), matryoshka=PREFIXES, ghost=GhostGradients(0.4)),
    SAEConfig(d_sae=M, activation=ReLU(), matryoshka=PREFIXES, pre_act=PreActivation(0.3), auxk=AuxK(k=2)),
    SAEConfig(d_sae=M, activation=TopK(3), multi_topk=MultiTopK(), auxk=AuxK(0.2, k=2)),
    SAEConfig(d_sae=M, activation=TopK(3), multi_topk=MultiTopK(5, 0.6), matryoshka=PREFIXES, ghost=GhostGradients(2)),
    SAEConfig(d_sae=M, activation=BatchTopK(3), matryoshka=PREFIXES),
    SAEConfig(d_sae=M, activation=BatchTopK(3), multi_topk=MultiTopK(), ghost=GhostGradients(), sparsity=L1(0.1)),
    SAEConfig(d_sae=M, activation=JumpReLU(0.3, 0.2), sparsity=TargetL0(5), pre_act=PreActivation(0.3)),
]


def make(config, n=N, d=D):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    trainee = Trainee(config, x, steps=100, tokens=100 * n, seed=0)
    trainee.sae.double()
    for name, parameter in trainee.sae.named_parameters():
        if name in ("b_enc", "b_dec", "r_mag", "b_mag"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    trainee.tokens_since_fired[DEAD] = trainee.dead_after
    return trainee, x


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_and_gradients_equal_dense_autograd(config, dense_loss):
    trainee, x = make(config)
    loss, x_hat, codes = trainee.loss(x, 0.6)
    loss.backward()
    got = {name: p.grad.clone() for name, p in trainee.sae.named_parameters()}
    trainee.sae.zero_grad()
    expected = dense_loss(trainee, x, 0.6)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in trainee.sae.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    torch.testing.assert_close(x_hat, codes.to_dense() @ trainee.sae.W_dec + trainee.sae.b_dec)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_terms_of_dead_latents_are_absent_while_none_is_dead(config):
    trainee, x = make(config)
    trainee.tokens_since_fired.zero_()
    without = SAEConfig(
        d_sae=M, activation=config.activation, sparsity=config.sparsity, unit_norm=config.unit_norm,
        matryoshka=config.matryoshka, multi_topk=config.multi_topk, auxk=AuxK(0),
    )  # fmt: skip
    assert torch.equal(trainee.loss(x, 1.0)[0], make(without)[0].loss(x, 1.0)[0])


class Largest(TorchDispatchMode):
    """The largest tensor that anything returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_tensor_is_as_large_as_batch_times_latents(config):
    """pitfall_126: forward and backward, with latents dead and the others sparse."""
    n, d = 2000, 4
    trainee, x = make(config, n, d)
    sae = trainee.sae
    if not isinstance(config.activation, TopK | BatchTopK):
        sae.b_enc.data.fill_(-4.0)  # few latents fire, so nothing switches to dense products
    with Largest() as largest:
        trainee.loss(x, 1.0)[0].backward()
    assert largest.numel < n * M
