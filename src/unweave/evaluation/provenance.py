"""Where the numbers of a report come from: enough to compute them again, and to notice when something has changed."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import asdict
from typing import Any

import torch

from unweave import __version__
from unweave.evaluation.measure import Measurement
from unweave.evaluation.sample import Source
from unweave.sae import SAE


def provenance(measured: Measurement, source: Source, *, tokens: int, batch_prompts: int) -> dict[str, Any]:
    """Versions, SAE, model, data, and what the masks left out.

    Args:
        measured: The evaluation.
        source: What it read.
        tokens: How many tokens were asked for.
        batch_prompts: Rows in a forward pass.
    """
    sae, model, masks = measured.sae, measured.model, measured.masks
    counts = asdict(masks.report)
    median = counts.pop("median_norm")
    return {
        "unweave_version": __version__,
        "torch_version": torch.__version__,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": time.time_ns() // 1_000_000,
        "seed": source.config and source.config.seed,
        "batch_prompts": batch_prompts,
        "passes": measured.passes,
        "device": str(model.device),
        "hook": str(measured.hook),
        "reads": [str(hook) for hook in measured.reads],
        "sae": {
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "d_sae": sae.d_sae,
            "activation": type(sae.activation).__name__,
            "dtype": str(sae.dtype).removeprefix("torch."),
            "weights_sha256": weights_hash(sae),
            "metadata": dict(sae.metadata),
        },
        "model": {
            "name": model.name,
            "class": type(model.module).__name__,
            "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
        },
        "data": {
            "name": source.name,
            "split": source.split,
            "config": source.config and asdict(source.config),
            "context": measured.context,
            "prompts": measured.prompts,
            "token_sha256": measured.token_hash.hexdigest(),
        },
        "tokens": {
            "asked": tokens,
            **counts,
            "padding": measured.padding,
            "excluded_ids": {str(i): token for i, token in masks.excluded_ids.items()},
            "median_norm": median,
            "masks": asdict(masks.config),
        },
    }


def weights_hash(sae: SAE) -> str:
    """SHA-256 of all parameters and buffers, with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
