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
    with pytest.raises(UnweaveError, match="cannot go on with"):
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
