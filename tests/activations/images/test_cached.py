"""Activations of images in a cache: aligned with their images, refused under another processor, trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unweave as uw
from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, ImageRows
from unweave.activations.cache.shards import ShardWriter
from unweave.activations.images.prepare import Preparation
from unweave.models import LoadedModel, capture, resolve_hooks

Pictures = Callable[..., list[Image.Image]]


def test_a_cache_holds_what_the_model_gives(vit: LoadedModel, pictures: Pictures, tmp_path: Path) -> None:
    data = pictures(30)
    config = ImageConfig(held_out=0.2)
    made = uw.cache(
        data, tmp_path / "cache", hooks=["resid_post.0", "mlp_out.1"], tokens=60, model=vit, dtype="float32",
        config=config, prompts_per_pass=4, held_out_tokens=10,
    )  # fmt: skip
    assert made is not None
    rows = ImageRows(data, vit, config, held_out=False)
    batch = rows.next_rows(12)
    hooks = resolve_hooks(vit.module, ["resid_post.0", "mlp_out.1"])
    by_hand = capture(vit.module, hooks, batch.pixels["pixel_values"])
    found = made.train.read(0, 60)
    for hook in hooks:
        assert torch.allclose(found[str(hook)], by_hand[str(hook)].flatten(0, 1), atol=1e-5)
    for name, values in batch.records().items():
        assert made.train.records[name].tolist() == values.flatten().tolist()
    assert made.held_out is not None
    held_out = ImageRows(data, vit, config, held_out=True).next_rows(2)
    assert made.held_out.records["documents"].tolist() == held_out.documents.flatten().tolist()
    assert made.images is not None
    assert made.images["names"] == rows.source.names
    assert uw.open_cache(tmp_path / "cache").images == made.images


def test_another_processor_is_another_cache(make_vit: Any, folder: Path, tmp_path: Path) -> None:
    def make(model: LoadedModel, resume: bool) -> Any:
        return uw.cache(folder, tmp_path / "c", hooks="resid_post.0", tokens=20, model=model, resume=resume)

    make(make_vit(), resume=False)
    assert make(make_vit(), resume=True) is not None
    with pytest.raises(UnweaveError, match="with another data of the name"):
        make(make_vit(image_mean=[0.1, 0.2, 0.3]), resume=True)


def test_an_sae_is_trained_on_it_with_the_kinds_of_tokens_that_are_asked_for(tmp_path: Path) -> None:
    uw.cache("digits", tmp_path / "cache", hooks="resid_post.1", tokens=6800, model="demo-vit")
    sae = uw.SAEConfig(d_sae=64, activation=uw.TopK(4))
    config = uw.TrainConfig(
        model="demo-vit", data=str(tmp_path / "cache"), hooks=("resid_post.1",), saes=(sae,), tokens=6000,
        batch_size=500, buffer=2000,
    )  # fmt: skip
    [trained] = uw.train(config, progress=False).saes
    assert trained.metadata["images"]["held_out"] == 0.05
    report = uw.evaluate(trained, model="demo-vit", data="digits")
    assert report.provenance["tokens"]["kept"] == 93 * 16
    assert report["explained_variance"] is not None
    assert report["explained_variance"] > 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore:skipped the image")
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_a_resumed_cache_decodes_no_image_twice(
    vit: LoadedModel, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And ends in the same bytes, the names of a stream's images and the ones that cannot be read included."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(pictures(40)):
        picture.save(folder / f"{i:02d}.png")
    for i in (3, 12, 30):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    paths = sorted(folder.iterdir())

    class Paths:  # as often as it is asked for, one after the other
        def __iter__(self) -> Any:
            return iter(paths)

    def make(out: str, **settings: Any) -> Any:
        config = ImageConfig(held_out=0.2, workers=0)
        return uw.cache(
            folder if kind == "folder" else Paths(), tmp_path / out, hooks="resid_post.0", tokens=24 * 5, model=vit,
            config=config, prompts_per_pass=2, shard_bytes=600, held_out_tokens=20, **settings,
        )  # fmt: skip

    whole = make("whole")
    assert len(whole.manifest["sides"]["train"]["shards"]) > 6
    assert len(whole.images["bad"]) >= 2
    assert len(whole.images["names"]) == 40 or kind == "stream"
    assert whole.images["names"][5].endswith("05.png")
    assert whole.images["source"] == (str(folder) if kind == "folder" else None)

    decoded, prepare, append = list[str](), Preparation.prepare, ShardWriter.append

    def counted(self: Preparation, entry: Any) -> Any:
        decoded.append(entry.name)
        return prepare(self, entry)

    def killed(self: ShardWriter, *arguments: Any) -> None:
        if "train_00005" in self.folder.name:
            raise KeyboardInterrupt
        append(self, *arguments)

    monkeypatch.setattr(Preparation, "prepare", counted)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            make("killed")
    before = set(decoded)
    decoded.clear()
    make("killed", resume=True)
    assert len(before & set(decoded)) <= 2  # those of the pass that was interrupted
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:skipped the image")
def test_one_bad_image_too_many_may_be_allowed_on_resuming(
    vit: LoadedModel, pictures: Pictures, tmp_path: Path
) -> None:
    """And what was stored before it stays; another seed is another order, and refused."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(pictures(20)):
        picture.save(folder / f"{i:02d}.png")
    rows = ImageRows(folder, vit, ImageConfig(held_out=0, workers=0), held_out=False)
    order = rows.next_rows(20).documents[:, 0].tolist()
    (folder / f"{order[15]:02d}.png").write_bytes(b"no image")

    def make(resume: bool, **changed: Any) -> Any:
        return uw.cache(
            folder, tmp_path / "c", hooks="resid_post.0", tokens=80, model=vit, prompts_per_pass=2, shard_bytes=600,
            config=ImageConfig(held_out=0, workers=0, **changed), resume=resume,
        )  # fmt: skip

    with pytest.raises(UnweaveError, match="could not be read, more than max_bad=0"):
        make(False, max_bad=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("train_*/*")}
    assert before
    with pytest.raises(UnweaveError, match="other settings: seed was 0 and is now 1"):
        make(True, max_bad=1, seed=1)
    assert list(make(True, max_bad=1).images["bad"]) == [f"{order[15]:02d}.png"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_iterator_cannot_be_read_for_both_sides(vit: LoadedModel, pictures: Pictures, tmp_path: Path) -> None:
    def make(config: ImageConfig) -> Any:
        images = (picture for picture in pictures(12))
        return uw.cache(images, tmp_path / "c", hooks="resid_post.0", tokens=50, model=vit, config=config)

    with pytest.raises(UnweaveError, match="an iterator can be read once"):
        make(ImageConfig(held_out=0.2))
    assert make(ImageConfig(held_out=0)).train.n_rows == 50


def test_the_images_are_what_an_sae_was_trained_on(tmp_path: Path, vit: LoadedModel, folder: Path) -> None:
    """Not the cache, which does not hold them: evaluation reads them again."""
    made = uw.cache(folder, tmp_path / "c", hooks="resid_post.0", tokens=50, model=vit)
    assert made is not None
    sae = uw.SAEConfig(d_sae=16, activation=uw.TopK(2))
    masks = uw.MaskConfig(token_kinds=("patch", "cls"), norm_multiple=None)
    config = uw.TrainConfig(
        data=str(made.path), hooks=("resid_post.0",), saes=(sae,), tokens=40, batch_size=10, masks=masks
    )
    [trained] = uw.train(config, model=vit, progress=False).saes
    assert trained.metadata["dataset_path"] == str(folder)
