"""Configurations that once were accepted and then failed, did nothing, or were planned and run differently."""

import dataclasses

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig
from unweave.objectives import L1, RandomMatryoshka, Schedule
from unweave.sae import ArchetypalDictionary, Crosscoder, MatchingPursuit, ReLU, TopK
from unweave.training import L0Controller, SAEConfig, TrainConfig, recipes, train, train_on
from unweave.training.finish import finished_sae, save_finished
from unweave.training.sites import Site
from unweave.training.sparsity import Sparsity
from unweave.training.trainee import Trainee

X = torch.randn(256, 12, generator=torch.Generator().manual_seed(0))


def trainee(config, **more):
    return Trainee(config, X, steps=20, tokens=5120, **{"seed": 0} | more)


@pytest.mark.parametrize(
    "config",
    [
        SAEConfig(d_sae=64, activation=TopK(4), dictionary=ArchetypalDictionary(n_points=64)),
        SAEConfig(d_sae=64, activation=TopK(4), normalize="whiten"),
        SAEConfig(d_sae=64, activation=TopK(4), W_dec_init="data"),
    ],
    ids=["archetypal", "whiten", "data"],
)
def test_the_plan_begins_with_as_many_activations_as_the_run(config, capsys):
    run = TrainConfig(saes=[config], batch_size=4, tokens=8, buffer=512, text=DataConfig(context=32))
    assert len(train(run, progress=True).saes) == 1
    capsys.readouterr()


def test_a_pursuit_that_starts_from_another_keeps_its_threshold():
    config = SAEConfig(d_sae=32, activation=MatchingPursuit(4, residual_threshold=2.0))
    finished = finished_sae(trainee(config), [X], {})
    again = trainee(config, start=finished)
    assert again.sae.activation.residual_threshold == 2.0
    assert finished.activation.residual_threshold == pytest.approx(2.0 / again.scale)


def test_folders_of_many_hooks_have_names_that_file_systems_take(tmp_path):
    sites = [Site(tuple(f"model.layers.{i}.post_feedforward_layernorm" for i in range(n))) for n in (12, 13)]
    names = [site.folder for site in sites]
    assert len(set(names)) == 2
    for name in names:
        (tmp_path / name).mkdir()
    assert Site(("h.0", "h.1")).folder == "h.0+h.1"


def test_a_controller_acts_wherever_it_is_accepted():
    with pytest.raises(UnweaveError, match="sparsity_warmup < 1"):
        dataclasses.replace(recipes.january_2025(64), l0_controller=L0Controller(4))
    config = SAEConfig(
        d_sae=64, activation=ReLU(), sparsity=L1(schedule=Schedule(1, 1)), l0_controller=L0Controller(4),
        sparsity_warmup=1.0,
    )  # fmt: skip
    sparsity = Sparsity(config, 12, 20)
    sparsity.observe(torch.tensor(30.0), 0)
    assert sparsity.controller.factor > 1


def test_the_training_form_has_the_coefficient_that_was_trained_with(tmp_path):
    import json

    config = SAEConfig(d_sae=32, activation=ReLU(), coder="transcoder")
    made = trainee(config, target=X[:, :7])
    save_finished(finished_sae(made, [X], {}), config, tmp_path)
    saved = json.loads((tmp_path / "training" / "cfg.json").read_text(encoding="utf-8"))
    assert saved["l1_coefficient"] == pytest.approx(made.sparsity.coefficient())


def test_any_seed_draws():
    config = SAEConfig(d_sae=32, activation=TopK(2), matryoshka=RandomMatryoshka(4))
    draws = [torch.rand(3, generator=trainee(config, seed=seed).draws()).tolist() for seed in (1, 2, 2**32, 2**62)]
    assert len(set(map(tuple, draws))) == 4


def test_every_hook_of_a_crosscoder_says_its_scale():
    config = SAEConfig(d_sae=32, activation=TopK(2), coder="crosscoder")
    (sae,) = train_on([{"a": X, "b": X, "c": 2 * X}], [config], hooks=["a", "b", "c"], progress=False)
    assert isinstance(sae, Crosscoder)
    a, b, c = sae.metadata["input_scale"]
    assert a == b == pytest.approx(2 * c)


def test_a_whole_k_may_be_written_as_a_float():
    sae = finished_sae(trainee(SAEConfig(d_sae=32, activation=TopK(4.0))), [X], {})
    assert sae.encode_sparse(X).l0().max() <= 4


def test_every_layer_of_a_cross_layer_transcoder_says_its_scales():
    config = SAEConfig(d_sae=32, activation=TopK(2), coder="clt")
    batch = {"x0": X, "x1": 2 * X, "y0": X[:, :7], "y1": 4 * X[:, :7]}
    (sae,) = train_on([batch], [config], hooks=["x0", "x1"], targets=["y0", "y1"], progress=False)
    x0, x1 = sae.metadata["input_scale"]
    y0, y1 = sae.metadata["target_scale"]
    assert x0 == pytest.approx(2 * x1)
    assert y0 == pytest.approx(4 * y1)
