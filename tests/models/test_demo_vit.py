"""The vision model that ships: it loads like any other, and it reads digits that it was not trained on."""

from __future__ import annotations

import hashlib

import pytest
import torch

from unweave.activations import ImageConfig, ImageRows
from unweave.models import DEMO_VIT, LoadedModel, VisionLayout, load_model, resolve_hooks, splice


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo-vit")


@pytest.fixture(scope="module")
def held_out(demo: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and classes of what neither it nor an SAE was trained on."""
    rows = ImageRows("digits", demo, ImageConfig(held_out=0.2), held_out=True)
    batch = rows.next_rows(1000)
    assert rows.source.labels is not None
    return batch.pixels["pixel_values"], torch.tensor([rows.source.labels[i] for i in batch.documents[:, 0].tolist()])


@torch.no_grad()
def accuracy(demo: LoadedModel, pixels: torch.Tensor, classes: torch.Tensor) -> float:
    return (demo.module(pixels).logits.argmax(1) == classes).double().mean().item()


def test_it_is_a_folder_like_any_other(demo: LoadedModel) -> None:
    same = load_model(DEMO_VIT)
    assert all(torch.equal(a, b) for a, b in zip(demo.module.parameters(), same.module.parameters(), strict=True))
    assert type(demo.module).__name__ == "ViTForImageClassification"
    assert demo.vision == VisionLayout((2, 2), (8, 8), cls=1, sizes="interpolated")
    assert sum(p.stat().st_size for p in DEMO_VIT.iterdir()) < 2_000_000


def test_its_card_is_about_these_weights() -> None:
    digest = hashlib.sha256((DEMO_VIT / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (DEMO_VIT / "README.md").read_text(encoding="utf-8")


def test_it_reads_digits(demo: LoadedModel, held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """As its card says: 366 of 370; one more or less, for other builds round differently."""
    assert len(held_out[1]) == 370
    assert accuracy(demo, *held_out) >= 365 / 370


def test_its_residual_stream_matters(demo: LoadedModel, held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    for n in range(3):
        [hook] = resolve_hooks(demo.module, [f"resid_post.{n}"])
        with splice(demo.module, {hook: torch.zeros_like}):
            assert accuracy(demo, *held_out) < 0.2
