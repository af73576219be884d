"""Settings that were asked for by name, against data that decide them: tokens and caches were laid out when made.

A `TrainConfig` does not tell a setting that was left out from one that was given and equals the default, but a command
line and a file do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError
from unweave.activations.cache import Cache
from unweave.activations.tokenized.folder import TokenFolder, open_token_folder
from unweave.activations.tokenized.format import find_token_folder
from unweave.models import load_model
from unweave.models.model_identity import model_fingerprint
from unweave.training.cached import LAYOUT, RUNNING, cached_data, check_made
from unweave.training.config import TrainConfig
from unweave.training.progress import say

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
_IDLE = ("prompts_per_pass", "model_device", "background")
"""What only says how a model is run."""
_IDLE_READING = ("streaming", "max_bad")
"""What only says how text or images are read."""


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse what was given and the data decide otherwise, and say what has no effect on them.

    Args:
        given: The settings that were given, as `from_dict` takes them: no others.

    Raises:
        UnweaveError: The tokens or the cache were made in another way, or by another model.
    """
    data = given.get("data", TrainConfig.data)
    text, images = given.get("text") or {}, given.get("images") or {}
    source = cached_data(data)
    if source is None:
        folder = find_token_folder(Path(data).expanduser()) if isinstance(data, str | Path) else None
        if folder is not None:
            _check_tokens(text, open_token_folder(folder))
        return
    if isinstance(source, Cache):
        _check_cache(given, text, images, source)
    else:
        known = getattr(source, "context", None)
        check_made(text, {} if known is None else {"context": known}, source.name, ("context",))
    idle = {name for name in _IDLE if given.get(name) is not None}
    idle |= {name for name in _IDLE_READING if {**text, **images}.get(name)}
    idle |= {"model_precision"} & set(given) if not isinstance(source, Cache) else set()
    if idle:
        names = " and ".join(sorted(idle))
        say(f"a cache is read, and no model or text: {names} {'has' if len(idle) == 1 else 'have'} no effect.")


def _check_cache(given: Mapping[str, Any], text: Mapping[str, Any], images: Mapping[str, Any], cache: Cache) -> None:
    made, name = cache.manifest["made_from"], cache.train.name
    if cache.config is not None:
        check_made(text, asdict(cache.config), name, (*LAYOUT, *_chosen(made["config"])))
    elif "context" in text:
        raise UnweaveError(f"{name} holds images, whose rows are as long as the images make them: leave out context.")
    else:
        check_made(images, made["config"], name, [part for part in images if part not in RUNNING])
    precision = given.get("model_precision", "auto")
    if _PRECISIONS.get(precision, made["model_precision"]) != made["model_precision"]:
        was = {long: short for short, long in _PRECISIONS.items()}.get(made["model_precision"], made["model_precision"])
        raise UnweaveError(f"model_precision={precision!r} was asked for, and {name} was made with {was!r}.")
    # Other names than the default are looked at in any case.
    if given.get("model") == TrainConfig.model != made["model"]["name"]:
        model = load_model(TrainConfig.model, device=given.get("device"))
        cache.check_model(model_fingerprint(model.module), model.name)


def _check_tokens(text: Mapping[str, Any], folder: TokenFolder) -> None:
    if text.get("context", 0) > folder.context:
        raise UnweaveError(
            f"{folder.path} has rows of {folder.context} tokens, shorter than context={text['context']}."
        )
    made = folder.manifest.get("config", {})
    parts = [part for part in LAYOUT if part not in ("context", "held_out")]
    check_made(text, made, str(folder.path), (*parts, *_chosen(made)))
    if "held_out" in text:
        folder.check_split(text["held_out"])


def _chosen(made: Mapping[str, Any]) -> Collection[str]:
    """What part of the data was read, as far as it was said."""
    return [part for part in ("column", "subset") if made.get(part) is not None]
