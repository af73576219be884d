"""What a plan says is what a run takes, and what does not fit is refused before anything is spent."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unweave as uw
from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ShuffledBatches
from unweave.activations.limits import free_memory
from unweave.cli import main
from unweave.kernels.scratch import _pool
from unweave.models import Meter
from unweave.objectives import AuxK
from unweave.sae import ReLU, TopK
from unweave.training import SAEConfig, TrainConfig, train
from unweave.training.buffers import Buffer, peak, size
from unweave.training.dense import auxk_bytes, auxk_gradients
from unweave.training.fused import Fused
from unweave.training.plan import duration
from unweave.training.train import prepare
from unweave.training.trainee import Trainee

PLAN = sys.modules["unweave.training.plan"]
BUFFERS = sys.modules["unweave.training.buffers"]


@pytest.fixture
def config(texts, tmp_path):
    return TrainConfig(
        model="tiny",
        hooks=("resid_post.0",),
        saes=(SAEConfig(64, TopK(4)), SAEConfig(32, TopK(4))),
        tokens=5000,
        batch_size=128,
        buffer=4096,
        out=str(tmp_path / "run"),
        text=DataConfig(context=16, held_out=0.0),
    )


def test_numbers_of_a_plan(config, tiny_model, texts, monkeypatch):
    monkeypatch.setattr(_pool, "buffers", {})  # as in a fresh process: what an earlier run left is not allocated again
    plan = uw.plan(config, model=tiny_model, data=texts, seconds=0)
    assert (plan.tokens, plan.steps, plan.prompts_per_pass) == (5000, 40, 256)
    real = plan.rows * 16 * plan.kept  # one BOS in each row of 16 or so is left out
    assert 5000 <= real < 5000 * 1.1
    assert plan.passes == -(-plan.rows // 256)
    assert plan.seconds == pytest.approx(5000 / plan.harvest_rate + 40 * plan.step_seconds)
    assert plan.buffer("ring") == 4096 * 16 * 4
    assert plan.buffer("model") >= sum(p.nbytes for p in tiny_model.module.parameters())
    weights = sum(2 * 16 * d + 16 + d for d in (64, 32))
    assert 12 * weights < plan.buffer("weights, gradients and moments") < 30 * weights
    assert plan.buffer("reused") > 4 * weights  # gradients, too
    assert plan.buffer("step if half the latents die") > plan.buffer("step")
    assert plan.memory == {"cpu": peak(plan.buffers, "cpu")}
    text = str(plan)
    assert "5,000 tokens in 40 steps" in text
    assert f"{plan.rows:,} rows in {plan.passes} passes of 256, in float32" in text
    assert f"memory on cpu {size(plan.memory['cpu'])}: model" in text
    assert "disk" in text


def test_planning_moves_nothing_on(config, tiny_model, texts):
    session = prepare(config, tiny_model, texts)
    expected = next(prepare(config, tiny_model, texts).stream)
    session.plan()
    got = next(session.stream)
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    assert session.stream.report.seen == 4096


def test_pitfall_200_229_the_ring_is_as_large_as_the_plan_says(config, tiny_model, texts):
    session = prepare(config, tiny_model, texts)
    plan = session.plan()
    batches = ShuffledBatches(session.stream, config.batch_size, config.ring_size)
    next(batches)
    assert batches.ring.nbytes == plan.buffer("ring")


def test_the_peak_of_a_run_is_what_its_plan_says(texts, tiny_model):
    """In tensors that PyTorch makes; benchmarks/memory.py measures the process. AuxK takes more as latents die."""
    sae = SAEConfig(2048, TopK(4), auxk=AuxK(coefficient=0))
    config = TrainConfig(
        model="tiny", hooks=("resid_post.0",), saes=(sae,), tokens=40_000, batch_size=2048, buffer=32_768,
        text=DataConfig(context=16, held_out=0.0),
    )  # fmt: skip
    session = prepare(config, tiny_model, texts)
    plan = session.plan()
    del session
    gc.collect()
    with Meter() as meter:
        train(config, model=tiny_model, data=texts, progress=False)
    planned = peak([b for b in plan.buffers if not b.present], "cpu")  # what steps reuse is there since it was planned
    assert planned / 1.2 < meter.peak < planned * 1.2


def test_a_plan_does_not_depend_on_what_was_trained_before(config, tiny_model, texts, monkeypatch):
    """Smaller steps leave smaller buffers to reuse, which larger ones replace."""

    def planned():
        monkeypatch.setattr(_pool, "buffers", _pool.buffers.copy())
        return replace(uw.plan(config, model=tiny_model, data=texts, seconds=0), harvest_rate=0, step_seconds=0)

    monkeypatch.setattr(_pool, "buffers", {})
    first = planned()
    assert planned() == first
    halves = {name: buffer[: len(buffer) // 2].clone() for name, buffer in _pool.buffers.items()}
    assert halves
    monkeypatch.setattr(_pool, "buffers", halves)
    assert planned() == first


def test_a_plan_knows_what_dead_latents_take_in_steps_through_autograd(texts, tiny_model, monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "reference")
    sae = SAEConfig(1024, TopK(4), auxk=AuxK(k=32))
    config = TrainConfig(
        model="tiny", hooks=("resid_post.0",), saes=(sae,), tokens=40_000, batch_size=512, buffer=4096,
        text=DataConfig(context=16, held_out=0.0),
    )  # fmt: skip
    plan = uw.plan(config, model=tiny_model, data=texts, seconds=0)
    trainee = Trainee(sae, torch.randn(512, 16), steps=10, tokens=40_000, seed=0)
    assert trainee.fused is None
    for _ in range(2):
        trainee.step(torch.randn(512, 16))
    trainee.tokens_since_fired[:512] = trainee.dead_after
    with Meter() as meter:
        trainee.step(torch.randn(512, 16))
    planned = plan.buffer("step if half the latents die")
    assert planned / 1.2 < meter.peak < planned * 1.2
    plain = replace(config, saes=(SAEConfig(1024, TopK(4), auxk=AuxK(coefficient=0)),))
    assert uw.plan(plain, model=tiny_model, data=texts, seconds=0).buffer("step if half the latents die") == 0


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("d", "dead"), [(64, 512), (64, 6000), (512, 1024)])
def test_a_plan_knows_what_dead_latents_take(d, dead, low, monkeypatch):
    """In one chunk of rows, or several where there are many latents."""
    trainee = Trainee(SAEConfig(2 * dead, TopK(4)), torch.randn(1024, d), steps=10, tokens=1000, seed=0)
    if trainee.fused is None:
        pytest.skip("steps go through autograd here")
    residual = torch.randn(1024, d)
    monkeypatch.setattr(_pool, "buffers", {})  # what other tests' steps left to reuse would not count
    with torch.no_grad(), Meter() as meter:
        auxk_gradients(trainee.sae, 1.0, residual, residual, torch.arange(dead), 32, low)
    assert meter.peak / 1.2 < auxk_bytes(1024, d, dead, low) < meter.peak * 1.2
    assert Fused(trainee.sae, trainee.config, k_aux=0).revival_bytes(1024, dead) == 0


def test_a_plan_that_measured_dense_steps_knows_what_sparse_ones_take(texts, tiny_model):
    sae = SAEConfig(2048, ReLU(), auxk=AuxK(coefficient=0), precision="bf16")
    config = TrainConfig(
        model="tiny", hooks=("resid_post.0",), saes=(sae,), tokens=40_000, batch_size=2048, buffer=4096,
        text=DataConfig(context=16, held_out=0.0),
    )  # fmt: skip
    x = torch.randn(2048, 16)
    trainee = Trainee(sae, x, steps=10, tokens=40_000, seed=0)
    if trainee.fused is None:
        pytest.skip("steps go through autograd here")
    plans = [replace(config, saes=(replace(sae, precision=precision),)) for precision in ("bf16", "fp32")]
    half, full = (uw.plan(c, model=tiny_model, data=texts, seconds=0) for c in plans)
    kept = [plan.buffer("weights, gradients and moments") for plan in (half, full)]
    assert kept[0] - kept[1] == 2 * 2048 * 16  # the encoder in bf16, which sparse steps have
    trainee.step(x)
    assert trainee.fused.dense
    pre = ((x * trainee.scale - trainee.sae.b_dec) @ trainee.sae.W_enc).detach().flatten()
    bias = -pre.kthvalue(round(0.962 * len(pre))).values.item()
    trainee.sae.b_enc.data.fill_(bias)
    trainee.step(x)
    assert not trainee.fused.dense
    trainee.sae.b_enc.data.fill_(bias)
    with Meter() as meter:
        trainee.step(x)
    assert half.buffer("step") / 1.5 < meter.peak < half.buffer("step") * 1.1


@pytest.mark.parametrize(
    ("changes", "free", "what"),
    [
        ({"buffer": 1 << 22}, 1 << 28, "268 MB of it for the ring: lower buffer"),
        ({"saes": (SAEConfig(1 << 20, TopK(4)),)}, 1 << 28, "for the weights, gradients and moments: lower d_sae"),
    ],
)
def test_what_cannot_fit_into_memory_is_refused_without_trying(
    config, tiny_model, texts, monkeypatch, changes, free, what
):
    monkeypatch.setattr(BUFFERS, "free_memory", lambda device: free)
    monkeypatch.setattr(PLAN, "new_trainee", lambda *args, **kwargs: pytest.fail("it was tried"))
    with pytest.raises(UnweaveError, match="the run needs .* of memory on cpu, where 268 MB are free, .*" + what):
        train(replace(config, **changes), model=tiny_model, data=texts, progress=False)
    assert not Path(config.out).exists()


def test_what_cannot_fit_onto_the_disk_is_refused(config, tiny_model, texts, monkeypatch):
    monkeypatch.setattr(PLAN, "free_disk", lambda path: 1000)
    with pytest.raises(UnweaveError, match=r"the run needs \d+ kB on disk for checkpoints and SAEs, .* has 1 kB free"):
        train(config, model=tiny_model, data=texts, progress=False)


def test_what_comes_one_after_the_other_counts_once():
    buffers = [
        Buffer("a", 10, "cpu"), Buffer("b", 5, "cpu", lasting=False), Buffer("c", 7, "cpu", lasting=False),
        Buffer("d", 100, "cuda:0"),
    ]  # fmt: skip
    assert peak(buffers, "cpu") == 17
    assert peak(buffers, "cuda:0") == 100


def test_the_command(config, tmp_path, capsys, monkeypatch):
    arguments = ["plan", "--tokens", "10000", "--d-sae", "64", "--batch-size", "512", "--seconds", "0"]
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "plan: 10,000 tokens in 20 steps, at h.1" in shown.replace("transformer.", "")
    assert "in float32" in shown
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(BUFFERS, "free_memory", lambda device: 1000)
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 2
    assert "lower prompts_per_pass" in capsys.readouterr().err


def test_sizes_and_durations_in_words():
    assert [size(n) for n in (999, 1000, 999_600, 2.5e9, 3e12)] == ["999 B", "1 kB", "1 MB", "2.5 GB", "3.0 TB"]
    assert [duration(s) for s in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


def test_free_memory_sees_an_allocation():
    program = (
        "import torch; from unweave.activations.limits import free_memory; a = free_memory(); "
        "x = torch.ones(1 << 28); print((a - free_memory()) / 2**30)"
    )
    tries = []  # other programs take and free memory meanwhile
    while len(tries) < 5 and not any(0.7 < seen < 1.3 for seen in tries):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        tries.append(float(done.stdout))
    assert any(0.7 < seen < 1.3 for seen in tries), tries


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limits = sys.modules["unweave.activations.limits"]
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (group / "a" / "b").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   9000000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    for folder, most in ((group / "a", "5000000"), (group / "a" / "b", "max")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text("3000000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    monkeypatch.setattr(limits, "_PROC", proc)
    monkeypatch.setattr(limits, "_CGROUP", group)
    assert free_memory() == 2_500_000
    (group / "a" / "memory.max").write_text("max\n")
    assert free_memory() == 9_000_000 * 1024
