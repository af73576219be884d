"""From one format to another, with a proof: codes and reconstructions of the same inputs before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_folder
from unweave.hub.card import SAE_LENS
from unweave.hub.reader import describe_sae, detect, read_sae, writer
from unweave.hub.source import Source
from unweave.sae import SAE, CrossLayerTranscoder, TemporalSAE, Transcoder
from unweave.sae.reading import read_config

PROBES, SEED = 256, 0
_SCALES = 8
"""Probes have norms from a tenth to a thousand times sqrt(d_in): nobody says which an SAE was trained on."""
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 5e-2
FLIPPED = 1e-3
"""Share of the active latents that rounding may take across a threshold, or out of the k strongest."""
_PLACE = (
    "model_name", "hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out", "hook_names", "hf_hook_names",
    "hook_names_out", "hf_hook_names_out",
)  # fmt: skip
_OF_A_FILE = {"source_format", "sae_lens_version", "sae_lens_training_version", "training_architecture"}
"""What metadata say of the file that was read, and not of the SAE."""


@dataclass(frozen=True)
class Side:
    """What an SAE gives on the probes.

    Attributes:
        l0: Mean active latents.
        largest_code: Largest code, in absolute value.
        output_norm: Root mean square norm of the output.
        error: Mean relative error of the reconstruction, |x_hat - x|^2 / |x|^2; NaN for what predicts something else.
    """

    l0: float
    largest_code: float
    output_norm: float
    error: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion changed, measured on probe inputs.

    Attributes:
        source: Format that was read.
        target: Format that was written.
        before, after: What each gives.
        codes: Largest difference of a code that is active before and after, in units of its probe's largest code.
        flipped: Share of active latents that are active on one side only.
        outputs: Largest difference of an output, in units of its probe's largest, where no latent flipped.
        probes: Number of probe inputs.
        notes: What the written files do not say as the read ones did, and whether SAELens refuses them.
    """

    source: str
    target: str
    before: Side
    after: Side
    codes: float
    flipped: float
    outputs: float
    probes: int
    notes: Sequence[str] = ()


def convert(
    source: str | Path, folder: str | Path, *, to: str, from_format: str | None = None, **hints: Any
) -> Conversion:
    """Write an SAE of one format in another, read it again, and compare both on probe inputs.

    Args:
        source: Folder or file to read.
        folder: Folder to write; it must not exist, or be empty.
        to: Name of the format to write.
        from_format: Name of the format to read; None: the files tell.
        **hints: As for `read_sae`.

    Raises:
        UnweaveError: If either format is unknown, `folder` is not empty, the target cannot express the SAE, or what it
            gives differs by more than rounding; nothing is written then.
    """
    folder, write = Path(folder), writer(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnweaveError(f"{str(folder)!r} is not empty, and a conversion overwrites nothing.")
    before = read_sae(source, format=from_format, **hints)
    read_as = from_format or detect(Source(source)).name
    with atomic_folder(folder) as temporary:
        write(before, temporary)
        result = compare(before, read_sae(temporary, format=to), source=read_as, target=to)
        tolerance = TOLERANCE if before.dtype in (torch.float32, torch.float64) else TOLERANCE_16_BIT
        if not (max(result.codes, result.outputs) <= tolerance and result.flipped <= FLIPPED):
            raise UnweaveError(
                f"as {to}, this SAE gives codes that differ by up to {result.codes:.1e} and outputs that differ by up "
                f"to {result.outputs:.1e} of the largest, and {result.flipped:.1e} of the active latents are active on "
                "one side only: nothing was written."
            )
    written = describe_sae(folder, format=to)["metadata"]  # now, as in some formats the folder's name is the hook's
    return replace(result, notes=[*_changed(before.metadata, written, to), *_strange(folder, to)])


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], to: str) -> list[str]:
    """Sentences on metadata that the written files do not hold, or that they contradict."""
    said = {key for key, value in before.items() if value is not None} - _OF_A_FILE
    missing, notes = sorted(said - after.keys(), key=lambda key: (key not in _PLACE, key)), []
    if missing:
        notes.append(f"files of {to} have no place for these metadata: {', '.join(missing)}")
    for key in _PLACE:
        if key in after and after[key] != before.get(key):
            was = repr(before[key]) if key in said else "not known"
            notes.append(f"the {key} is {after[key]!r} to readers of {to}, and it was {was}")
    return notes


def _strange(folder: Path, to: str) -> list[str]:
    """A sentence on what SAELens itself does not read, though it is written in its layout."""
    if to != "saelens" or (architecture := read_config(folder)["architecture"]) in SAE_LENS:
        return []
    return [f"SAELens has no architecture {architecture!r} and refuses these files, which unweave reads"]


@torch.no_grad()
def compare(before: SAE, after: SAE, *, source: str = "saelens", target: str) -> Conversion:
    """Two SAEs on the same probe inputs; see `Conversion`."""
    x = probes(before)
    (codes, outputs), (codes_2, outputs_2) = (_run(sae, x) for sae in (before, after))
    active, active_2 = codes != 0, codes_2 != 0
    both, either = active & active_2, active | active_2
    flips = active ^ active_2
    calm = ~flips.any(1)
    apart = torch.where(both, codes - codes_2, 0).abs().amax(1) / codes.abs().amax(1).clamp(min=1e-30)
    outputs_apart = (outputs - outputs_2).abs().amax(1) / outputs.abs().amax(1).clamp(min=1e-30)
    return Conversion(
        source=source,
        target=target,
        before=_side(before, x, codes, outputs),
        after=_side(after, x, codes_2, outputs_2),
        codes=apart.max().item(),
        flipped=(flips.sum() / either.sum().clamp(min=1)).item(),
        outputs=outputs_apart[calm].max().item() if calm.any() else float("inf"),
        probes=len(codes),
    )


def probes(sae: SAE, n: int = PROBES) -> Float[Tensor, "..."]:
    """Inputs at which latents fire: noise and some encoder directions, at several scales, around what is subtracted.

    A temporal SAE's are sequences.
    """
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randint(sae.d_sae, (n, 4), generator=generator)
    directions = torch.nn.functional.normalize(sae.W_enc.float().T[latents].sum(1), dim=1)
    directions = directions.repeat(1, sae.d_in // directions.shape[1])  # a cross-layer transcoder reads several layers
    noise = torch.randn(n, sae.d_in, generator=generator)
    scales = torch.logspace(-1, 3, _SCALES).repeat_interleave(-(-n // _SCALES))[:n, None]
    x = scales * (noise + directions * sae.d_in**0.5)
    if sae.apply_b_dec_to_input:
        x = x + sae.b_dec.float()
    return x.view(-1, 16, sae.d_in) if isinstance(sae, TemporalSAE) else x


def _run(sae: SAE, x: Tensor) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n d_out"]]:
    return sae.encode_sparse(x).to_dense().float(), sae(x).flatten(0, -2).float()


def _side(sae: SAE, x: Tensor, codes: Tensor, outputs: Tensor) -> Side:
    x = x.flatten(0, -2)
    predicts = isinstance(sae, Transcoder | CrossLayerTranscoder)
    return Side(
        l0=(codes != 0).sum(1).float().mean().item(),
        largest_code=codes.abs().max().item(),
        output_norm=outputs.square().sum(1).mean().sqrt().item(),
        error=float("nan") if predicts else ((outputs - x).square().sum(1) / x.square().sum(1)).mean().item(),
    )
