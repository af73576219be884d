"""A whole run: what is in the folder, that a resumed run ends where it would have, and what is refused."""

import dataclasses
import json
import signal

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, TopK
from unweave.synthetic.hierarchy import HierarchyConfig
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.model_config import SyntheticModelConfig
from unweave.synthetic.runner import SyntheticSAERunner
from unweave.synthetic.runner_config import SyntheticSAERunnerConfig
from unweave.synthetic.scores import eval_sae_on_synthetic_data
from unweave.training import TrainingInterrupted
from unweave.training.config import SAEConfig
from unweave.training.trainee import Trainee

WORLD = SyntheticModelConfig(num_features=24, hidden_dim=16, std_firing_magnitudes=0.1, seed=0)
ONE = SAEConfig(d_sae=24, activation=TopK(3), lr=1e-2)
TWO = [ONE, SAEConfig(d_sae=16, activation=BatchTopK(3))]


def config(out, sae=ONE, world=WORLD, **kwargs):
    values = {"training_samples": 3000, "batch_size": 100, "eval_samples": 500, **kwargs}
    return SyntheticSAERunnerConfig(world, sae, output_path=None if out is None else str(out), **values)


def run(cfg, **kwargs):
    return SyntheticSAERunner(cfg).run(progress=False, **kwargs)


def test_one_sae_lies_in_the_folder(tmp_path):
    out = tmp_path / "run"
    result = run(config(out, save_synthetic_model=True, n_checkpoints=2))
    assert {p.name for p in out.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "training", "runner_config.json", "eval_stats.json", "metrics.jsonl",
        "synthetic_model",
    }  # fmt: skip
    assert (result.output_path, result.folders) == (out, [out])
    assert torch.equal(SAE.load(out).W_dec, result.sae.W_dec)
    stats = json.loads((out / "eval_stats.json").read_text())
    assert stats == json.loads(json.dumps(result.final_eval.to_dict()))
    world = SyntheticModel.load_from_disk(out / "synthetic_model")
    again = eval_sae_on_synthetic_data(SAE.load(out), world.feature_dict, world.activation_generator, 500)
    assert again == result.final_eval
    kept = SyntheticSAERunnerConfig.from_dict(json.loads((out / "runner_config.json").read_text()))
    assert kept == config(out, save_synthetic_model=True, n_checkpoints=2)


def test_several_saes_have_a_folder_each(tmp_path):
    result = run(config(tmp_path / "run", TWO))
    assert [str(f.relative_to(tmp_path)) for f in result.folders] == ["run/saes/00_topk", "run/saes/01_batchtopk"]
    for sae, scores, folder in zip(result.saes, result.evals, result.folders, strict=True):
        assert SAE.load(folder).d_sae == sae.d_sae
        assert json.loads((folder / "eval_stats.json").read_text())["mcc"] == scores.mcc
    assert result.final_eval is result.evals[0]
    assert result.sae is result.saes[0]
    alone = run(config(None, ONE))
    assert torch.equal(alone.sae.W_dec, result.sae.W_dec)
    kept = SyntheticSAERunnerConfig.from_dict(json.loads((tmp_path / "run" / "runner_config.json").read_text()))
    assert kept.saes == TWO


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(config(None, run_final_eval=False))
    assert list(tmp_path.iterdir()) == []
    assert (result.output_path, result.folders, result.final_eval) == (None, [], None)
    assert result.history


def stop_after(monkeypatch, step):
    """As Ctrl-C does, in the middle of a run."""
    taken, stopped = Trainee.step, []

    def counted(self, x, target=None):
        sums = taken(self, x, target)
        if self.step_count == step and not stopped:
            stopped.append(step)
            signal.raise_signal(signal.SIGINT)
        return sums

    monkeypatch.setattr(Trainee, "step", counted)


@pytest.mark.parametrize("hierarchy", [None, HierarchyConfig(2, 3, 1, mutually_exclusive_portion=1.0)])
@pytest.mark.parametrize("seed", [0, None])
def test_a_resumed_run_ends_where_it_would_have(tmp_path, monkeypatch, hierarchy, seed):
    """Also of a world without a seed, if it was saved; evaluations during the run included."""
    world = dataclasses.replace(WORLD, hierarchy=hierarchy, seed=seed)
    out = tmp_path / "run"
    cfg = config(out, TWO, world, eval_frequency=10, save_synthetic_model=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 15)
        with pytest.raises(TrainingInterrupted, match="resume=True"):
            run(cfg)
    model = SyntheticModel.load_from_disk(out / "synthetic_model")
    resumed = run(cfg, resume=True)
    whole = SyntheticSAERunner(config(None, TWO, world, eval_frequency=10), model).run(progress=False)
    for a, b in zip(resumed.saes, whole.saes, strict=True):
        assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert resumed.evals == whole.evals
    assert resumed.eval_history == whole.eval_history
    assert [(row["step"], row["sae"]) for row in resumed.eval_history] == [(s, i) for s in (10, 20, 30) for i in (0, 1)]
    assert json.loads((out / "eval_history.json").read_text()) == resumed.eval_history
    assert resumed.evals[0].hierarchy is None if hierarchy is None else resumed.evals[0].hierarchy.num_edges > 0
    assert not (out / "checkpoints").exists()


def test_what_cannot_be_resumed(tmp_path, monkeypatch):
    with pytest.raises(UnweaveError, match="without an output folder"):
        run(config(None), resume=True)
    with pytest.raises(UnweaveError, match="no checkpoint"):
        run(config(tmp_path / "nothing"), resume=True)
    unseeded = dataclasses.replace(WORLD, seed=None)
    for world, change, message in (
        (WORLD, {"batch_size": 50}, "batch_size=100, so it cannot go on with 50"),
        (unseeded, {}, "another synthetic model: give its config a seed"),
    ):
        out = tmp_path / str(world.seed)
        with monkeypatch.context() as patch:
            stop_after(patch, 15)
            with pytest.raises(TrainingInterrupted):
                run(config(out, world=world))
        with pytest.raises(UnweaveError, match=message):
            run(config(out, world=world, **change), resume=True)


def test_a_folder_that_is_in_use(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UnweaveError, match=r"not empty; pass resume=True or overwrite=True"):
        run(config(out))
    run(config(out, TWO), overwrite=True)
    run(config(out, run_final_eval=False), overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "mine.txt", "cfg.json", "sae_weights.safetensors", "training", "runner_config.json", "metrics.jsonl",
    }  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(UnweaveError, match="is a file"):
        run(config(tmp_path / "file"))


def test_an_sae_and_a_world_of_ones_own():
    world = SyntheticModel(WORLD)
    start = SAE(16, 24, TopK(3))
    before = start.W_dec.clone()
    result = SyntheticSAERunner(config(None, training_samples=100), world, start).run(progress=False)
    assert result.synthetic_model is world
    assert torch.equal(start.W_dec, before)  # a copy was trained
    assert torch.cosine_similarity(result.sae.W_dec, before, dim=1).min() > 0.99
    with pytest.raises(UnweaveError, match="override_sae is one SAE, and the run has 2"):
        SyntheticSAERunner(config(None, TWO), world, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_samples": 0}, "training_samples .*0"),
        ({"n_checkpoints": -1}, "n_checkpoints .*-1"),
        ({"sae": []}, "no SAE"),
        ({"lr_decay_steps": 31}, "lr_decay_steps is 31, and the run has 30 steps"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(UnweaveError, match=message):
        config(None, **change)


def test_unknown_settings():
    values = config(None).to_dict()
    with pytest.raises(UnweaveError, match=r"'trainig_samples'.*'training_samples'"):
        SyntheticSAERunnerConfig.from_dict({**values, "trainig_samples": 3})
