"""Worlds by name and from TOML, and what SAEs recover of those that ship."""

import pytest
import torch

from unweave import BatchTopK, SAEConfig, TopK, UnweaveError
from unweave.synthetic.hierarchy import HierarchyConfig
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.model_config import SyntheticModelConfig
from unweave.synthetic.probabilities import ConstantFiringProbabilityConfig
from unweave.synthetic.study import SAMPLED, score, short_names, superposition_of, train_saes
from unweave.synthetic.survey import expected_of
from unweave.synthetic.worlds import World, load_world, world_names

NAMES = ["correlated", "hierarchical", "independent", "superposed_1m", "zipfian"]
MODEL = {"num_features": 4, "hidden_dim": 3}


def test_the_worlds_that_ship():
    assert world_names() == NAMES
    for name in NAMES:
        world = load_world(name)
        assert world.name == name
        assert world.description
        assert len(world.saes) == {"independent": 2, "superposed_1m": 0}.get(name, 3)
        assert World.from_dict(name, {k: v for k, v in world.to_dict().items() if k != "name"}) == world


@pytest.mark.parametrize("name", [name for name in NAMES if name != "superposed_1m"])
def test_worlds_can_be_built_as_requested(name):
    """No warning (they are errors here): all requests can be met."""
    world = load_world(name)
    model = SyntheticModel(world.model)
    x, features = model.sample_with_features(64)
    assert x.shape == (64, world.model.hidden_dim)
    assert features.shape == (64, world.model.num_features)


def test_the_million():
    """Mean L0 50 of a million features in 512 dimensions, by its probabilities alone."""
    model = load_world("superposed_1m").model
    assert (model.num_features, model.hidden_dim) == (1_000_000, 512)
    assert float(model.firing_probability.generate(1_000_000).double().sum()) == pytest.approx(50, abs=0.1)


def test_a_world_in_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        samples = 10
        [model]
        num_features = 20
        hidden_dim = 6
        firing_probability = { generator_name = "constant", probability = 0.2 }
        hierarchy = { total_root_nodes = 2, branching_factor = [2, 3], max_depth = 1 }
        [[saes]]
        d_sae = 10
        activation = { type = "topk", k = 2 }
        """
    )
    world = load_world(path)
    assert world == World(
        "mine",
        SyntheticModelConfig(
            20, 6, ConstantFiringProbabilityConfig(0.2), HierarchyConfig(2, (2, 3), 1), seed=0
        ),
        (SAEConfig(10, TopK(2)),),
        samples=10,
    )  # fmt: skip


def test_a_world_without_a_seed_has_0():
    assert World("w", SyntheticModelConfig(4, 3)).model.seed == 0
    assert World("w", SyntheticModelConfig(4, 3, seed=7)).model.seed == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": MODEL}, "'modle'; did you mean 'model'"),
        ({}, r"needs a table \[model\]"),
        ({"model": 3}, r"needs a table \[model\]"),
        ({"model": MODEL | {"hidden": 3}}, "'hidden'; did you mean 'hidden_dim'"),
        ({"model": {"hidden_dim": 3}}, "num_features.*missing"),
        ({"model": MODEL | {"num_features": 0}}, "num_features.*0"),
        ({"model": MODEL | {"firing_probability": {"generator_name": "zipf"}}}, "did you mean 'zipfian'"),
        ({"model": MODEL | {"hierarchy": {"depth": 3}}}, "depth"),
        ({"model": MODEL, "saes": [{"k": 3}]}, r"saes\[0\]\.k"),
        ({"model": MODEL, "saes": [{"d_sea": 3}]}, r"'saes\[0\]\.d_sea'; did you mean"),
        ({"model": MODEL, "saes": [{"activation": {"type": "topk", "k": 5}, "d_sae": 4}]}, "k=5.*4"),
        ({"model": MODEL, "saes": {"d_sae": 3}}, "list of tables"),
        ({"model": MODEL, "samples": 0}, "samples.*0"),
        ({"model": MODEL, "batch_size": 1.5}, "batch_size.*1.5"),
        ({"model": MODEL, "training_samples": "many"}, "training_samples.*many"),
    ],
)
def test_bad_worlds(values, message):
    with pytest.raises(UnweaveError, match=message):
        World.from_dict("w", values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zipfain", None, "no world 'zipfain'; did you mean 'zipfian'"),
        ("xyz", None, "there are correlated, .*, or name a TOML file"),
        ("missing.toml", None, "missing.toml.*cannot be read"),
        ("broken.toml", b"[model", "broken.toml.*cannot be read"),
        ("binary.toml", b"\xff\xfe", "binary.toml.*cannot be read"),
    ],
)
def test_worlds_that_cannot_be_read(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnweaveError, match=message):
        load_world(name)


def test_short_names_tell_saes_apart():
    config = SAEConfig(64, TopK(3))
    assert short_names([config]) == ["TopK(k=3)"]
    assert short_names([config, SAEConfig(128, TopK(3))]) == ["TopK(k=3), 64", "TopK(k=3), 128"]
    assert short_names([config, SAEConfig(64, TopK(3), lr=1.0), SAEConfig(64, BatchTopK(3))]) == [
        "0: TopK(k=3)", "1: TopK(k=3)", "BatchTopK(k=3)",
    ]  # fmt: skip


def test_overlap_of_many_features_is_that_of_a_sample(monkeypatch):
    monkeypatch.setattr("unweave.synthetic.study.ALL_PAIRS", 500)
    model = SyntheticModel(SyntheticModelConfig(600, 8, seed=0))
    rates = expected_of(model).rates
    assert len(superposition_of(model, rates).feature_indices) == SAMPLED
    monkeypatch.setattr("unweave.synthetic.study.ALL_PAIRS", 600)
    whole = superposition_of(model, rates)
    assert len(whole.feature_indices) == 600
    vectors = torch.nn.functional.normalize(model.feature_dict.feature_vectors, dim=1)
    cosines = (vectors @ vectors.T).fill_diagonal_(0)
    torch.testing.assert_close(whole.max_abs_cos_sims, cosines.abs().amax(1), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mcc", "f1"),
    # Of every SAE of the world, in its order; what is lost below 1 is the architecture's, not the world's.
    [
        ("independent", [0.99, 0.99], [0.92, 0.99]), ("zipfian", [0.98, 0.9, 0.93], [0.83, 0.85, 0.8]),
        ("correlated", [0.97, 0.85, 0.93], [0.75, 0.83, 0.85]), ("hierarchical", [0.7, 0.8, 0.8], [0.7, 0.8, 0.8]),
    ],
)  # fmt: skip
def test_saes_recover_the_worlds(name, mcc, f1):
    world = load_world(name)
    model = SyntheticModel(world.model)
    saes, history = train_saes(world, model, progress=False)
    scores = [score(world, model, sae) for sae in saes]
    assert history[-1]["tokens"] == world.training_samples
    assert all(s.mcc >= least for s, least in zip(scores, mcc, strict=True)), [s.mcc for s in scores]
    found = [s.classification.f1_score for s in scores]
    assert all(s >= least for s, least in zip(found, f1, strict=True)), found
