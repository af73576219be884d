"""Temporal SAEs in training: sequences with a slow part are predicted, runs resume, and shuffled tokens are refused."""

import copy

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import AuxK
from unweave.sae import SAE, ArchetypalDictionary, ReLU, Temporal, TopK
from unweave.training import L0Controller, train_on
from unweave.training.config import SAEConfig, TrainConfig, from_dict, to_dict
from unweave.training.resampling import Resampling
from unweave.training.trainee import Trainee

D_IN, CONTEXT = 12, 16
TEMPORAL = Temporal(context=CONTEXT, n_heads=2, bottleneck=4)


def config(temporal=TEMPORAL, **kwargs):
    return SAEConfig(d_sae=32, **({"activation": TopK(2), "temporal": temporal, "lr": 3e-3} | kwargs))


def batches(n, slow=1.0):
    """Sequences of a part that stays through the sequence, and of a part that is new at every token."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        stays = slow * torch.randn(16, 1, D_IN, generator=generator).expand(16, CONTEXT, D_IN)
        news = torch.randn(16, CONTEXT, 2, generator=generator) @ torch.eye(D_IN)[:2]
        made.append((4 * (stays + news) + 1.0).reshape(-1, D_IN))
    return made


def test_what_stays_is_predicted(tmp_path):
    """With two novel latents a token it explains more than a TopK SAE of the same k, and its files say the same."""
    data = batches(300)
    sae, plain = train_on(data[:-1], [config(lr=1e-2), config(temporal=None)], progress=False)
    x = data[-1].reshape(-1, CONTEXT, D_IN)
    total = (x - x.mean((0, 1))).square().sum()
    error, of_plain = ((s(x) - x).square().sum() / total for s in (sae, plain))
    assert error < 0.5 * of_plain
    assert int((sae.encode(x) != 0).sum(2).max()) == 2
    later = x.clone()[:, CONTEXT // 2 :]  # without what came before, less is predicted
    cut = (sae(later)[:, 0] - later[:, 0]).square().sum() / later[:, 0].square().sum()
    kept = (sae(x)[:, CONTEXT // 2] - later[:, 0]).square().sum() / later[:, 0].square().sum()
    assert kept < 0.7 * cut
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(loaded(x), sae(x))


@pytest.mark.parametrize("activation", [TopK(2), ReLU()])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_formula(activation, tied):
    """Of the squared error, through the attention, the projection and the novel codes."""
    temporal = Temporal(context=CONTEXT, n_heads=2, n_layers=2, bottleneck=4, tied=tied)
    trainee = Trainee(
        config(temporal, activation=activation, auxk=AuxK(coefficient=0.0)), batches(1)[0],
        steps=10, tokens=10 * 256, seed=0,
    )  # fmt: skip
    trainee.sae.double()
    x = torch.randn(2 * CONTEXT, D_IN, dtype=torch.float64)
    loss, x_hat, _ = trainee.loss(x, 0.0)
    sae = trainee.sae
    dense = sae(x.reshape(2, CONTEXT, D_IN)).reshape(x.shape)
    torch.testing.assert_close(x_hat, dense)
    expected = (dense - x).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters.values())
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)
        direction = torch.randn_like(a)
        step = 1e-6 * direction / direction.norm()
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameters[name] += sign * step
                losses.append(trainee.loss(x, 0.0)[0])
                parameters[name] -= sign * step
        assert (losses[0] - losses[1]).item() / 2 == pytest.approx((a * step).sum().item(), rel=1e-2, abs=1e-10), name


def test_a_resumed_run_takes_the_same_step_and_a_finished_sae_trains_on():
    data = batches(8)

    def fresh(seed, **kwargs):
        return Trainee(config(), data[0], steps=20, tokens=20 * 256, seed=seed, **kwargs)

    trainee = fresh(0)
    for batch in data[:5]:
        trainee.step(batch)
    other = fresh(1)
    other.load_state_dict(copy.deepcopy(trainee.state_dict()))
    for each in (trainee, other):
        each.step(data[5])
    for name, tensor in trainee.sae.state_dict().items():
        assert torch.equal(tensor, other.sae.state_dict()[name]), name
    (sae,) = train_on(data, [config()], progress=False)
    x = data[-1]
    error = (sae(x.reshape(-1, CONTEXT, D_IN)).reshape(x.shape) - x).square().sum() / (x - x.mean(0)).square().sum()
    sums = fresh(2, start=sae).step(x.clone())
    assert (sums.squared_error / sums.variance).item() == pytest.approx(error.item(), rel=1e-3)
    wider = config(Temporal(context=CONTEXT, n_heads=1, bottleneck=4))
    with pytest.raises(UnweaveError, match="to start from has Temporal"):
        Trainee(wider, data[0], steps=20, tokens=20 * 256, seed=0, start=sae)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temporal": Temporal(n_heads=8, bottleneck=64)}, "no multiple of 64 \\* 8"),
        ({"normalize": "layer_norm"}, "one factor"),
        ({"unit_norm": True}, "leave out unit_norm"),
        ({"coder": "transcoder"}, "is an autoencoder"),
        ({"dictionary": ArchetypalDictionary()}, "is an autoencoder"),
        ({"resampling": Resampling()}, "unit rows"),
        ({"activation": ReLU(), "l0_controller": L0Controller(4)}, "ask for an L0 with TopK"),
        ({"W_dec_init": "data"}, "unit rows"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(UnweaveError, match=message):
        config(**kwargs)


def test_sequences_are_needed():
    assert from_dict(SAEConfig, to_dict(config())) == config()
    with pytest.raises(UnweaveError, match="shuffles their tokens"):
        TrainConfig(saes=(config(),))
    with pytest.raises(UnweaveError, match="no whole number of a temporal SAE's sequences of 16"):
        train_on(batches(3), [config()], tokens=600, progress=False)
