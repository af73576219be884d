from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave import UnweaveError
from unweave.synthetic import files
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.files import (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
)
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig
from unweave.synthetic.magnitudes import FoldedNormalMagnitudeConfig
from unweave.synthetic.model import LowRankCorrelationConfig, SyntheticModel, SyntheticModelConfig
from unweave.synthetic.modifier import hierarchy_modifier
from unweave.synthetic.node import HierarchyNode
from unweave.synthetic.probabilities import RandomFiringProbabilityConfig

K, D = 30, 12


def config(**options: Any) -> SyntheticModelConfig:
    return SyntheticModelConfig(K, D, RandomFiringProbabilityConfig(0.5, 0.1), **options)


HIERARCHY = HierarchyConfig(4, 3, 2, mutually_exclusive_portion=1.0, compensate_probabilities=False)
RANDOM = {
    "std_firing_magnitudes": FoldedNormalMagnitudeConfig(0.3, 0.1),
    "mean_firing_magnitudes": FoldedNormalMagnitudeConfig(1.0, 0.2),
}


def correlated() -> torch.Tensor:
    matrix = torch.eye(K)
    matrix[0, 1] = matrix[1, 0] = 0.7
    return matrix


MODELS = {
    "plain": lambda: SyntheticModel(config()),
    "seeded": lambda: SyntheticModel(config(seed=5)),
    "everything": lambda: SyntheticModel(
        config(hierarchy=HIERARCHY, correlation=LowRankCorrelationConfig(3), **RANDOM)
    ),
    "full-matrix": lambda: SyntheticModel(config(**RANDOM), correlation_matrix=correlated()),
    "own-parts": lambda: SyntheticModel(
        config(bias=False),
        FeatureDictionary(K, D, bias=2.0),
        ActivationGenerator(K, torch.linspace(0.1, 1, K), torch.rand(K), seed=2**64 - 3),
    ),
    "own-hierarchy": lambda: SyntheticModel(
        config(), hierarchy=Hierarchy([HierarchyNode(0, [HierarchyNode(i) for i in (3, 4)], True, feature_id="a")])
    ),
    "bfloat16": lambda: SyntheticModel(config(dtype="bfloat16", **RANDOM)),
}


def fresh(model: SyntheticModel) -> SyntheticModel:
    return model.fork(model.activation_generator.seed)


def assert_same_stream(one: SyntheticModel, other: SyntheticModel) -> None:
    for _ in range(2):
        (x, f), (y, g) = one.sample_with_features(40), other.sample_with_features(40)
        assert x.dtype == y.dtype
        assert torch.equal(f, g)
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("used", [False, True])
def test_a_loaded_model_samples_from_the_start_of_the_stream(tmp_path: Path, name: str, used: bool) -> None:
    """pitfall_346 and D-SY-2: no seed is needed for magnitudes, thresholds and survivors to come back."""
    model = MODELS[name]()
    expected = fresh(model)
    if used:
        model.sample(25)
        model.to("cpu")
    assert model.save(tmp_path / "m") == tmp_path / "m"
    loaded = SyntheticModel.load_from_disk(tmp_path / "m")
    assert loaded.cfg == model.cfg
    assert loaded.hierarchy == model.hierarchy
    assert loaded.activation_generator.seed == model.activation_generator.seed
    assert_same_stream(loaded, expected)


def test_it_can_be_saved_again_and_is_the_same(tmp_path: Path) -> None:
    model = MODELS["everything"]()
    loaded = SyntheticModel(model.save(tmp_path / "a"))
    loaded.save(tmp_path / "b")
    for name in (
        SYNTHETIC_MODEL_CONFIG_FILENAME, SYNTHETIC_MODEL_HIERARCHY_FILENAME, SYNTHETIC_MODEL_WEIGHTS_FILENAME,
    ):  # fmt: skip
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_that_was_cast(tmp_path: Path) -> None:
    model = MODELS["plain"]().to(torch.float64)
    loaded = SyntheticModel.load_from_disk(model.save(tmp_path))
    assert loaded.cfg.dtype == "float64"
    assert_same_stream(loaded, fresh(model))


def test_sources(tmp_path: Path) -> None:
    model = MODELS["seeded"]()
    model.save(tmp_path / "repo" / "m")
    for loaded in (
        SyntheticModel.load_from_source(config(seed=5)),
        SyntheticModel.load_from_source(tmp_path / "repo" / "m"),
        SyntheticModel.from_pretrained(str(tmp_path / "repo"), "m"),
        SyntheticModel.from_pretrained(tmp_path / "repo" / "m"),
        SyntheticModel(str(tmp_path / "repo" / "m")),
    ):
        assert_same_stream(loaded, fresh(model))
    with pytest.raises(UnweaveError, match="takes no feature_dict"):
        SyntheticModel(tmp_path / "repo" / "m", FeatureDictionary(K, D))


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    MODELS["everything"]().save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "hierarchy.json", "synthetic_model.safetensors", "synthetic_model_config.json",
    ]  # fmt: skip
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / SYNTHETIC_MODEL_WEIGHTS_FILENAME).items()} == {
        "feature_vectors": (K, D), "bias": (D,), "firing_probabilities": (K,), "correlation_factor": (K, 3),
        "correlation_diag": (K,), "mean_firing_magnitudes": (K,), "std_firing_magnitudes": (K,),
        "generator_seed": (1,),
    }  # fmt: skip


def test_a_hierarchy_that_was_there_before_goes(tmp_path: Path) -> None:
    MODELS["everything"]().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    MODELS["plain"]().save(tmp_path)
    assert SyntheticModel.load_from_disk(tmp_path).hierarchy is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["plain"]()
    model.save(tmp_path)

    def half(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        path.write_bytes(b"half a file")
        raise UnweaveError("no space")

    monkeypatch.setattr(files, "write_tensors", half)
    with pytest.raises(UnweaveError, match="no space"):
        MODELS["plain"]().save(tmp_path)
    assert_same_stream(SyntheticModel.load_from_disk(tmp_path), fresh(model))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("modifier", [lambda batch: batch, hierarchy_modifier(HierarchyNode(0, [HierarchyNode(1)]))])
def test_modifiers_that_no_file_holds_are_refused(tmp_path: Path, modifier: Any) -> None:
    model = SyntheticModel(config(), activation_generator=ActivationGenerator(K, 0.2, modify_activations=modifier))
    with pytest.raises(UnweaveError, match="cannot be saved, as no file can hold its modifiers"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def strip(folder: Path, *names: str) -> None:
    """Take tensors out of the weights."""
    path = folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME
    save_file({k: v for k, v in load_file(path).items() if k not in names}, path)


OURS = ("mean_firing_magnitudes", "std_firing_magnitudes", "generator_seed")


def test_files_without_our_tensors_get_their_magnitudes_from_the_seed(tmp_path: Path) -> None:
    model = SyntheticModel(config(seed=8, **RANDOM))
    strip(model.save(tmp_path), *OURS)
    assert_same_stream(SyntheticModel.load_from_disk(tmp_path), fresh(model))


def test_random_magnitudes_that_are_lost_are_not_made_up_silently(tmp_path: Path) -> None:
    strip(SyntheticModel(config(**RANDOM)).save(tmp_path), *OURS)
    with (
        pytest.warns(UserWarning, match="saved without its std_firing_magnitudes, which are random"),
        pytest.warns(UserWarning, match="saved without its mean_firing_magnitudes, which are random"),
    ):
        SyntheticModel.load_from_disk(tmp_path)
    strip(MODELS["plain"]().save(tmp_path), *OURS)
    SyntheticModel.load_from_disk(tmp_path)  # nothing lost, and so no warning


def edit(name: str, change: Any) -> Any:
    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def reshape(folder: Path) -> None:
    path = folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME
    save_file(load_file(path) | {"bias": torch.zeros(D + 1)}, path)


def impossible(folder: Path) -> None:
    path = folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME
    save_file(load_file(path) | {"firing_probabilities": torch.zeros(K)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SYNTHETIC_MODEL_CONFIG_FILENAME).unlink(), "synthetic_model_config.json is missing"),
        (lambda f: (f / SYNTHETIC_MODEL_WEIGHTS_FILENAME).unlink(), "synthetic_model.safetensors is missing"),
        (lambda f: (f / SYNTHETIC_MODEL_HIERARCHY_FILENAME).unlink(), "hierarchy.json is missing"),
        (lambda f: (f / SYNTHETIC_MODEL_CONFIG_FILENAME).write_text("{"), "is damaged"),
        (lambda f: (f / SYNTHETIC_MODEL_CONFIG_FILENAME).write_text("[]"), "holds a list"),
        (lambda f: (f / SYNTHETIC_MODEL_WEIGHTS_FILENAME).write_bytes(b"\x00" * 9), "is damaged"),
        (lambda f: (f / SYNTHETIC_MODEL_HIERARCHY_FILENAME).write_text("{}"), "needs the key 'roots'"),
        (edit(SYNTHETIC_MODEL_CONFIG_FILENAME, lambda c: c.update(hiden_dim=3)), "did you mean 'hidden_dim'"),
        (edit(SYNTHETIC_MODEL_CONFIG_FILENAME, lambda c: c.update(hidden_dim=3)), r"the shape \(30, 12\)"),
        (lambda f: strip(f, "bias"), "lacks the tensor 'bias'"),
        (lambda f: strip(f, "correlation_diag"), "lacks the tensor 'correlation_diag'"),
        (lambda f: strip(f, "correlation_diag", "correlation_factor"), "lacks the tensor 'correlation_factor'"),
        (reshape, r"bias .* has the shape \(13,\), and its config says \(12,\)"),
        (impossible, r"cannot be used: firing_probabilities must be in \(0, 1\]"),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Any, message: str) -> None:
    MODELS["everything"]().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UnweaveError, match=message):
        SyntheticModel.load_from_disk(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    MODELS["plain"]().save(tmp_path / "worlds")
    with pytest.raises(UnweaveError, match=r"the folder is missing; did you mean 'worlds'\?$"):
        SyntheticModel.from_pretrained(tmp_path / "world")
    with pytest.raises(UnweaveError, match=r"'someone/else' cannot be reached .* nothing of 'someone/else'"):
        SyntheticModel.from_pretrained("someone/else")
