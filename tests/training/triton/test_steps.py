"""Steps on a GPU: the host waits for nothing, and what it learns late does no harm."""

from __future__ import annotations

import copy
import sys
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, Matryoshka, TargetL0
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import Resampling, SAEConfig, fused, readback
from unweave.training.clip import check_pending
from unweave.training.dead import dead_latents, revived
from unweave.training.optimizer import RowGrad
from unweave.training.trainee import Trainee
from unweave.training.trainer import Run, fit

# Numpy, which the interpreter computes with, warns where infinite numbers are subtracted and multiplied.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

D, M, N = 8, 40, 12
LAG = readback.LAG


def make(device, activation, **settings):
    settings = {"auxk": AuxK(k=3), "precision": "fp32"} | settings
    torch.manual_seed(0)
    x = torch.randn(200, D).to(device)
    trainee = Trainee(SAEConfig(d_sae=M, activation=activation, **settings), x, steps=100, tokens=100 * N, seed=0)
    assert trainee.fused is not None
    assert trainee.readback is not None
    return trainee


def batch(device, seed, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(device)


def weights(trainee):
    """Everything that a step changes but what is counted."""
    moments = [m.clone() for pair in trainee.optimizer.moments.values() for m in pair]
    return [p.detach().clone() for p in trainee.sae.parameters()] + moments


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        (TopK(3), {}),
        (TopK(3), {"matryoshka": Matryoshka((0.3, 0.6))}),
        (BatchTopK(3), {}),
        (ReLU(), {"sparsity": L1(0.5), "unit_norm": False}),
        (JumpReLU(0.3, 0.5), {"sparsity": TargetL0(2)}),
        (Gated(), {"sparsity": L1(0.5)}),  # so dense that it goes through autograd
    ],
    ids=["topk", "matryoshka", "batchtopk", "relu", "jumprelu", "gated"],
)
def test_a_run_equals_that_of_a_cpu(device, monkeypatch, activation, settings, moments):
    runs = []
    for kernels, place in (("cuda", device), ("cpu", "cpu")):
        monkeypatch.setenv("UNWEAVE_KERNELS", kernels)
        torch.manual_seed(0)
        sample = torch.randn(200, D).to(place)
        config = SAEConfig(
            d_sae=M, activation=activation, moments=moments, precision="fp32", dead_after=10**9, **settings
        )
        trainee = Trainee(config, sample, steps=100, tokens=1000, seed=0)
        assert (trainee.readback is not None) == (kernels == "cuda")
        for seed in range(4):
            sums = trainee.step(batch(place, seed))
        runs.append((trainee, sums))
    (gpu, on_gpu), (cpu, on_cpu) = runs
    # A moment that is rounded at random ends one unit of bfloat16 away where what is rounded differs in its last bit.
    tolerance = 1e-5 if moments == "fp32" else 2e-3
    for a, b in zip(weights(gpu), weights(cpu), strict=True):
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=10 * tolerance, atol=tolerance)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-4, atol=0)
    assert torch.equal(gpu.tokens_since_fired.cpu(), cpu.tokens_since_fired)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(device, bad):
    trainee = make(device, TopK(3))
    trainee.step(batch(device, 0))
    before = weights(trainee)
    x = batch(device, 1)
    x[4, 2] = bad
    trainee.step(x)
    assert_same(weights(trainee), before)
    with pytest.raises(UnweaveError, match=r"^the gradient of step 1 is NaN or infinite"):
        trainee.state_dict()  # a checkpoint waits for it
    for seed in range(2, 1 + LAG):
        trainee.step(batch(device, seed))
    with pytest.raises(UnweaveError, match=r"^the gradient of step 1 is NaN or infinite"):
        trainee.step(batch(device, 9))


def test_a_step_without_room_for_its_codes_changes_nothing_and_the_next_ones_are_dense(device, monkeypatch):
    trainee = make(device, ReLU(), sparsity=L1(0.0))
    monkeypatch.setattr(fused.Fused, "_surely_dense", lambda *_: False)
    before = weights(trainee)
    trainee.tokens_since_fired.fill_(7)
    trainee.step(batch(device, 0))  # at first, half of the latents fire
    assert_same(weights(trainee), before)
    assert (trainee.tokens_since_fired == 7).all()
    for seed in range(1, LAG):
        trainee.step(batch(device, seed))
    assert not trainee.fused.dense
    with pytest.warns(UserWarning, match=r"^step 0 had more active codes than there was room for, and was left out\."):
        trainee.step(batch(device, LAG))
    assert trainee.fused.dense
    with pytest.warns(UserWarning, match=r"^step [12] had more"):  # which a run says at its end at the latest
        check_pending(trainee)
    with pytest.warns(UserWarning, match=r"^step 1 had more"):
        trainee.step(batch(device, 5))
    assert not any(torch.equal(a, b) for a, b in zip(weights(trainee), before, strict=True))


def test_execution_follows_the_density_two_steps_later(device):
    trainee = make(device, ReLU(), sparsity=L1(0.0), lr=1e-9)
    dense = []
    for step in range(10):
        trainee.sae.b_enc.data.fill_(-100.0 if step >= 4 else 0.0)
        trainee.step(batch(device, step))
        dense.append(trainee.fused.dense)
    # The first step looks at a few rows. What step 4 was like is known when step 6 is taken.
    assert dense == [True] * (4 + LAG) + [False] * (6 - LAG)


def test_dead_latents_are_known_two_steps_later(device):
    trainee = make(device, TopK(3), dead_after=3 * N)
    with torch.no_grad():
        trainee.sae.b_enc[:5] = -100.0
    counted = []
    for step in range(8):
        trainee.step(batch(device, step))
        counted.append((len(revived(trainee)), int(trainee.dead.sum())))
        assert torch.equal(dead_latents(trainee), trainee.dead.nonzero().flatten())  # whoever waits has all of them
    known, real = zip(*counted, strict=True)
    assert max(real) > 0
    # Nothing has arrived in the first steps, which therefore count for themselves.
    assert list(known) == [*real[:LAG], *real[:-LAG]]


def test_a_latent_that_fired_since_it_was_counted_is_nobody(device):
    """`d_sae` stands for it, and the gradients are those of the dead latents alone."""
    trainee = make(device, TopK(3))
    x = batch(device, 3) * trainee.scale
    trainee.tokens_since_fired[[4, 17, M - 1]] = trainee.dead_after
    few = trainee.fused(x.clone(), revived(trainee), 0.0, None)
    many = trainee.fused(x.clone(), torch.tensor([4, 17, M - 1, M, M], device=device), 0.0, None)
    assert revived(trainee).tolist() == [4, 17, M - 1]
    # With more of them the loss weighs more, up to k; here both are at least k.
    assert torch.equal(few.loss, many.loss)
    for name in few.grads:
        one, other = (s.grads[name].rows if isinstance(s.grads[name], RowGrad) else s.grads[name] for s in (few, many))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("resampling", [None, Resampling(at=(0.03,))], ids=["", "just resampled"])
def test_a_resumed_run_goes_on_bit_for_bit(device, resampling):
    settings = {"dead_after": 2 * N, "moments": "bf16", "resampling": resampling}
    trainee, resumed = make(device, TopK(3), **settings), make(device, TopK(3), **settings)
    for step in range(3):
        trainee.step(batch(device, step))
    resumed.load_state_dict(copy.deepcopy(trainee.state_dict()))
    for step in range(3, 6):
        ours, theirs = trainee.step(batch(device, step)), resumed.step(batch(device, step))
        assert_same(ours, theirs)
        assert trainee.readback.state() == resumed.readback.state()
    assert_same(weights(trainee), weights(resumed))


@pytest.mark.parametrize("activation", [TopK(3), ReLU(), JumpReLU(0.3, 0.2)], ids=["topk", "relu", "jumprelu"])
def test_a_bf16_product_only_says_where_to_look(device, monkeypatch, activation):
    """Values are exact, and so is the selection: what rounding moves below its bound is kept as well."""
    monkeypatch.setattr(fused, "_MOST_ROOM", 1.0)

    steps = []
    for precision in ("fp32", "bf16"):
        trainee = make(device, activation, precision=precision, sparsity=None)
        trainee.sae.b_enc.data.fill_(0.0 if activation == ReLU() else -0.4)
        trainee.fused.begun = True
        steps.append(trainee.fused(batch(device, 3), revived(trainee), 0.0, None))
    exact, screened = steps
    assert screened.l0 == exact.l0 > 20
    torch.testing.assert_close(screened.loss, exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(screened.squares, exact.squares, rtol=1e-5, atol=0)


def test_one_large_row_makes_no_room_for_all_others_necessary(device):
    trainee = make(device, ReLU(), sparsity=L1(0.0), lr=1e-9, precision="bf16")
    trainee.sae.b_enc.data.fill_(-2.0)
    executed = []
    for seed in range(2 * LAG + 3):
        x = batch(device, seed, n=40)
        x[7] *= 100
        trainee.step(x)
        executed.append(trainee.fused.dense)
    assert executed == [False] * len(executed)


aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.lift_fresh.default, aten.is_nonzero.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Operations for whose results, or for whose arguments, the host of a GPU would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        repeats = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if func in WAITS or by_mask or repeats:
            own = [f"{f.name}:{f.lineno}" for f in traceback.extract_stack() if "/unweave/" in f.filename]
            if not own[-1].startswith("launch:"):  # there the interpreter computes
                self.found.append((func, own[-1]))
        return func(*args, **(kwargs or {}))

    def watch(self, monkeypatch):
        """Count what is no operation of its own on a CPU, where a step calls it."""

        def watched(name, method):
            def call(tensor, *args, **kwargs):
                caller = sys._getframe(1).f_code
                moved = name != "to" or any(isinstance(a, str | torch.device) for a in (*args, *kwargs.values()))
                if "/unweave/" in caller.co_filename and caller.co_name not in ("launch", "_read") and moved:
                    self.found.append((name, caller.co_name))
                return method(tensor, *args, **kwargs)

            return call

        for name in ("tolist", "item", "cpu", "numpy", "to"):
            monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))


@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        (TopK(3), {}),
        (TopK(3), {"matryoshka": Matryoshka((0.3, 0.6)), "precision": "bf16"}),
        (ReLU(), {"sparsity": L1(0.5), "unit_norm": False}),
        (ReLU(), {"sparsity": L1(0.5), "precision": "bf16"}),
        (JumpReLU(0.3, 0.5, in_window=0.0), {"sparsity": TargetL0(2)}),
    ],
    ids=["topk", "matryoshka-bf16", "relu", "relu-bf16", "jumprelu"],
)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("n_dead", [0, 5])
def test_the_host_waits_for_nothing(device, monkeypatch, activation, settings, n_dead, dense):
    """pitfall_303: no step asks the device how many of something there are, or what a number is."""
    monkeypatch.setattr(fused, "_MOST_ROOM", 1.0)
    trainee = make(device, activation, **settings)
    if dense and not isinstance(activation, ReLU | JumpReLU):
        pytest.skip("these steps are sparse")
    trainee.fused.begun = True
    trainee.sae.b_enc.data[:n_dead] = -100.0
    trainee.tokens_since_fired[:n_dead] = trainee.dead_after
    for seed in range(LAG + 1):
        trainee.fused.dense = dense
        trainee.step(batch(device, seed))
    trainee.fused.dense = dense
    x = batch(device, 9)
    with Waits() as waits:
        waits.watch(monkeypatch)
        trainee.step(x)
        monkeypatch.undo()
    assert len(revived(trainee)) >= n_dead
    assert waits.found == []


@pytest.mark.parametrize("last", [False, True], ids=["in between", "in the last step"])
def test_a_batch_that_is_not_finite_is_named_with_its_hook(device, last):
    """Also where the host hears of it two steps later, or when it asks at the end."""
    trainee = make(device, TopK(3))
    batches = [batch(device, seed) for seed in range(5)]
    batches[4 if last else 1][3, 2] = torch.nan
    run = Run({"some hook": [trainee]}, tokens=5 * N)
    match = rf"^batch {4 if last else 1} at the hook 'some hook' holds activations that are NaN or infinite"
    with pytest.raises(UnweaveError, match=match):
        fit(run, iter([{"some hook": x} for x in batches]), progress=False)
    assert run.step == (5 if last else 1 + LAG)


def test_the_encoder_in_bf16_is_that_of_the_weights_whatever_happened(device):
    """The update leaves it for the next product, also an update that was left out."""
    trainee = make(device, TopK(3), precision="bf16")

    def is_right():
        assert torch.equal(trainee._current_screen().images.half, trainee.sae.W_enc.detach().T.bfloat16())

    trainee.step(batch(device, 0) * torch.nan)
    is_right()
    trainee = make(device, TopK(3), precision="bf16")
    for seed in range(2):
        trainee.step(batch(device, seed))
        is_right()
    trainee.sae.W_enc.data.mul_(2.0)
    torch.autograd.graph.increment_version(trainee.sae.W_enc)
    assert trainee._current_screen() is None
    trainee.step(batch(device, 3) * torch.nan)
    is_right()
