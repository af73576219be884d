"""`open_cache` knows other libraries' caches, and everything that reads a store reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import unweave as uw
from unweave import UnweaveError
from unweave.activations.cache import (
    OrderedBatches,
    SaelensCache,
    SaevShards,
    Selection,
    StoreBatches,
    is_cache,
    open_cache,
)

D = 8


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Nine images at two layers, four to a file: a CLS token and three patches."""
    folder = tmp_path / "shards"
    folder.mkdir()
    x = np.random.default_rng(0).standard_normal((12, 2, 4, D), dtype=np.float32)
    for i in range(3):
        x[4 * i : 4 * i + 4].tofile(folder / f"acts{i:06d}.bin")
    metadata = {
        "family": "clip", "ckpt": "vit", "layers": [3, 5], "content_tokens_per_example": 3, "cls_token": True,
        "d_model": D, "n_examples": 9, "max_tokens_per_shard": 32, "dtype": "float32", "protocol": "2.1",
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "shards.json").write_text(
        json.dumps([{"name": f"acts{i:06d}.bin", "n_examples": n} for i, n in enumerate((4, 4, 1))])
    )
    return folder


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """Six sequences of ten tokens, the first of each with the id 0."""
    folder = tmp_path / "sequences"
    folder.mkdir()
    x, ids = torch.randn(6, 10, D), torch.arange(10).expand(6, 10)
    table = pa.table({"h.1": pa.array(x.tolist(), pa.list_(pa.list_(pa.float32()))), "token_ids": ids.tolist()})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    features = {"h.1": {"_type": "Array2D", "shape": [10, D], "dtype": "float32"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def test_each_is_recognised(shards: Path, sequences: Path) -> None:
    assert is_cache(shards)
    assert is_cache(str(sequences))
    assert isinstance(open_cache(shards), SaevShards)
    assert isinstance(open_cache(str(sequences)), SaelensCache)
    for folder in (shards, sequences):
        with pytest.raises(UnweaveError, match="cannot be verified"):
            open_cache(folder, verify=True)


def test_what_is_damaged_is_recognised_and_refused(shards: Path, sequences: Path, tmp_path: Path) -> None:
    (shards / "metadata.json").write_text("{")
    (tmp_path / "unfinished" / ".tmp_shards").mkdir(parents=True)
    (sequences / "data.arrow").unlink()
    for folder, message in (
        (shards, r"metadata\.json cannot be read"),
        (tmp_path / "unfinished", "never finished"),
        (sequences, r"data\.arrow is missing"),
    ):
        assert is_cache(folder)
        with pytest.raises(UnweaveError, match=message):
            open_cache(folder)


@pytest.mark.parametrize("files", [{}, {"metadata.json": "{}"}, {"metadata.json": "x"}, {"state.json": "{}"}])
def test_other_folders_are_none(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert not is_cache(tmp_path)
    with pytest.raises(UnweaveError, match="is no cache"):
        open_cache(tmp_path)


def test_a_saved_data_set_of_text_is_none(tmp_path: Path) -> None:
    """It is text to train on."""
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "text")
    assert not is_cache(tmp_path / "text")


def test_patches_are_drawn_without_cls_tokens(shards: Path) -> None:
    store = SaevShards(shards)
    rows = store.read(0, store.n_rows)["layer.5"].view(9, 4, D)
    for kind, expected in (("cls", rows[:, 0]), ("patch", rows[:, 1:].reshape(-1, D))):
        batches = StoreBatches(store, 8, 8, selection=Selection(only_kinds=[kind]), hooks=["layer.5"])
        found = torch.cat([batch["layer.5"] for batch in batches])
        assert torch.equal(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_tokens_are_selected_by_id_and_position(sequences: Path) -> None:
    store = SaelensCache(sequences, special_ids={0: "<s>"})
    x = store.read(0, 60)["h.1"].view(6, 10, D)
    for selection in (Selection(without_special=True), Selection(positions="1:")):
        batches = OrderedBatches(store, 9, selection=selection)
        assert torch.equal(torch.cat([batch.activations["h.1"] for batch in batches]), x[:, 1:].reshape(-1, D))
    with pytest.raises(UnweaveError, match="does not say which tokens are special"):
        StoreBatches(SaelensCache(sequences), 8, 8, selection=Selection(without_special=True))


def test_saes_are_trained_on_them(shards: Path, sequences: Path, tmp_path: Path) -> None:
    for folder, hooks in ((shards, ("layer.3", "layer.5")), (sequences, ("h.1",))):
        sae = uw.SAEConfig(d_sae=16, activation=uw.TopK(k=4))
        config = uw.TrainConfig(
            data=str(folder), hooks=hooks, tokens=64, batch_size=16, saes=[sae], out=str(tmp_path / folder.name / "run")
        )
        result = uw.train(config)
        assert [sae.metadata["hook_name"] for sae in result.saes] == list(hooks)
        with pytest.raises(UnweaveError, match=r"holds no activations at 'resid_post\.1'"):
            uw.train(uw.TrainConfig(data=str(folder), saes=[sae], out=str(tmp_path / "none")))
