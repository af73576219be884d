"""The page of a vision model's SAE: what is counted, which images are shown, and that the page draws them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, ImageRows, MaskConfig, Masks
from unweave.dashboard import image_dashboard
from unweave.dashboard.image_collect import collect_images
from unweave.dashboard.page import render_images
from unweave.models import Hook, LoadedModel, load_model
from unweave.sae import SAE, TopK

HOOK = "vit.layers.1"


@pytest.fixture(scope="module")
def vit() -> LoadedModel:
    return load_model("demo-vit")


@pytest.fixture(scope="module")
def sae() -> SAE:
    torch.manual_seed(0)
    made = SAE(96, 40, TopK(3))
    made.metadata["hf_hook_name"] = HOOK
    return made


@torch.no_grad()
def codes_by_hand(sae: SAE, vit: LoadedModel, rows: ImageRows, n: int) -> tuple[torch.Tensor, list[int]]:
    batch = rows.peek(n)
    states = vit.module(batch.pixels["pixel_values"], output_hidden_states=True).hidden_states
    return sae.encode(states[2][:, 1:]), batch.documents[:, 0].tolist()


def test_counts_and_best_images_are_those_of_all_codes_at_once(sae: SAE, vit: LoadedModel) -> None:
    """pitfall_339: an image with many strong patches is one of the best, and once."""
    rows = ImageRows("digits", vit, ImageConfig(), held_out=False)
    codes, numbers = codes_by_hand(sae, vit, rows, 192)
    masks = Masks(MaskConfig(norm_multiple=None), None, rows.context)
    found = collect_images(sae, vit, Hook(HOOK), rows, masks, n_images=192, n_top=4)
    assert (found.n_images, found.n_tokens) == (192, 192 * 16)
    assert torch.equal(found.fired, (codes > 0).sum((0, 1)))
    by_image = codes.amax(1)
    assert torch.equal(found.fired_images, (by_image > 0).sum(0))
    best = by_image.topk(4, dim=0)
    assert torch.allclose(found.values, best.values, atol=1e-5)
    for latent in range(40):
        for place in range(4):
            if best.values[place, latent] > 0:
                at = numbers.index(int(found.images[place, latent]))
                assert torch.allclose(found.heat[place, latent], codes[at, :, latent], atol=1e-5)
            else:
                assert found.images[place, latent] == -1
    labels = np.array(rows.source.labels)[numbers]
    for digit in range(10):
        assert torch.equal(found.class_fired[digit], (by_image > 0)[labels == digit].sum(0))
    assert found.class_images.tolist() == np.bincount(labels, minlength=10).tolist()


def test_masked_patches_neither_count_nor_glow(sae: SAE, vit: LoadedModel) -> None:
    rows = ImageRows("digits", vit, ImageConfig(), held_out=True)
    masks = Masks(MaskConfig(positions="1:5", norm_multiple=None), None, rows.context)
    found = collect_images(sae, vit, Hook(HOOK), rows, masks, n_images=93, n_top=3)
    assert found.n_tokens == 93 * 4
    assert not found.heat[:, :, 4:].any()
    assert found.heat[:, :, :4].any()


def test_another_width_or_no_patches_are_refused(sae: SAE, vit: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"where the SAE takes 12 numbers a token"):
        image_dashboard(SAE(12, 8, TopK(2)), model=vit, data="digits", path=tmp_path / "x.html", hook=HOOK)
    with pytest.raises(UnweaveError, match="the masks leave no patch to look at"):
        image_dashboard(
            sae, model=vit, data="digits", path=tmp_path / "x.html", masks=MaskConfig(token_kinds="cls"), tokens=200
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_images_with_grids_of_their_own_are_shown_too(tmp_path: Path) -> None:
    """SigLIP 2: padded lists of patches, put together again."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_patches=16, patch_size=4
    )
    processor = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=8)
    model = load_model(transformers.Siglip2VisionModel(config), processor=processor)
    pictures = [np.full((8, 24, 3), 10 * i, np.uint8) for i in range(6)]
    path = image_dashboard(
        SAE(16, 12, TopK(2)), model=model, data=pictures, path=tmp_path / "x.html", hook="resid_post.0", n_top=2
    )
    data = shown(path)
    assert all(image["rows"] < image["columns"] for image in data["images"].values())  # as wide as they were
    assert all(
        len(top["heat"]) == image["rows"] * image["columns"]
        for latent in data["latents"] for top in latent["top"] for image in [data["images"][str(top["image"])]]
    )  # fmt: skip


def test_one_page_holds_each_picture_once(sae: SAE, vit: LoadedModel, tmp_path: Path) -> None:
    """pitfall_338: latents name the images that they share, and there is no file beside the page."""
    path = image_dashboard(sae, model=vit, data="digits", path=tmp_path / "p.html", n_features=9, n_top=5, tokens=3000)
    page = shown(path)
    named = [top["image"] for latent in page["latents"] for top in latent["top"]]
    assert len(named) > len(set(named))
    assert len(page["images"]) == len(set(named))
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_of_text_has_no_such_page(sae: SAE, model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="is no vision model of a known family"):
        image_dashboard(sae, model=model, data="digits", path=tmp_path / "x.html", hook="transformer.h.0")


def test_another_hook_is_said_here_and_on_the_page(sae: SAE, vit: LoadedModel, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"at 'vit\.layers\.1' and reads those at 'vit\.layers\.0'"):
        path = image_dashboard(
            sae, model=vit, data="digits", path=tmp_path / "x.html", hook="vit.layers.0", tokens=200, n_features=2
        )
    assert [name for name, _ in shown(path)["header"]["facts"]].count("note") == 1


def shown(path: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.browser
def test_the_page_draws_every_latent(
    sae: SAE, vit: LoadedModel, tmp_path: Path, browse: Callable[..., str]
) -> None:
    path = image_dashboard(sae, model=vit, data="digits", path=tmp_path / "p.html", n_features=9, n_top=5, tokens=3000)
    dom = browse(path.as_uri())
    latents = shown(path)["latents"]
    assert dom.count('<article class="latent">') == len(latents) == 9
    assert dom.count("<canvas") == sum(len(latent["top"]) for latent in latents)
    assert len(re.findall(r'<canvas[^>]* width="\d{2,}"', dom)) == dom.count("<canvas")  # each was drawn on
    assert "9 latents" in dom


@pytest.mark.browser
def test_numbers_are_written_out_and_the_page_fits_a_telephone(tmp_path: Path, browse: Callable[..., str]) -> None:
    latent = {"index": 7, "density": 0.00123, "images": 1.0, "max": 4.637, "rates": [], "top": []}
    header = {"subject": "m", "facts": [["patches", "27,264"]], "more": [["data", "a-long-name-" * 20]]}
    path, outside = tmp_path / "p.html", tmp_path / "outside.html"
    data = {"header": header, "classes": [], "images": {}, "latents": [latent]}
    path.write_text(render_images(data, title="p · unweave"), encoding="utf-8")
    dom = browse(path.as_uri())
    assert "fires on 0.12 % of patches, in 100 % of images; max 4.64<" in dom
    assert "Bars:" not in dom.partition("<script")[0]  # there are none without classes
    outside.write_text(
        f"""<iframe src="{path.as_uri()}" style="width:390px"></iframe><script>addEventListener("load", () => {{
        const page = document.querySelector("iframe").contentDocument;
        page.querySelector("details").open = true;
        document.title = page.documentElement.scrollWidth;
        }})</script>""",
        encoding="utf-8",
    )
    width = re.search(r"<title>(\d+)</title>", browse(outside.as_uri(), "--allow-file-access-from-files"))
    assert width
    assert 300 < int(width[1]) <= 390
