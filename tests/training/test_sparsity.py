"""Penalties in training: coefficients, schedules, p-annealing, the L0 controller, and what takes the fused step."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.kernels import cpu
from unweave.objectives import (
    L0,
    L1,
    AuxK,
    Frequency,
    KSchedule,
    Lp,
    MultiTopK,
    PAnneal,
    QuadraticL0,
    RandomMatryoshka,
    Reanimation,
    Schedule,
    Tanh,
    TargetL0,
)
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig
from unweave.training.config import from_dict, to_dict
from unweave.training.controller import ControllerState, L0Controller
from unweave.training.resampling import Resampling
from unweave.training.trainee import Trainee

pytestmark = pytest.mark.filterwarnings("ignore:unweave runs without its compiled kernels")
N, D, M = 64, 8, 40


def make(config, steps=10, n=N):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    return Trainee(config, x, steps=steps, tokens=steps * n, seed=0), x


def term(trainee, x, step, warm):
    """What the sparsity terms add to the loss of a step."""
    trainee.step_count = step
    pre, codes, *_ = trainee.sae.training_codes(x)
    return trainee.sparsity(pre, codes, trainee.sae, step, warm)


def test_several_penalties_add_up():
    terms = (L1(0.3), Tanh(0.7), Frequency(0.2, limit=0.01))
    trainee, x = make(SAEConfig(d_sae=M, activation=ReLU(), sparsity=terms))
    pre, codes, *_ = trainee.sae.training_codes(x)
    expected = sum(0.5 * p.coefficient * p(pre, codes, trainee.sae) for p in terms)
    torch.testing.assert_close(term(trainee, x, 3, 0.5), expected)
    without, _ = make(dataclasses.replace(trainee.config, sparsity=()))
    torch.testing.assert_close(trainee.loss(x, 0.5)[0] - without.loss(x, 0.5)[0], expected)


def test_an_sae_does_not_start_with_the_features_of_a_world_of_its_seed():
    """Which are drawn from that seed, too."""
    trainee, _ = make(SAEConfig(d_sae=M, activation=TopK(3)))
    features = torch.nn.functional.normalize(torch.randn(M, D, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (trainee.sae.W_dec.detach() * features).sum(1).abs().mean() < 0.5


def test_a_schedule_takes_the_place_of_the_warm_up():
    """pitfall_088: the schedule is seen in the loss, at the first step, on the way and at the end."""
    values = [L1(0.3, schedule=Schedule(over=0.4)), L1(0.3)]
    own, plain = (make(SAEConfig(d_sae=M, activation=ReLU(), sparsity=v))[0] for v in values)
    x = make(own.config)[1]
    full = term(plain, x, 0, 1.0)
    for step, factor in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        torch.testing.assert_close(term(own, x, step, 0.123), factor * full)
        assert term(plain, x, step, 0.123).item() == pytest.approx(0.123 * full.item(), rel=1e-5)


def test_annealing_p_leaves_the_penalty_continuous():
    """pitfall_079, pitfall_081: at every change, on the batch of that step; the initial coefficient stays known."""
    penalty = PAnneal(0.5, p_end=0.2, begin=0.2, changes=4, eps=0.0)
    trainee, x = make(SAEConfig(d_sae=M, activation=ReLU(), sparsity=penalty))
    values = [term(trainee, x, step, 1.0).item() for step in range(10)]
    assert values == pytest.approx([values[0]] * 10, rel=1e-4)  # the codes stay, so the penalty does
    pre, codes, *_ = trainee.sae.training_codes(x)
    last = Lp(p=0.2, eps=0.0)(pre, codes, trainee.sae).item()
    assert trainee.sparsity.coefficient() == pytest.approx(values[0] / last, rel=1e-4)
    assert trainee.config.sparsity.coefficient == 0.5
    resumed, _ = make(trainee.config)
    trainee.step_count = 10
    resumed.load_state_dict(copy.deepcopy(trainee.state_dict()))
    assert resumed.sparsity.coefficient() == trainee.sparsity.coefficient()
    assert term(resumed, x, 9, 1.0).item() == pytest.approx(values[0], rel=1e-4)


EVERYTHING = [
    SAEConfig(d_sae=M, activation=ReLU(), sparsity=PAnneal(), l0_controller=L0Controller(4), reanimation=Reanimation()),
    SAEConfig(d_sae=M, activation=JumpReLU(), l0_controller=L0Controller(4), threshold_schedule=Schedule(1, 0.1)),
    SAEConfig(d_sae=M, activation=TopK(3), matryoshka=RandomMatryoshka(4), k_schedule=KSchedule(9), error="token"),
    SAEConfig(
        d_sae=M, activation=BatchTopK(3), k_schedule=KSchedule(9, 0.7, "exponential"), auxk=AuxK(schedule=Schedule()),
        resampling=Resampling((0.3, 0.6)), dead_after=100, b_dec_init="geometric_median", W_dec_init="data",
    ),
    SAEConfig(d_sae=M, activation=Gated(), sparsity=(Tanh(0.1), L1(0.1)), error="variance", dead_after=100),
    SAEConfig(d_sae=M, activation=JumpReLU(), sparsity=(QuadraticL0(4), Frequency(schedule=Schedule(0, 2)))),
]  # fmt: skip


@pytest.mark.parametrize("config", EVERYTHING, ids=str)
def test_a_resumed_run_goes_on_bit_by_bit(config):
    batches = [torch.randn(N, D, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(10)]
    whole, resumed = (Trainee(config, batches[0], steps=10, tokens=10 * N, seed=0) for _ in range(2))
    for i, x in enumerate(batches):
        if i == 5:
            resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        whole.step(x)
        if i >= 5:
            resumed.step(x)
    own, other = whole.state_dict(), resumed.state_dict()
    assert own["sparsity"] == other["sparsity"]
    torch.testing.assert_close(own["sae"], other["sae"], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(own["optimizer"], other["optimizer"], rtol=0, atol=0)
    assert torch.equal(own["tokens_since_fired"], other["tokens_since_fired"])


@pytest.mark.parametrize("config", EVERYTHING, ids=str)
def test_round_trip_through_json(config):
    assert from_dict(SAEConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "fuses"),
    [
        ({}, True),
        ({"sparsity": L1(2.0, schedule=Schedule(1, 0.1))}, True),
        ({"sparsity": (L1(2.0),)}, True),
        ({"l0_controller": L0Controller(5)}, True),
        ({"resampling": Resampling()}, True),
        ({"W_dec_init": "data", "b_dec_init": "geometric_median"}, True),
        ({"activation": TopK(3)}, True),
        ({"activation": JumpReLU()}, True),
        ({"activation": JumpReLU(), "sparsity": TargetL0(5), "threshold_schedule": Schedule()}, True),
        ({"activation": JumpReLU(), "sparsity": L0()}, False),
        ({"activation": JumpReLU(), "l0_controller": L0Controller(5)}, False),
        ({"sparsity": Tanh()}, False),
        ({"sparsity": PAnneal()}, False),
        ({"sparsity": (L1(), Tanh())}, False),
        ({"error": "variance"}, False),
        ({"auxk": AuxK(schedule=Schedule())}, False),
        ({"reanimation": Reanimation()}, False),
        ({"matryoshka": RandomMatryoshka(3)}, False),
        ({"activation": TopK(3), "k_schedule": KSchedule(9)}, False),
    ],
    ids=str,
)
def test_what_takes_the_fused_step(change, fuses):
    if not cpu.available():
        pytest.skip("the fused step needs the compiled kernels")
    assert (make(SAEConfig(**{"d_sae": M, "activation": ReLU()} | change))[0].fused is not None) == fuses


@pytest.mark.parametrize("sparsity", [L1(2.0, schedule=Schedule(1, 0.1)), (L1(2.0),)], ids=str)
def test_the_fused_step_sees_schedules(monkeypatch, sparsity):
    if not cpu.available():
        pytest.skip("the fused step needs the compiled kernels")
    config = SAEConfig(d_sae=M, activation=ReLU(), sparsity=sparsity, l0_controller=L0Controller(5), precision="fp32")
    losses = []
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv("UNWEAVE_KERNELS", kernels)
        trainee, x = make(config)
        assert (trainee.fused is not None) == (kernels == "cpu")
        losses.append([trainee.step(x).loss.item() for _ in range(10)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_k_anneals_and_ends_as_the_activation_functions():
    """pitfall_153, pitfall_154: k at steps 0, 1 and the end; neither the config nor the SAE changes."""
    config = SAEConfig(d_sae=M, activation=BatchTopK(3), k_schedule=KSchedule(11, over=0.4))
    trainee, x = make(config)
    ks = []
    for _ in range(10):
        sums = trainee.step(x)
        ks.append((sums.l0 / sums.tokens).item())
    assert ks[:5] == pytest.approx([11, 9, 7, 5, 3])
    assert ks[9] == pytest.approx(3)
    assert trainee.sae.activation == config.activation == BatchTopK(3)


def test_thresholds_move_at_the_rate_of_their_schedule():
    """pitfall_059"""
    moved = []
    for schedule in (None, Schedule(0.5, 0.5)):
        config = SAEConfig(
            d_sae=M, activation=JumpReLU(0.1, 0.5), threshold_lr=1e-3, threshold_schedule=schedule, warmup=0, decay=0
        )
        trainee, x = make(config)
        before = trainee.sae.threshold.detach().clone()
        trainee.step(x)
        moved.append((trainee.sae.threshold.detach() - before).abs().max().item())
    assert moved == pytest.approx([1e-3, 0.5e-3], rel=1e-2)


def test_thresholds_move_as_fast_as_weights_at_a_mean_squared_norm_of_1():
    """But by no more than a tenth of the window that they learn through."""
    config = SAEConfig(d_sae=M, activation=JumpReLU(bandwidth=0.1), lr=1e-3)
    assert config.threshold_rate(16) == pytest.approx(4e-3)
    assert config.threshold_rate(1600) == pytest.approx(1e-2)
    assert dataclasses.replace(config, threshold_lr=0.5).threshold_rate(1600) == 0.5
    assert make(config)[0].rates["threshold"] == pytest.approx(1e-3 * D**0.5)


def test_thresholds_in_a_gap_of_the_pre_activations_learn():
    """Features of strength 3 and nothing else: no pre-activation is within 0.3 of the thresholds."""
    moments = []
    for share in (0.0, 0.2):
        activation = JumpReLU(init_threshold=1.0, in_window=share)
        config = SAEConfig(
            d_sae=D, activation=activation, sparsity=TargetL0(1), sparsity_warmup=0.0, b_dec_init="zeros", lr=1e-3
        )
        trainee = make(config)[0]
        with torch.no_grad():
            for weight in (trainee.sae.W_enc, trainee.sae.W_dec):
                weight.copy_(torch.eye(D))
        trainee.scale = 1.0
        trainee.step(3.0 * (torch.rand(N, D, generator=torch.Generator().manual_seed(1)) < 0.4))
        moments.append(trainee.optimizer.moments["threshold"][0].clone())
        bandwidth = trainee.sae.activation.bandwidth
        assert trainee.rates["threshold"] == pytest.approx(config.threshold_rate(D, bandwidth))
    assert moments[0].count_nonzero() == 0
    assert moments[1].count_nonzero() == D
    assert bandwidth > 1
    other = make(config)[0]
    other.load_state_dict(trainee.state_dict())
    assert other.sae.activation.bandwidth == bandwidth
    assert other.rates == trainee.rates
    assert trainee.config.activation.bandwidth == 0.1


def features(n, generator, directions, active=5):
    """Tokens that are sums of a few of many directions."""
    on = torch.rand(n, len(directions), generator=generator) < active / len(directions)
    strength = (1 + 0.3 * torch.randn(n, len(directions), generator=generator)).abs()
    return (on * strength) @ directions + 0.5


def trained(config, steps, n=256, seed=0):
    """Mean L0 over the last tenth of a run on a world of that seed, and the trainee."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
    batches = [features(n, generator, directions) for _ in range(steps)]
    trainee = Trainee(config, batches[0], steps=steps, tokens=steps * n, seed=seed)
    sums = [trainee.step(x) for x in batches]
    return sum((s.l0 / s.tokens).item() for s in sums[-steps // 10 :]) / (steps // 10), trainee


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
@pytest.mark.parametrize(("target", "seed"), [(4.0, 0), (9.0, 1)])
def test_a_controller_reaches_its_target(activation, target, seed):
    config = SAEConfig(d_sae=96, activation=activation, l0_controller=L0Controller(target), lr=5e-3)
    l0, trainee = trained(config, 500, seed=seed)
    assert l0 == pytest.approx(target, rel=0.1)
    assert trainee.penalty != pytest.approx(trainee.config.sparsity_term.coefficient_for(16), rel=0.05)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_the_coefficient_moves_l0_monotonically_over_two_decades(activation):
    """pitfall_059: and thresholds move with it."""
    penalty, base = (L0, 0.02) if activation.name == "jumprelu" else (L1, 0.05)
    l0s, thresholds = [], []
    for factor in (1, 10, 100):
        config = SAEConfig(
            d_sae=96, activation=activation, sparsity=penalty(base * factor), lr=5e-3, threshold_lr=3e-3, auxk=AuxK(0)
        )  # fmt: skip
        l0, trainee = trained(config, 150)
        l0s.append(l0)
        if trainee.sae.threshold is not None:
            thresholds.append(trainee.sae.threshold.mean().item())
    assert l0s[0] > 1.15 * l0s[1] > 1.15**2 * l0s[2]
    assert thresholds == sorted(thresholds)


def test_a_controller_by_hand():
    state = ControllerState(L0Controller(10.0, rate=0.1, gain=2.0), steps=100)
    assert state.factor == 1
    state.observe(20.0)
    log2 = 0.6931472
    assert (state.fast, state.slow) == (pytest.approx(log2), pytest.approx(log2))  # it stands still, as far as is known
    assert state.total == pytest.approx(0.1 * log2, rel=1e-3)
    assert state.factor == pytest.approx(2**2.1, rel=1e-3)
    state.observe(10.0)
    assert (state.fast, state.slow) == (pytest.approx(0.9 * log2), pytest.approx(0.98 * log2))
    # The means are 10 and 50 steps behind, and differ by 0.08 log 2: it falls by 0.002 log 2 a step, for 5 steps more.
    error = (0.9 - 0.002 * 5) * log2
    assert state.total == pytest.approx(0.1 * log2 + 0.1 * error)
    assert state.factor == pytest.approx(math.exp(state.total + 2 * error))
    other = ControllerState(state.config, 100)
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert other.factor == state.factor
    for _ in range(10_000):
        state.observe(1e6)
    assert state.factor == pytest.approx(1e4)
    for _ in range(3):  # each time that L0 crosses the target, the sum goes on at half the rate, and at least an eighth
        for l0 in (1.0, 100.0):
            for _ in range(100):
                state.observe(l0)
    assert state.slowed == 1 / 8
    for bad in ({"target": 0.0}, {"rate": 0.0}, {"gain": -1.0}):
        with pytest.raises(UnweaveError, match="L0Controller needs"):
            L0Controller(**bad)


def test_a_controller_does_not_wind_up_while_l0_falls():
    """At 5 % a step it will be there within 40 steps, a tenth of the run, from 8 times the target on."""
    state = ControllerState(L0Controller(10.0), steps=400)
    totals = []
    for step in range(70):
        state.observe(500 * 0.95**step)
        totals.append(state.total)
    assert totals[30] > 1  # from far away the sum grows
    assert totals[69] == totals[60]
    assert state.factor < 0.6 * math.exp(state.total + math.log(3))  # and the other part has let go


def test_a_controller_leaves_penalties_that_decide_no_l0():
    terms = (L1(0.3), Frequency(0.2, limit=0.01))
    trainee, x = make(SAEConfig(d_sae=M, activation=ReLU(), sparsity=terms, l0_controller=L0Controller(2)), steps=20)
    for _ in range(12):
        trainee.step(x)
    assert trainee.sparsity.coefficient(0) > 0.35
    assert trainee.sparsity.coefficient(1) == 0.2


def test_a_controller_waits_for_the_warm_up():
    trainee, x = make(SAEConfig(d_sae=M, activation=ReLU(), l0_controller=L0Controller(2), sparsity_warmup=0.5))
    factors = []
    for _ in range(8):
        trainee.step(x)
        factors.append(trainee.sparsity.controller.factor)
    assert factors[:5] == [1] * 5
    assert factors[5] > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": ReLU(), "sparsity": (L1(), QuadraticL0())}, "ReLU SAE has none"),
        ({"activation": TopK(), "l0_controller": L0Controller()}, "L0 of TopK is its k"),
        ({"activation": JumpReLU(), "sparsity": TargetL0(), "l0_controller": L0Controller()}, "target of their own"),
        ({"activation": JumpReLU(), "sparsity": (), "l0_controller": L0Controller()}, "give sparsity"),
        ({"activation": ReLU(), "sparsity": Frequency(), "l0_controller": L0Controller()}, "Frequency does not"),
        ({"activation": ReLU(), "d_sae": 16, "l0_controller": L0Controller(17)}, "larger than d_sae"),
        ({"activation": ReLU(), "sparsity": 0.3}, "takes penalties"),
        ({"activation": ReLU(), "sparsity": (0.3,)}, "takes penalties"),
        ({"activation": ReLU(), "k_schedule": KSchedule(4)}, "ReLU has none"),
        ({"activation": TopK(4), "k_schedule": KSchedule(65), "d_sae": 64}, "above d_sae"),
        ({"activation": TopK(4), "k_schedule": KSchedule(8), "multi_topk": MultiTopK()}, "leave out k_schedule"),
        ({"activation": TopK(4), "threshold_schedule": Schedule()}, "has none"),
        ({"activation": BatchTopK(4), "threshold_schedule": Schedule()}, "has none"),
        ({"matryoshka": RandomMatryoshka(65), "d_sae": 64}, "65 different"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(UnweaveError, match=message):
        SAEConfig(**settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": {"type": "l2"}}, "no type 'l2'.*l1"),
        ({"sparsity": [{"type": "l1"}, {"type": "l2"}]}, r"sparsity\[1\] has no type 'l2'"),
        ({"sparsity": {"type": "l1", "coeficient": 3}}, "did you mean 'coefficient'"),
        ({"error": "relative"}, "'variance'"),
        ({"matryoshka": {"type": "random", "prefixes": 3}}, "random_matryoshka"),
        ({"l0_controller": {"taget": 3}}, "did you mean 'target'"),
    ],
)
def test_misspelt_settings(values, message):
    with pytest.raises(UnweaveError, match=message):
        from_dict(SAEConfig, values)


def test_a_target_on_the_line_controls_the_coefficient_or_is_the_penalty():
    from unweave.cli.train import TrainArgs

    for name in ("relu", "tanhrelu", "gated"):
        (sae,) = TrainArgs(activation=name, target_l0=9.0).to_config().saes
        assert sae.l0_controller == L0Controller(9.0)
    (sae,) = TrainArgs(activation="jumprelu", target_l0=9.0).to_config().saes
    assert sae.sparsity == TargetL0(9.0)
    with pytest.raises(UnweaveError, match="--target-l0 goes with"):
        TrainArgs(activation="topk", target_l0=9.0).to_config()
