"""Dead latents that start anew, by the published rule."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import Gated, JumpReLU, ReLU, TopK
from unweave.sae.archetypal import TiedDictionary
from unweave.training import SAEConfig
from unweave.training.resampling import Resampling, resample
from unweave.training.trainee import Trainee

N, D, M = 60, 6, 20
DEAD = [2, 3, 11]


def make(activation=TopK(3), **settings):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 1
    trainee = Trainee(SAEConfig(d_sae=M, activation=activation, **settings), x, steps=8, tokens=8 * N, seed=0)
    for first, second in trainee.optimizer.moments.values():
        first.fill_(0.5)
        second.fill_(0.5)
    with torch.no_grad():
        for name in ("b_enc", "r_mag", "b_mag", "threshold"):
            if getattr(trainee.sae, name, None) is not None:
                getattr(trainee.sae, name).fill_(0.3)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[DEAD] = True
    return trainee, x * trainee.scale, dead


@pytest.mark.parametrize("activation", [TopK(3), ReLU(), JumpReLU(0.1), Gated()], ids=lambda a: a.name)
def test_what_is_replaced_and_what_stays(activation):
    """pitfall_112, pitfall_114, pitfall_115: rows change, have the published norms, and Adam forgets them alone."""
    trainee, x, dead = make(activation)
    sae = trainee.sae
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    encoder_norm, decoder_norm = (
        before["W_enc"].T[~dead].norm(dim=1).mean(),
        before["W_dec"][~dead].norm(dim=1).mean(),
    )
    got = resample(sae, trainee.optimizer, dead, x, Resampling(), torch.Generator().manual_seed(0))
    assert got.tolist() == DEAD
    torch.testing.assert_close(sae.W_enc.T[dead].norm(dim=1), 0.2 * encoder_norm.expand(3))
    torch.testing.assert_close(sae.W_dec[dead].norm(dim=1), decoder_norm.expand(3))
    assert (sae.b_enc[dead] == 0).all()
    if activation.name == "jumprelu":
        assert (sae.threshold[dead] == 0.1).all()
    if activation.name == "gated":
        assert (sae.r_mag[dead] == 0).all()
        assert (sae.b_mag[dead] == 0).all()
    directions = torch.nn.functional.normalize(x - sae.b_dec, dim=1)
    cosines = torch.nn.functional.normalize(sae.W_dec[dead], dim=1) @ directions.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(3))
    assert len(cosines.argmax(1).unique()) == 3
    for name, parameter in sae.named_parameters():
        rows = parameter.detach().T if name == "W_enc" else parameter.detach()
        old = before[name].T if name == "W_enc" else before[name]
        if len(rows) == M:
            assert torch.equal(rows[~dead], old[~dead])
        else:
            assert torch.equal(rows, old)
    for name, moments in trainee.optimizer.moments.items():
        for moment in moments:
            per_latent = moment if moment.shape[0] == M else moment.T
            if name == "b_dec":
                assert (moment == 0.5).all()
            else:
                assert (per_latent[dead] == 0).all()
                assert (per_latent[~dead] == 0.5).all()


def test_tokens_are_drawn_by_the_square_of_their_loss():
    """pitfall_113: half of the tokens have twice the squared error of the others, so four times the probability."""
    trainee, _, _ = make()
    sae = trainee.sae
    dead = torch.ones(M, dtype=torch.bool)
    dead[0] = False
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1.0)  # nothing fires, so the error of a token is its squared distance from b_dec
        sae.b_dec.zero_()
    x = torch.nn.functional.normalize(torch.randn(400, D, generator=torch.Generator().manual_seed(3)), dim=1)
    directions = x.clone()
    x[:200] *= 2**0.5
    counts = {1.0: 0, 2.0: 0}
    for power in counts:
        for seed in range(60):
            alone = torch.zeros(M, dtype=torch.bool)
            alone[5] = True
            generator = torch.Generator().manual_seed(seed)
            resample(sae, trainee.optimizer, alone, x, Resampling(power=power), generator)
            counts[power] += int((sae.W_dec[5].detach() @ directions.T).argmax() < 200)
            with torch.no_grad():
                sae.b_enc[5] = -100.0
    assert 30 <= counts[1.0] <= 50  # 2 of 3
    assert 41 <= counts[2.0] <= 57  # 4 of 5


def test_it_happens_when_it_is_due_and_latents_count_as_alive_again():
    """pitfall_116"""
    config = Resampling(at=(0.25, 0.5))
    assert [s for s in range(8) if config.due(s, 8)] == [2, 4]
    trainee, x, _ = make(resampling=config, dead_after=10**6)
    raw = x / trainee.scale
    replaced = []
    for step in range(6):
        trainee.tokens_since_fired[DEAD] = 10**6
        with torch.no_grad():
            trainee.sae.b_enc[DEAD] = -100.0
        before = trainee.sae.W_dec.detach()[DEAD].clone()
        trainee.step(raw)
        changed = (trainee.sae.W_dec.detach()[DEAD] - before).abs().amax(1) > 0.1
        if changed.all():
            replaced.append(step)
            assert (trainee.tokens_since_fired[DEAD] == 0).all()
    assert replaced == [2, 4]


def test_a_tied_dictionary_keeps_its_unit_rows():
    trainee, x, dead = make(dictionary=TiedDictionary())
    resample(trainee.sae, trainee.optimizer, dead, x, Resampling(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.ones(M))


def test_more_dead_latents_than_tokens():
    trainee, x, _ = make()
    dead = torch.ones(M, dtype=torch.bool)
    got = resample(trainee.sae, trainee.optimizer, dead, x[:4], Resampling(), torch.Generator().manual_seed(0))
    assert got.tolist() == [0, 1, 2, 3]
    none = resample(trainee.sae, trainee.optimizer, ~dead, x, Resampling(), torch.Generator())
    assert len(none) == 0


@pytest.mark.parametrize("bad", [{"at": ()}, {"at": (0.0,)}, {"at": (1.0,)}, {"encoder_scale": 0.0}, {"power": -1.0}])
def test_impossible_settings(bad):
    with pytest.raises(UnweaveError):
        Resampling(**bad)
