"""The fused step against autograd and against dense float64 formulas, and its changes between sparse and dense."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import cpu, scratch, screen
from unweave.models import Meter
from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, TargetL0
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, fused
from unweave.training.dead import revived
from unweave.training.optimizer import RowGrad
from unweave.training.trainee import Trainee

pytestmark = pytest.mark.filterwarnings("ignore:unweave runs without its compiled kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels for GPUs are tested, by an interpreter that takes its time (tests/kernels/test_triton.py)."""
# Nothing that a fixture sets up is changed by an example.
many = settings(
    deadline=None, max_examples=8 if INTERPRETED else 80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not cpu.available():
        pytest.skip("the fused step needs the compiled kernels")


def make(config, *, n, d, seed=0, dead=0):
    """A trainee with nothing at its initial value and inputs at the scale of training."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = normal(n, d)
    trainee = Trainee(config, x, steps=100, tokens=100 * n, seed=0)
    sae, m = trainee.sae, config.d_sae
    with torch.no_grad():
        rows = normal(m, d) / d**0.5
        if config.decoder_is_unit:
            rows = torch.nn.functional.normalize(rows, dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.add_(0.3 * normal(m, d).T / d**0.5)
        sae.b_enc.copy_(0.3 * normal(m))
        sae.b_dec.copy_(0.3 * normal(d))
        if isinstance(config.activation, JumpReLU):
            sae.threshold.copy_(0.5 + 0.2 * normal(m).abs())
        if isinstance(config.activation, Gated):
            sae.r_mag.copy_(0.2 * normal(m))
            sae.b_mag.copy_(0.2 * normal(m))
    # Some of the dead latents fire nevertheless: they come back to life in this batch.
    trainee.tokens_since_fired[torch.randperm(m, generator=generator)[:dead]] = trainee.dead_after
    return trainee, x * trainee.scale


def doubled(trainee):
    twin = copy.deepcopy(trainee)
    twin.sae.double()
    return twin


def distance_to_a_tie(trainee, x):
    """How far the closest pre-activation is from where the step is discontinuous, in float64."""
    sae, activation = doubled(trainee).sae, trainee.config.activation
    pre = ((x.double() - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()

    def of_ranks(values, k):
        ranked = values.sort(dim=1, descending=True).values
        gaps = [ranked[:, :k].abs().min()]
        return [*gaps, (ranked[:, k - 1] - ranked[:, k]).min()] if k < values.shape[1] else gaps

    match activation:
        case TopK(k):
            distances = of_ranks(pre, k)
        case BatchTopK(k):
            distances = of_ranks(pre.view(1, -1), k * len(x))
        case JumpReLU(_, bandwidth):
            off = (pre - sae.threshold).abs()
            distances = [off.min(), (off - bandwidth / 2).abs().min()]
        case Gated():
            magnitudes = (pre - sae.b_enc) * sae.r_mag.exp() + sae.b_mag
            distances = [pre.abs().min(), magnitudes.abs().min()]
        case _:
            distances = [pre.abs().min()]
    if trainee.k_aux and trainee.dead.any():
        dead = pre[:, trainee.dead]
        distances += of_ranks(dead, min(trainee.k_aux, dead.shape[1]))
    return min(d.item() for d in distances)


def run(trainee, x, scale=0.7):
    """The fused step, computed sparsely or densely as `trainee.fused.dense` says, whatever the density."""
    trainee.fused.bound = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DENSE_ABOVE", 1.0)
        patch.setattr(fused, "_MOST_ROOM", 1.0)
        step = trainee.fused(x.clone(), revived(trainee), scale * trainee.penalty, None)
    # The next step writes its gradients into the same memory.
    return step._replace(grads=copy.deepcopy(step.grads))


def full(grad, like):
    """A gradient in the parameter's own shape."""
    if isinstance(grad, RowGrad):
        rows = grad.rows
        if grad.slot is not None:
            assert (grad.slot >= 0).sum() == len(rows)
            rows = torch.cat([rows, torch.zeros(1, rows.shape[1])])[grad.slot]
        grad = rows if rows.shape == like.shape and like.is_contiguous() else rows.T
    assert grad.shape == like.shape
    return grad


def compare(step, other, parameters, tolerance=1e-5):
    assert torch.equal(step.fired, other.fired)
    assert step.l0 == other.l0
    for name in ("loss", "squared_error", "squares"):
        torch.testing.assert_close(
            getattr(step, name).double(), getattr(other, name).double(), rtol=tolerance, atol=0, msg=name
        )
    assert (step.smallest is None) == (other.smallest is None)
    if step.smallest is not None:
        torch.testing.assert_close(step.smallest, other.smallest, rtol=tolerance, atol=0)
    assert step.grads.keys() == other.grads.keys() == parameters.keys()
    total = other.squares.sqrt().item()
    for name, parameter in parameters.items():
        got, expected = (full(s.grads[name], parameter).double() for s in (step, other))
        error = (got - expected).norm().item()
        # What rounding leaves of a sum that cancels is relative to its terms.
        assert error <= tolerance * expected.norm().item() + 1e-2 * tolerance * total, (name, error, expected.norm())


BY_THRESHOLD = (ReLU(), JumpReLU(0.3, 0.2), JumpReLU(0.0, 2.0))
BY_RANK = tuple(kind(k) for kind in (TopK, BatchTopK) for k in (1, 3, 7))
EVERY = (*BY_THRESHOLD, *BY_RANK, Gated())


@st.composite
def configs(draw, activations=EVERY, **fixed):
    m, activation = draw(st.sampled_from([30, 64, 400])), draw(st.sampled_from(activations))
    ranked = isinstance(activation, TopK | BatchTopK)
    terms = [L1(0.3), L1(0.0), None]
    if isinstance(activation, JumpReLU):
        terms += [TargetL0(5), TargetL0(2, 0.3)]
    settings = {
        "d_sae": m,
        "activation": activation,
        "sparsity": draw(st.sampled_from(terms)),
        "matryoshka": draw(st.sampled_from([None, None, Matryoshka((3, 0.5)), Matryoshka((0.1,))])),
        "unit_norm": None if ranked else draw(st.sampled_from([None, True, False])),
        "auxk": AuxK(draw(st.sampled_from([1 / 32, 0.5])), k=draw(st.sampled_from([None, 1, 4, 50]))),
        "precision": "fp32",
    }
    return SAEConfig(**settings | fixed)


@st.composite
def problems(draw, **fixed):
    config = draw(configs(**fixed))
    dead = draw(st.sampled_from([0, 0, 1, 5, 20]))
    n = draw(st.integers(2 if dead else 1, 6)) if config.d_sae == 400 else draw(st.sampled_from([2, 9, 40]))
    return make(config, n=n, d=draw(st.sampled_from([2, 5, 17, 40])), seed=draw(st.integers(0, 2**32)), dead=dead)


@many
@given(problems(), st.floats(0.1, 1.0))
def test_equals_autograd_and_dense_float64(dense_loss, problem, scale):
    trainee, x = problem
    assert trainee.fused is not None
    assume(distance_to_a_tie(trainee, x) > 2e-5)
    parameters = dict(trainee.sae.named_parameters())
    step = run(trainee, x, scale)
    plain = trainee._autograd(x, scale)
    compare(step, plain, parameters)

    twin = doubled(trainee)
    loss = dense_loss(twin, x.double(), scale)
    rounding = float((plain.loss.double() - loss.detach()).abs())  # of float32 itself, in the step that is not fused
    torch.testing.assert_close(step.loss.double(), loss.detach(), rtol=1e-5, atol=2 * rounding)
    loss.backward()
    exact = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.sae.named_parameters()}
    if trainee.config.decoder_is_unit:
        W_dec = twin.sae.W_dec.detach()
        exact["W_dec"] = exact["W_dec"] - (exact["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
    squares = sum(g.square().sum() for g in exact.values())
    compare(step, step._replace(grads=exact, squares=squares), parameters)


@many
@given(problems(activations=BY_THRESHOLD, matryoshka=None), st.sampled_from([1, 7, 768]))
def test_dense_execution_equals_sparse(problem, chunk):
    trainee, x = problem
    assume(distance_to_a_tie(trainee, x) > 2e-5)
    steps = []
    for dense in (False, True):
        trainee.fused.dense = dense
        with pytest.MonkeyPatch.context() as patch:
            for name in ("CHUNK_ROWS", "CHUNK_LATENTS"):
                patch.setattr(f"unweave.training.dense.{name}", chunk)
            steps.append(run(trainee, x))
    compare(*steps, dict(trainee.sae.named_parameters()))


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), ReLU(), JumpReLU(0.3, 0.2), Gated()], ids=str)
def test_the_precision_of_the_product_changes_no_bit(monkeypatch, activation):
    """Sparse execution: the product only says where to look."""
    monkeypatch.setattr(screen, "_fast_int8", lambda: True)
    monkeypatch.setattr(screen, "_NARROWEST", 1)
    steps = []
    for precision in ("fp32", "bf16", "auto"):
        trainee, x = make(SAEConfig(d_sae=64, activation=activation, precision=precision), n=40, d=24)
        steps.append(run(trainee, x))
    parameters = dict(trainee.sae.named_parameters())
    for step in steps[1:]:
        assert torch.equal(step.loss, steps[0].loss)
        for name, parameter in parameters.items():
            assert torch.equal(full(step.grads[name], parameter), full(steps[0].grads[name], parameter))


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(0.3, 0.2)], ids=str)
def test_dense_execution_in_bf16_is_off_by_no_more_than_bf16(activation):
    trainee, x = make(SAEConfig(d_sae=300, activation=activation, precision="bf16"), n=200, d=48, dead=10)
    sparse = run(trainee, x)
    trainee.fused.dense = True
    dense = run(trainee, x)
    torch.testing.assert_close(dense.loss, sparse.loss, rtol=2**-8, atol=0)
    torch.testing.assert_close(dense.l0.double(), sparse.l0.double(), rtol=2**-8, atol=0)
    for name, parameter in trainee.sae.named_parameters():
        got, expected = (full(s.grads[name], parameter) for s in (dense, sparse))
        # Rounding moves pre-activations into the narrow window of the thresholds and out of it.
        assert (got - expected).norm() < (0.1 if name == "threshold" else 0.03) * expected.norm(), name


@pytest.mark.parametrize(
    "config",
    [
        SAEConfig(d_sae=30, activation=TopK(3), precision="fp32"),
        SAEConfig(d_sae=30, activation=BatchTopK(30), precision="fp32"),
        SAEConfig(d_sae=1, activation=ReLU(), precision="fp32"),
        SAEConfig(d_sae=30, activation=JumpReLU(), precision="fp32", matryoshka=Matryoshka((2, 15, 29))),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["one token", "width 1", "all zeros", "nothing fires", "all dead"])
def test_odd_batches(config, case):
    trainee, x = make(config, n=1 if case == "one token" else 8, d=1 if case == "width 1" else 6)
    if case == "all zeros":
        x = torch.zeros_like(x)
    if case == "nothing fires":
        trainee.sae.b_enc.data.fill_(-100.0)
    if case == "all dead":
        trainee.tokens_since_fired.fill_(trainee.dead_after)
    parameters = dict(trainee.sae.named_parameters())
    compare(run(trainee, x), trainee._autograd(x, 0.7), parameters)
    if isinstance(config.activation, ReLU):
        trainee.fused.dense = True
        compare(run(trainee, x), trainee._autograd(x, 0.7), parameters)


def test_a_decoder_row_of_zeros_has_finite_gradients():
    config = SAEConfig(d_sae=30, activation=ReLU(), sparsity=L1(0.3), precision="fp32")
    trainee, x = make(config, n=9, d=6)
    trainee.sae.W_dec.data[4] = 0
    for dense in (False, True):
        trainee.fused.dense = dense
        step = run(trainee, x)
        compare(step, trainee._autograd(x, 0.7), dict(trainee.sae.named_parameters()))
        assert step.squares.isfinite()


def test_a_wide_dictionary_has_gradients_for_the_latents_in_use_only():
    trainee, x = make(SAEConfig(d_sae=400, activation=TopK(3), precision="fp32"), n=5, d=6, dead=7)
    step = run(trainee, x)
    for name in ("W_dec", "W_enc"):
        rows, slot = step.grads[name]
        assert slot is not None
        assert len(rows) <= 5 * 3 + 7
    narrow, x = make(SAEConfig(d_sae=30, activation=TopK(7), precision="fp32"), n=40, d=6)
    assert run(narrow, x).grads["W_dec"].slot is None


class Densities:
    """A trainee whose batch has any density that is asked for, and what its steps did."""

    def __init__(self, monkeypatch, activation=None):
        config = SAEConfig(d_sae=200, activation=activation or ReLU(), sparsity=L1(0.0), auxk=AuxK(0), precision="fp32")
        self.trainee, self.x = make(config, n=50, d=20)
        self.trainee.sae.b_enc.data.zero_()
        if isinstance(config.activation, JumpReLU):
            self.trainee.sae.threshold.data.fill_(0.05)
        pre = (self.x - self.trainee.sae.b_dec) @ self.trainee.sae.W_enc
        self.ranked = pre.detach().flatten().sort(descending=True).values
        self.calls = []
        computed = fused.dense_gradients

        def watched(*args):
            self.calls.append(args)
            return computed(*args)

        monkeypatch.setattr(fused, "dense_gradients", watched)

    def step(self, density):
        """Whether a step at this density was computed densely, and whether the next one begins densely."""
        threshold = 0.0 if self.trainee.sae.threshold is None else 0.05
        self.trainee.sae.b_enc.data.fill_(threshold - self.ranked[round(density * len(self.ranked))].item())
        self.calls.clear()
        made = self.trainee.fused(self.x.clone(), revived(self.trainee), 0.0, None)
        assert made.l0.item() == pytest.approx(density * len(self.ranked), rel=0.01)
        return bool(self.calls), self.trainee.fused.dense


def test_execution_changes_with_hysteresis(monkeypatch):
    at = Densities(monkeypatch)
    assert at.step(0.03) == (False, False)
    assert at.step(0.05) == (False, False)
    assert at.step(0.08) == (True, True)
    assert at.step(0.05) == (True, True)
    assert at.step(0.05) == (True, True)
    assert at.step(0.03) == (True, False)
    assert at.step(0.05) == (False, False)
    assert at.step(0.5) == (True, True)


def test_a_first_step_that_is_surely_dense_is_not_tried_sparsely(monkeypatch):
    tried = []
    select = kernels.encode_select
    monkeypatch.setattr(kernels, "encode_select", lambda *args, **kwargs: tried.append(1) or select(*args, **kwargs))
    assert Densities(monkeypatch).step(0.5) == (True, True)
    assert not tried
    at = Densities(monkeypatch)
    assert at.step(0.03) == (False, False)
    assert at.step(0.5) == (True, True)  # later ones are
    assert len(tried) == 2


def test_memory_of_dense_steps_is_given_back_after_the_last_one(monkeypatch):
    monkeypatch.setattr(scratch._pool, "buffers", {})
    at = Densities(monkeypatch)
    at.step(0.5)
    assert set(fused.DENSE_SCRATCH) & set(scratch.scratch_sizes())
    at.step(0.03)
    assert not set(fused.DENSE_SCRATCH) & set(scratch.scratch_sizes())


def memory_of_a_step(monkeypatch, config, n, d):
    """Bytes that a step takes at its peak beside its inputs, the weights and their gradients."""
    trainee, x = make(config, n=n, d=d)
    monkeypatch.setattr(scratch._pool, "buffers", {})
    with Meter() as meter:
        step = trainee.fused(x, revived(trainee), 0.0, None)
    assert all(g.slot is None for g in step.grads.values() if isinstance(g, RowGrad))
    return meter.peak - 2 * 4 * d * config.d_sae


def test_a_dense_step_takes_far_less_than_its_codes(monkeypatch):
    n, d, m = 4096, 32, 1024
    for activation in (ReLU(), JumpReLU(0.01, 0.2)):
        config = SAEConfig(d_sae=m, activation=activation, sparsity=None, precision="bf16")
        assert memory_of_a_step(monkeypatch, config, n, d) < 0.25 * 4 * n * m


def test_prefixes_take_no_memory_of_their_own(monkeypatch):
    """What flows back to each prefix' reconstruction lies where the gradient of W_enc comes."""
    n, d, m = 256, 256, 1024
    plain = SAEConfig(d_sae=m, activation=BatchTopK(8), precision="fp32")
    nested = dataclasses.replace(plain, matryoshka=Matryoshka((0.25, 0.5, 0.75)))
    taken = [memory_of_a_step(monkeypatch, config, n, d) for config in (plain, nested)]
    assert taken[1] < taken[0] + 4 * n * d


def test_a_window_counts_as_density(monkeypatch):
    """What JumpReLU's thresholds look at costs sparse execution as much as what is active."""
    at = Densities(monkeypatch, JumpReLU(0.05, bandwidth=2.0))
    assert at.step(0.03)[0]


def test_a_resumed_run_stays_dense(monkeypatch):
    at = Densities(monkeypatch)
    at.step(0.08)
    at.step(0.05)
    state = copy.deepcopy(at.trainee.state_dict())
    assert state["dense"] is True
    resumed = make(at.trainee.config, n=50, d=20)[0]
    resumed.load_state_dict(copy.deepcopy(state))
    raw = at.x / at.trainee.scale
    at.calls.clear()
    for trainee in (at.trainee, resumed):
        trainee.step(raw)
    assert len(at.calls) == 2
    own, other = at.trainee.state_dict(), resumed.state_dict()
    assert own["dense"] == other["dense"]
    for part in ("sae", "optimizer"):
        torch.testing.assert_close(own[part], other[part], rtol=0, atol=0)


def test_a_resumed_run_takes_no_first_step(monkeypatch):
    """Whether that is dense is asked of the batch: a resumed run that asked could differ from one that went through."""
    at = Densities(monkeypatch)
    raw = at.x / at.trainee.scale
    at.step(0.03)
    at.trainee.step(raw)
    assert not at.trainee.fused.dense
    resumed = make(at.trainee.config, n=50, d=20)[0]
    resumed.load_state_dict(copy.deepcopy(at.trainee.state_dict()))
    monkeypatch.setattr(fused.Fused, "_surely_dense", lambda *args: pytest.fail("it was asked"))
    resumed.step(raw)


@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(4), ReLU(), JumpReLU(0.3, 0.2), Gated()], ids=str)
@pytest.mark.parametrize("matryoshka", [None, Matryoshka((0.25,))], ids=["plain", "prefixes"])
def test_training_equals_training_on_the_reference(monkeypatch, activation, matryoshka):
    """Ten steps, through schedules, clipping, normalisation, deaths and the optimiser."""
    config = SAEConfig(
        d_sae=60, activation=activation, matryoshka=matryoshka, lr=1e-3, dead_after=99, grad_clip=0.05, precision="fp32"
    )  # fmt: skip
    trainees, logged = [], []
    for choice in ("cpu", "reference"):
        monkeypatch.setenv("UNWEAVE_KERNELS", choice)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(64, 12, generator=generator) for _ in range(10)]
        trainee = Trainee(config, batches[0], steps=10, tokens=640, seed=0)
        assert (trainee.fused is not None) == (choice == "cpu")
        logged.append([tuple(t.item() for t in trainee.step(x)) for x in batches])
        trainees.append(trainee)
    for own, other in zip(*logged, strict=True):
        assert own == pytest.approx(other, rel=1e-3)
    states = [dict(t.sae.state_dict()) for t in trainees]
    # Adam turns a gradient that is nothing but rounding into a whole step, so a few numbers may differ.
    for name, value in states[0].items():
        off = (value - states[1][name]).abs() > 1e-5 + 1e-4 * value.abs()
        assert off.float().mean() < 0.01, name
    assert torch.equal(trainees[0].tokens_since_fired, trainees[1].tokens_since_fired)


class Doubled(Trainee):
    """A loss of one's own."""

    def loss(self, x, sparsity_scale):
        loss, x_hat, codes = super().loss(x, sparsity_scale)
        return 2 * loss, x_hat, codes


def test_a_guess_of_the_smallest_winner_changes_no_bit():
    trainee, x = make(SAEConfig(d_sae=96, activation=BatchTopK(4)), n=256, d=24)
    twin = copy.deepcopy(trainee)
    for size in (1.0, 1.001, 0.999, 0.5, 2.0, 0.01, 1.0):
        guessing = trainee.fused(size * x, revived(trainee), 0.0, None)
        guessing = guessing._replace(grads=copy.deepcopy(guessing.grads))
        afresh = run(twin, size * x)
        assert torch.equal(guessing.loss, afresh.loss)
        for name, parameter in trainee.sae.named_parameters():
            assert torch.equal(full(guessing.grads[name], parameter), full(afresh.grads[name], parameter))


def test_a_guess_is_as_close_as_the_smallest_winner_moves():
    trainee, x = make(SAEConfig(d_sae=96, activation=BatchTopK(4)), n=256, d=24)

    def margin_after(*sizes):
        for size in sizes:
            trainee.fused(size * x, revived(trainee), 0.0, None)
        return trainee.fused.margin

    assert margin_after(1.0) == fused._WIDEST_MARGIN
    assert margin_after(*[1.0] * 20) == fused._NARROWEST_MARGIN
    moved = trainee.fused.bound
    margin = margin_after(1.002)
    assert margin == pytest.approx(max(2 * (trainee.fused.bound / moved - 1), fused._NARROWEST_MARGIN))
    assert margin_after(3.0) == fused._WIDEST_MARGIN


def test_a_loss_of_ones_own_goes_through_autograd():
    sample = torch.randn(40, 6)
    config = SAEConfig(d_sae=30, activation=TopK(3))
    own, plain = (kind(config, sample, steps=10, tokens=400, seed=0) for kind in (Doubled, Trainee))
    assert own.fused is None
    assert plain.fused is not None
    losses = [t.step(sample).loss for t in (own, plain)]
    torch.testing.assert_close(losses[0], 2 * losses[1])


@pytest.mark.parametrize(
    "option",
    [{"multi_topk": MultiTopK()}, {"ghost": GhostGradients()}, {"activation": ReLU(), "pre_act": PreActivation()}],
    ids=str,
)
def test_other_objectives_go_through_autograd(option):
    config = dataclasses.replace(SAEConfig(d_sae=30, activation=TopK(3)), **option)
    assert Trainee(config, torch.randn(40, 6), steps=10, tokens=400, seed=0).fused is None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_pre_activations_that_are_not_finite_stop_the_step(dense, bad, where):
    trainee, x = make(SAEConfig(d_sae=30, activation=ReLU(), precision="fp32"), n=9, d=6)
    trainee.fused.dense = dense
    {"x": x, "W_enc": trainee.sae.W_enc.data.T, "b_enc": trainee.sae.b_enc.data[:, None]}[where][3, 0] = bad
    with pytest.raises(UnweaveError, match=rf"{where} .*NaN or infinite|pre-activations of row \d are NaN or infinite"):
        run(trainee, x)
