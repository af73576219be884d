"""What the latents of a vision model's SAE fire on: the images with the largest codes, patch by patch, and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import ImageBatch, ImageRows, Masks
from unweave.activations.masks import lengths_of
from unweave.models import Hook, LoadedModel, capture, dtype_of
from unweave.sae import SAE

_MAX_CODES = 1 << 24
"""Codes held at a time, as a dense tensor."""


@dataclass
class ImageFeatures:
    """Counts over the images that were read, and each latent's images with the largest codes, best first."""

    values: Float[Tensor, "n_top d_sae"]
    """Largest code of a patch in the image; 0 where a latent fired in fewer images."""
    images: Int64[Tensor, "n_top d_sae"]
    """Numbers of the images, -1 where there are fewer."""
    heat: Float[Tensor, "n_top d_sae patches"]
    """The codes of the image's patches, row by row; 0 on patches that the masks leave out."""
    fired: Int64[Tensor, " d_sae"]
    """Patches that a latent fired on."""
    fired_images: Int64[Tensor, " d_sae"]
    class_images: Int64[Tensor, " n_classes"]
    """Images of each class."""
    class_fired: Int64[Tensor, "n_classes d_sae"]
    """Images of each class that a latent fired in."""
    n_tokens: int = 0
    n_images: int = 0


def collect_images(
    sae: SAE,
    model: LoadedModel,
    hook: Hook,
    rows: ImageRows,
    masks: Masks,
    *,
    n_images: int,
    n_top: int,
    progress: Callable[[int, int], None] | None = None,
) -> ImageFeatures:
    """Read up to `n_images` images, the last batch of them whole.

    Raises:
        UnweaveError: No images, activations of another width than the SAE's, or nothing but masked patches.
    """
    assert model.vision is not None
    n_patches, device = rows.context - model.vision.n_prefix, sae.device
    n_classes = len(rows.source.classes)
    found = ImageFeatures(
        values=torch.zeros(n_top, sae.d_sae, device=device),
        images=torch.full((n_top, sae.d_sae), -1, device=device),
        heat=torch.zeros(n_top, sae.d_sae, n_patches, device=device),
        fired=torch.zeros(sae.d_sae, dtype=torch.int64, device=device),
        fired_images=torch.zeros(sae.d_sae, dtype=torch.int64, device=device),
        class_images=torch.zeros(n_classes, dtype=torch.int64),
        class_fired=torch.zeros(n_classes, sae.d_sae, dtype=torch.int64),
    )
    size = min(64, max(1, _MAX_CODES // (sae.d_sae * n_patches)))
    while found.n_images < n_images and len(batch := rows.next_rows(size)):
        codes, kept = _codes(sae, model, hook, batch, masks, model.vision.n_prefix, n_patches)
        _add(found, codes, batch, rows.source.labels)
        found.n_tokens += kept
        if progress is not None:
            progress(min(found.n_images, n_images), n_images)
    if not found.n_tokens:
        raise UnweaveError(f"{rows.source.name} and the masks leave no patch to look at.")
    return found


@torch.no_grad()
def _codes(
    sae: SAE, model: LoadedModel, hook: Hook, batch: ImageBatch, masks: Masks, n_prefix: int, n_patches: int
) -> tuple[Float[Tensor, "n patches d_sae"], int]:
    """The codes of the patches, 0 where a patch is masked or there is none, and how many are not."""
    first, named = batch.inputs(model.device)
    x = capture(model.module, [hook], first.to(dtype_of(model.module)), **named)[str(hook)]
    if x.shape[:2] != batch.real.shape or x[0, 0].numel() != sae.d_in:
        raise UnweaveError(
            f"{str(hook)!r} of {model.name!r} gives activations of shape {tuple(x.shape)} for "
            f"{tuple(batch.real.shape)} tokens, where the SAE takes {sae.d_in} numbers a token."
        )
    x, keep = x.reshape(*batch.real.shape, -1).to(sae.device), masks.by_token(batch).to(sae.device)
    norms = {str(hook): lengths_of(x[keep])}
    if len(norms[str(hook)]):
        keep[keep.clone()] = masks.by_norm(norms)
    codes = sae.encode(x).float() * keep[..., None]
    patches = codes[:, n_prefix:]
    missing = n_patches - patches.shape[1]
    return torch.nn.functional.pad(patches, (0, 0, 0, missing)), int(keep[:, n_prefix:].sum())


def _add(
    found: ImageFeatures, codes: Float[Tensor, "n patches d_sae"], batch: ImageBatch, labels: list[int] | None
) -> None:
    numbers = batch.documents[:, 0].to(codes.device)
    by_image = codes.amax(1)
    n_top = len(found.values)
    values, at = torch.cat([found.values, by_image]).topk(n_top, dim=0)
    latents = torch.arange(codes.shape[2], device=codes.device)
    old, new = at.clamp(max=n_top - 1), (at - n_top).clamp(min=0)
    is_old = at < n_top
    found.heat = torch.where(is_old[..., None], found.heat[old, latents], codes.transpose(1, 2)[new, latents])
    found.images = torch.where(is_old, found.images[old, latents], numbers[new]).masked_fill(values <= 0, -1)
    found.values = values
    fires = by_image > 0
    found.fired += (codes > 0).sum((0, 1))
    found.fired_images += fires.sum(0)
    found.n_images += len(numbers)
    if labels is not None and len(found.class_images):
        classes = torch.tensor([labels[i] for i in batch.documents[:, 0].tolist()])
        known = classes >= 0
        found.class_images += torch.bincount(classes[known], minlength=len(found.class_images))
        found.class_fired.index_add_(0, classes[known], fires.cpu()[known].long())
