"""The loop: what it counts, what it keeps alive, when it saves, and how often it waits for the device."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unweave.training.trainer as trainer
from unweave._errors import UnweaveError
from unweave.sae import AbsTopK, BatchTopK, ReLU, TopK
from unweave.training import SAEConfig, train_on
from unweave.training.trainee import StepSums, Trainee
from unweave.training.trainer import LOG_EVERY, Run, fit

D, M = 12, 30


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"": torch.randn(n, D, generator=generator)} for n in sizes]


def run_of(tokens, *configs, kind=Trainee):
    sample = batches(200)[0][""]
    trainees = [kind(config, sample, steps=50, tokens=tokens, seed=0) for config in configs]
    return Run({"": trainees}, tokens)


def test_latents_stay_dead_from_one_epoch_to_the_next():
    """pitfall_110, pitfall_125: the tokens that were seen count, in short batches too, and nothing starts again."""
    run, epoch = run_of(3 * 150, SAEConfig(d_sae=M, activation=TopK(3), dead_after=400)), batches(64, 64, 22)
    (trainee,) = run.trainees[""]
    with torch.no_grad():
        trainee.sae.b_enc[7] = -1000.0
    counts = []
    fit(run, iter(3 * epoch), progress=False, after_step=lambda: counts.append(int(trainee.tokens_since_fired[7])))
    assert counts == [64, 128, 150, 214, 278, 300, 364, 428, 450]
    assert trainee.dead[7]
    assert run.seen == 450


def test_checkpoints_are_due_in_tokens(tmp_path, monkeypatch):
    """pitfall_159: every 250 tokens, at the first step that has seen them, whatever the size of a batch."""
    saved = []

    def save(folder, step, state):
        saved.append((step, state["run"]["seen"]))

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    run = run_of(1000, SAEConfig(d_sae=M, activation=TopK(3)))
    run.out = tmp_path
    fit(run, iter(batches(*10 * [100])), progress=False, checkpoint_every=250)
    assert saved == [(3, 300), (6, 600), (9, 900)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("threshold_batches"), "lacks 'threshold_batches': another version of unweave"),
        (lambda state: state["sae"].pop("b_enc"), "lacks 'b_enc'"),
        (lambda state: state.update(later=1), "has an unknown 'later'"),
    ],
)
def test_a_checkpoint_of_another_version_is_one_sentence(change, message):
    run = run_of(1000, SAEConfig(d_sae=M, activation=BatchTopK(3)))
    run.load_state_dict(run.state_dict())
    state = run.state_dict()
    change(state["trainees"][""][0])
    with pytest.raises(UnweaveError, match=message):
        run.load_state_dict(state)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("activation", [TopK(3), AbsTopK(3)], ids=["fused", "autograd"])
def test_one_graph_is_alive_at_a_time(activation, monkeypatch):
    """pitfall_167: of eight SAEs, each begins its step after the graphs of those before it are gone."""
    alive, kept, found, step = weakref.WeakSet(), [0], [], Trainee.step

    def keep(tensor):
        alive.add(saved := Saved(tensor))
        kept[0] += 1
        return saved

    def counted(*args):
        found.append(len(alive))
        return step(*args)

    monkeypatch.setattr(Trainee, "step", counted)
    run = run_of(200, *8 * [SAEConfig(d_sae=M, activation=activation)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        fit(run, iter(batches(100, 100)), progress=False)
    assert found == 16 * [0]
    assert (kept[0] > 0) == (activation != TopK(3))  # the fused step has no graph at all
    assert all(p.grad is None for trainee in run.trainees[""] for p in trainee.sae.parameters())


class Waits(TorchDispatchMode):
    """How often a number leaves the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Idle(Trainee):
    """Takes no step, so that what is counted is the loop's."""

    def step(self, x, target=None):
        self.step_count += 1
        return StepSums(*torch.ones(6).unbind())


def test_metrics_leave_the_device_once_for_each_logged_row():
    """pitfall_039, pitfall_172: what a step adds up stays there; whether a batch is finite is asked once a step."""
    steps = 2 * LOG_EVERY
    run = run_of(steps * 10, SAEConfig(d_sae=M, activation=TopK(3)), kind=Idle)
    with Waits() as waits:
        fit(run, iter(batches(*steps * [10])), progress=False)
    assert len(run.history) == 2
    assert waits.count <= steps + 3 * len(run.history)


def test_no_more_activations_are_read_than_are_trained_on():
    """pitfall_138: scales come from the first batch, which is trained on as well, and from nothing else."""
    read = []

    def stream():
        for i, batch in enumerate(batches(*100 * [50])):
            read.append(i)
            yield batch[""]

    for normalize in ("scalar", "center", "whiten"):
        read.clear()
        config = SAEConfig(d_sae=M, activation=ReLU(), normalize=normalize)
        (sae,) = train_on(stream(), [config], tokens=200, progress=False)
        assert read == [0, 1, 2, 3]
        assert sae.metadata["training_steps"] == 4
