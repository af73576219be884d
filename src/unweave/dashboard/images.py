"""The page of a vision model's SAE: each latent's images with heat maps over their patches, and its classes.

The images on the page are what the model saw: resized and cropped by its processor, so that patches lie where they
were. One pass finds the images that matter, and a second one over the same rows fetches their pixels.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unweave import __version__
from unweave._errors import UnweaveError
from unweave._files import atomic_path
from unweave.activations import ImageBatch, ImageConfig, ImageRows, MaskConfig, Masks
from unweave.dashboard.image_collect import ImageFeatures, collect_images
from unweave.dashboard.page import render_images
from unweave.evaluation import Report
from unweave.evaluation.provenance import weights_hash
from unweave.evaluation.sample import default_image_config, default_masks, hook_of
from unweave.models import LoadedModel, differences, load_model, without_path
from unweave.sae import SAE

_LARGEST = 112
"""Pixels of an image's longer side on the page."""


def image_dashboard(
    sae: SAE,
    *,
    model: LoadedModel | nn.Module | str | Path,
    data: Any,
    path: str | Path,
    hook: str | None = None,
    tokens: int = 200_000,
    n_features: int = 100,
    n_top: int = 12,
    data_config: ImageConfig | None = None,
    masks: MaskConfig | None = None,
    report: Report | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a page that shows which patches of which images make the latents fire.

    If the SAE was trained on another model or at another hook, a warning and the page say so.

    Args:
        sae: A finished SAE, which takes raw activations.
        model: The vision model that they come from.
        data: Images in any form that `ImageRows` takes, of which the training images are read.
        path: The HTML file to write.
        hook: Where the SAE belongs; by default where its metadata says.
        tokens: Tokens to run, in whole images; fewer if there are fewer images.
        n_features: Latents to show: out of those that fire in `n_top` images, evenly spread from rare to frequent.
        n_top: Images for each latent.
        data_config: How images become rows, by default as the SAE's metadata says.
        masks: Which tokens count, by default as in training.
        report: An evaluation of the SAE, whose numbers the page quotes.
        seed: Order in which images are read (in place of `data_config.seed`).
        progress: Called after each pass with the number of images run so far, and of all.

    Returns:
        The path of the page.

    Raises:
        UnweaveError: The model is no vision model; no hook is known, or it is not of the SAE's width; nothing to read.
    """
    if tokens < 1 or n_features < 1 or n_top < 1:
        raise UnweaveError(f"tokens, n_features and n_top must be at least 1, got {tokens}, {n_features} and {n_top}.")
    if not isinstance(model, LoadedModel):
        model = load_model(model)
    place = hook_of(sae, model, hook)
    config = replace(data_config or default_image_config(sae), seed=seed)
    rows = ImageRows(data, model, config, held_out=False)
    notes = [["note", note] for note in differences(sae.metadata, model, [place])]
    start = rows.state_dict()
    masking = Masks(masks or default_masks(sae), None, rows.context)
    found = collect_images(
        sae, model, place, rows, masking, n_images=-(-tokens // rows.context), n_top=n_top, progress=progress
    )
    latents = _choose(found, n_features, n_top)
    rows.load_state_dict(start)
    pictures = _pictures(rows, model, set(found.images[:, latents].flatten().tolist()) - {-1})
    subject = f"{without_path(model.name)} · {place}"
    page = render_images(
        {
            "header": {
                "subject": subject,
                "facts": [*_facts(sae, found, report), *notes],
                "more": _more(sae, found, rows),
            },
            "classes": list(rows.source.classes),
            "images": pictures,
            "latents": [_latent(found, latent, pictures) for latent in latents],
        },
        title=f"{subject} · unweave",
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode())
    return Path(path)


def _choose(found: ImageFeatures, n: int, n_top: int) -> list[int]:
    """Latents that fire in enough images, evenly spread over their frequencies, the rarest first."""
    enough = (found.fired_images >= min(n_top, int(found.fired_images.max()))).nonzero()[:, 0].cpu()
    by_frequency = enough[found.fired.cpu()[enough].argsort(stable=True)]
    places = torch.linspace(0, len(by_frequency) - 1, min(n, len(by_frequency))).round().long()
    return [int(latent) for latent in by_frequency[places]]


def _latent(found: ImageFeatures, latent: int, pictures: dict[int, dict[str, Any]]) -> dict[str, Any]:
    largest = float(found.values[0, latent])
    top = []
    for value, number, heat in zip(
        found.values[:, latent].tolist(), found.images[:, latent].tolist(), found.heat[:, latent], strict=True
    ):
        if number in pictures:
            n_patches = pictures[number]["rows"] * pictures[number]["columns"]
            shade = (heat[:n_patches] * (255 / largest)).round().int().tolist()
            top.append({"image": number, "value": round(value, 3), "heat": shade})
    rates = found.class_fired[:, latent] / found.class_images.clamp(min=1)
    return {
        "index": latent,
        "density": int(found.fired[latent]) / found.n_tokens,
        "images": int(found.fired_images[latent]) / found.n_images,
        "max": round(largest, 3),
        "rates": [round(rate, 4) for rate in rates.tolist()],
        "top": top,
    }


def _pictures(rows: ImageRows, model: LoadedModel, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """The images by number, as PNGs with the shape of their grid."""
    pictures: dict[int, dict[str, Any]] = {}
    while len(pictures) < len(wanted) and len(batch := rows.next_rows(64)):
        for i, number in enumerate(batch.documents[:, 0].tolist()):
            if number in wanted:
                pixels, shape = _pixels(batch, i, model)
                label = -1 if rows.source.labels is None else rows.source.labels[number]
                pictures[number] = {
                    "src": _png(pixels), "name": rows.source.names[number], "label": label, "rows": shape[0],
                    "columns": shape[1],
                }  # fmt: skip
    return pictures


def _pixels(batch: ImageBatch, i: int, model: LoadedModel) -> tuple[Tensor, tuple[int, int]]:
    """Colours (h, w, c) from 0 to 1 of an image as the model sees it, and the shape of its grid."""
    assert model.vision is not None
    layout, pixels = model.vision, batch.pixels["pixel_values"][i].float()
    if layout.sizes == "list":
        rows, columns = batch.pixels["spatial_shapes"][i].tolist()
        height, width = layout.patch
        patches = pixels[: rows * columns].reshape(rows, columns, height, width, layout.channels)
        pixels = patches.permute(4, 0, 2, 1, 3).reshape(layout.channels, rows * height, columns * width)
    else:
        rows, columns = layout.grid(*pixels.shape[1:])
    mean, std = (getattr(model.processor, name, None) for name in ("image_mean", "image_std"))
    if mean is not None and std is not None:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:  # the pixels of a processor that does not say what it does, from their lowest to their highest
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    return pixels.clamp(0, 1).permute(1, 2, 0), (rows, columns)


def _png(pixels: Tensor) -> str:
    from PIL import Image

    colours = (pixels * 255).round().byte().numpy()
    image = Image.fromarray(np.ascontiguousarray(colours[..., 0] if colours.shape[2] == 1 else colours))
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST))
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _facts(sae: SAE, found: ImageFeatures, report: Report | None) -> list[list[str]]:
    k = getattr(sae.activation, "k", None)
    kind = type(sae.activation).__name__ + (f", k = {k}" if k else "")
    facts = [["SAE", f"{kind}, {sae.d_sae:,} latents"]]
    if report is None:
        facts.append(["L0", f"{int(found.fired.sum()) / found.n_tokens:.1f}"])
    else:
        measured = (("L0", "l0", ".1f"), ("explained variance", "explained_variance", ".3f"))
        facts += [[label, f"{report[name]:{form}}"] for label, name, form in measured if report[name] is not None]
    return [*facts, ["patches", f"{found.n_tokens:,}"], ["images", f"{found.n_images:,}"]]


def _more(sae: SAE, found: ImageFeatures, rows: ImageRows) -> list[list[str]]:
    return [
        ["data", rows.source.name],
        ["latents that never fired", f"{int((found.fired == 0).sum()):,} of {sae.d_sae:,}"],
        ["SAE weights", f"sha256 {weights_hash(sae)[:16]}"],
        ["made with", f"unweave {__version__}"],
    ]
