"""saev 0.1 reads our shards, and we read those that it writes. Of a newer saev there is no release to compare with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from unweave.activations.cache.foreign import MappedStore
from unweave.activations.cache.saev import SaevShards
from unweave.activations.cache.saev_write import write_saev_shards

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D, PATCHES = 6, 4


@pytest.fixture(scope="module")
def saev() -> SimpleNamespace:
    """saev's modules. They import torchvision for data sets of images, which play no part here."""
    torchvision, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    torchvision.datasets, datasets.ImageFolder = datasets, object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.datasets", datasets)
        from saev import activations, config

    return SimpleNamespace(activations=activations, config=config)


def dataset_of(saev: SimpleNamespace, folder: Path, patches: str, layer: int) -> list[tuple[np.ndarray, int, int]]:
    """Activation, image and patch of each example that saev's reader finds."""
    config = saev.config.DataLoad(
        shard_root=str(folder), patches=patches, layer=layer, scale_mean=False, scale_norm=False
    )
    dataset = saev.activations.Dataset(config)
    examples = [dataset[i] for i in range(len(dataset))]
    return [(e["act"].numpy(), e["image_i"], e["patch_i"]) for e in examples]


@pytest.mark.parametrize("n", [23, 20])
def test_we_read_what_saev_writes(saev: SimpleNamespace, tmp_path: Path, n: int) -> None:
    """In batches that end across shards; 20 images fill the last shard, and leave one of zeros behind it."""
    layers, per_shard = [2, 5, 7], 5
    config = saev.config.Activations(
        data=saev.config.ImageFolderDataset(root=str(tmp_path)), dump_to=str(tmp_path / "shards"), d_vit=D,
        vit_layers=layers, n_patches_per_img=PATCHES, n_patches_per_shard=per_shard * 3 * (PATCHES + 1) + 2,
    )  # fmt: skip
    x = torch.randn(n, len(layers), PATCHES + 1, D)
    object.__setattr__(config, "data", SimpleNamespace(n_imgs=n))  # it would list the images of a folder
    writer = saev.activations.ShardWriter(config)
    for start in range(0, n, 7):
        writer[start : min(start + 7, n)] = x[start : start + 7]
    writer.flush()
    folder = Path(saev.activations.get_acts_dir(config))
    assert len(list(folder.glob("acts*.bin"))) == 5
    store = SaevShards(folder)
    assert store.hooks == ("layer.2", "layer.5", "layer.7")
    found = store.read(0, store.n_rows)
    for slot, hook in enumerate(store.hooks):
        assert torch.equal(found[hook].view(n, PATCHES + 1, D), x[:, slot])

    kinds, documents, positions = (store.records[name][:] for name in ("kinds", "documents", "positions"))
    for name, kind in (("patches", 0), ("cls", 1)):
        theirs = dataset_of(saev, folder, name, 5)
        rows = np.flatnonzero(kinds == kind)
        ours = store.gather(torch.from_numpy(rows), ["layer.5"])["layer.5"].numpy()
        assert np.array_equal(ours, np.stack([act for act, _, _ in theirs]))
        assert documents[rows].tolist() == [image for _, image, _ in theirs]
        assert (positions[rows] - 1).tolist() == [patch for _, _, patch in theirs]  # of CLS tokens: -1


@pytest.mark.parametrize("n", [23, 20])
def test_saev_reads_what_we_write(saev: SimpleNamespace, tmp_path: Path, n: int) -> None:
    kinds = np.array([1, 2, 2, 0, 0, 0, 0], np.uint8)  # CLS, two registers, four patches
    x = {hook: torch.randn(n * len(kinds), D) for hook in ("blocks.10", "blocks.9")}
    records = {
        "documents": np.repeat(np.arange(n), len(kinds)),
        "positions": np.tile(np.arange(len(kinds)), n),
        "kinds": np.tile(kinds, n),
    }
    source = MappedStore("images", {hook: [rows] for hook, rows in x.items()}, records, None)
    folder = write_saev_shards(
        source, tmp_path, family="dinov2", ckpt="some/vit", dataset="images", protocol="1", max_tokens_per_shard=53
    )
    metadata = saev.activations.Metadata.load(folder / "metadata.json")
    assert (metadata.n_imgs, metadata.layers, metadata.d_vit, metadata.cls_token) == (n, (9, 10), D, True)
    assert metadata.hash == folder.name
    for hook, layer in (("blocks.9", 9), ("blocks.10", 10)):
        images = x[hook].view(n, len(kinds), D)
        for name, kept in (("cls", images[:, :1]), ("patches", images[:, 3:])):
            theirs = dataset_of(saev, folder, name, layer)
            assert np.array_equal(np.stack([act for act, _, _ in theirs]), kept.reshape(-1, D).numpy())
            assert [image for _, image, _ in theirs] == np.repeat(np.arange(n), kept.shape[1]).tolist()
