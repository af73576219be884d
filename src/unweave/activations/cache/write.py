"""Making a cache: the rows are written first, then the model runs over them, shard by shard.

    data -> tokens/ (the rows, each with its documents) -> passes of the model -> shards -> manifest.json

A shard is a fixed run of passes, or of images, so what it holds depends on neither the process that writes it nor what
was written before: processes share the shards out among themselves, and a cache that is resumed has the bytes of one
that was not interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unweave._errors import UnweaveError
from unweave._files import remove_leftovers, write_json
from unweave.activations.cache.begin import begin, is_of_rank, manifest_head
from unweave.activations.cache.folder import Cache, open_cache
from unweave.activations.cache.format import IMAGES, MANIFEST, TOKENS, dtype_name, shard_folder, slugs
from unweave.activations.cache.image_job import ImageJob
from unweave.activations.cache.job import Job
from unweave.activations.cache.rows import FolderRows, are_rows, write_tokens
from unweave.activations.cache.shards import on_disk, read_shard
from unweave.activations.config import DataConfig
from unweave.activations.documents import open_documents
from unweave.activations.images import ImageConfig, ImageRows, image_sides
from unweave.activations.precision import ModelPrecision, model_dtype
from unweave.activations.rows import Rows
from unweave.activations.tokenized.folder import open_token_folder
from unweave.activations.tokenized.format import SIDES, Side, checksum, find_token_folder
from unweave.activations.tokenized.vocabulary import describe_tokenizer
from unweave.activations.tokens import TokenRows
from unweave.models import Hook, LoadedModel, dtype_of, head_index, load_model, resolve_hooks, tl_name
from unweave.models.aliases import aliases
from unweave.models.model_identity import model_fingerprint

SHARD_BYTES = 512 << 20
HELD_OUT_TOKENS = 100_000
"""Default of `held_out_tokens`, where that is less than a 20th of the tokens."""


def cache(
    data: Any,
    out: str | Path,
    *,
    hooks: str | Sequence[str],
    tokens: int,
    model: str | Path | nn.Module | LoadedModel = "demo",
    dtype: str | torch.dtype = "bfloat16",
    config: DataConfig | ImageConfig | None = None,
    positions: str | Sequence[int] | None = None,
    held_out_tokens: int | None = None,
    held_out_data: Rows | None = None,
    shard_bytes: int = SHARD_BYTES,
    prompts_per_pass: int = 32,
    model_precision: ModelPrecision = "auto",
    resume: bool = False,
    allow_fewer: bool = False,
    rank: int | None = None,
    world: int | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cache | None:
    """Store the activations of a model at any number of hooks, from one pass over the data.

    All real tokens of the rows are stored, special ones too: what is left out of training is chosen on reading.

    Args:
        data: Anything that `TokenRows` (or, for a vision model, `ImageRows`) takes, of which the training and the
            held-out documents are read; or rows that are laid out already (`Rows`).
        out: Folder of the cache.
        hooks: Where to take activations: module paths, globs or aliases.
        tokens: Tokens of training documents to store: so many exactly.
        model: "demo", a folder, a name on the Hugging Face Hub, a module, or a loaded model.
        dtype: "bfloat16", "float16", "float32", or "int8" (with a scale for each row).
        config: How documents become rows; by default that of a token folder, else `DataConfig()`. For a vision model an
            `ImageConfig`.
        positions: Positions of a row to store, as a slice ("1:", "::4") or one by one; None: all.
        held_out_tokens: Tokens of held-out documents; None: a 20th of `tokens`, at most 100,000, or what there is.
        held_out_data: The held-out rows, where `data` are rows.
        shard_bytes: Size of a shard; what a kill loses at most.
        prompts_per_pass: Rows in a forward pass.
        model_precision: What the model runs in: "fp32", "bf16", or "auto" for bf16 where the hardware is faster at it
            and the model large enough to gain. The manifest says which it was.
        resume: Go on with an unfinished cache; its bytes will be those of one that was not interrupted.
        allow_fewer: Store what there is where the data end before `tokens`.
        rank: Which of `world` processes this is; None: the environment variable RANK, else 0. Each writes its share
            of the shards into the same folder (of images, whichever shard nobody has begun), and the last one to finish
            completes the cache.
        world: Number of processes; None: the environment variable WORLD_SIZE, else 1.
        device: Where to run; by default CUDA if there is any.
        progress: Called after each pass with the tokens stored so far and those to store, both of all ranks.

    Returns:
        The opened cache; None if other ranks are still writing.

    Raises:
        UnweaveError: The data end early, or hold a NaN or an infinity (with its hook, document and position); the
            folder holds something else, or a cache of another model, tokenizer, data set or setting; a disk that is
            full.
    """
    rank, world = _rank(rank, world)
    if tokens < 1 or prompts_per_pass < 1 or shard_bytes < 1 or (held_out_tokens or 0) < 0:
        raise UnweaveError("tokens, prompts_per_pass and shard_bytes must be at least 1, and held_out_tokens 0.")
    loaded = model if isinstance(model, LoadedModel) else load_model(model, device=device)
    runs_in = model_dtype(model_precision, loaded)
    places = resolve_hooks(loaded.module, [hooks] if isinstance(hooks, str) else list(hooks))
    if loaded.vision is not None and not are_rows(data):
        data, held_out_data = image_sides(data, loaded, config)
    of_images = isinstance(data, ImageRows)
    if of_images and not isinstance(held_out_data, ImageRows | None):
        raise UnweaveError("the training data are images and the held-out data are not.")
    config = config if isinstance(config, DataConfig) else None
    given = are_rows(data)
    config = config or config_of(data)
    source = None if given else open_documents(data, config)
    can_hold_out = held_out_data is not None if given else config.held_out > 0
    if not can_hold_out and held_out_tokens:
        raise UnweaveError(f"held_out_tokens={held_out_tokens} were asked for, and no data are held out.")
    limit = min(HELD_OUT_TOKENS, tokens // 20) if can_hold_out else 0
    wanted: dict[Side, int] = {"train": tokens, "held_out": limit if held_out_tokens is None else held_out_tokens}
    fewer: dict[Side, bool] = {"train": allow_fewer, "held_out": allow_fewer or held_out_tokens is None}
    made_from: dict[str, Any] = {
        "model": {
            "name": loaded.name,
            "class": type(loaded.module).__name__,
            "fingerprint": model_fingerprint(loaded.module),
        },
        "hooks": [str(hook) for hook in places],
        "dtype": dtype_name(dtype),
        "model_precision": str(runs_in or dtype_of(loaded.module)).removeprefix("torch."),
        "positions": positions if positions is None or isinstance(positions, str) else list(positions),
        "tokens": wanted,
        "prompts_per_pass": prompts_per_pass,
        "shard_bytes": shard_bytes,
    }
    if source is None:
        made_from |= {"rows": "given", "tokenizer": None, **_about_rows(data)}
    else:
        made_from |= {
            "rows": "text",
            "tokenizer": None if loaded.tokenizer is None else describe_tokenizer(loaded.tokenizer),
            "data": {"name": Path(source.name).name, "fingerprint": source.fingerprint},
            "config": asdict(config),
        }
    out = Path(out).expanduser()
    with on_disk(out):
        if begin(out, made_from, resume=resume or world > 1):
            return open_cache(out)
        if world == 1 or not of_images:  # whose shards are no rank's before it claims them
            remove_leftovers(out, partial(is_of_rank, rank=rank, world=world))
        if source is None:
            sides: dict[Side, Any] = {"train": data}
            if held_out_data is not None:
                sides["held_out"] = held_out_data
        else:
            open_side = partial(TokenRows, source, loaded.tokenizer, config)
            try:
                sides = _rows_of_text(out / TOKENS, open_side, wanted, fewer, made_from, f"{TOKENS}-{rank}")
            except UnweaveError:
                if world == 1 and not (out / TOKENS).exists():  # nothing that resuming could use
                    (out / MANIFEST).unlink()
                    if not any(out.iterdir()):
                        out.rmdir()
                raise
        job = (ImageJob if of_images else Job)(
            out, loaded, runs_in, places, made_from, wanted, rank, world, progress
        )  # fmt: skip
        totals = job.run(sides)
        if totals is None:
            return None
        for side, n in wanted.items():
            if totals[side] < n and not (fewer[side] and totals[side]):
                raise UnweaveError(
                    f"the {side} rows end after {totals[side]:,} of {n:,} tokens: pass allow_fewer and resume to "
                    "store what there is."
                )
        if isinstance(job, ImageJob):
            write_json(out / IMAGES, job.about_images())
        finished = _complete(out, made_from, totals, loaded, places)
        for lock in out.glob(".*.lock") if finished else ():
            lock.unlink(missing_ok=True)
    return open_cache(out) if finished else None


def _rank(rank: int | None, world: int | None) -> tuple[int, int]:
    """Which process this is, and of how many; torchrun says so in the environment."""
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    if not 0 <= rank < world:
        raise UnweaveError(f"rank={rank} is not one of world={world} processes, which count from 0.")
    return rank, world


def config_of(data: Any) -> DataConfig:
    """How a token folder was laid out; the defaults for anything else."""
    folder = find_token_folder(Path(data).expanduser()) if isinstance(data, str | Path) else None
    return DataConfig() if folder is None else DataConfig(**open_token_folder(folder).manifest["config"])


def _about_rows(rows: Any) -> dict[str, Any]:
    """What identifies rows that are laid out already, as far as they say."""
    source, config = getattr(rows, "source", None), getattr(rows, "config", None)
    fingerprint = getattr(rows, "fingerprint", None) or getattr(source, "fingerprint", None)
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    name = Path(getattr(source, "name", type(rows).__name__)).name
    return {
        "data": {"name": name, "fingerprint": fingerprint},
        "config": json.loads(json.dumps(settings | {"context": rows.context}, default=str)),
    }


def _rows_of_text(
    folder: Path,
    open_side: Callable[..., TokenRows],
    wanted: Mapping[Side, int],
    fewer: Mapping[Side, bool],
    made_from: Mapping[str, Any],
    temporary: str,
) -> dict[Side, Rows]:
    """The rows of each side that hold the tokens wanted, out of the cache's token folder, which is made first."""
    if not (folder / MANIFEST).is_file():
        about = {key: made_from[key] for key in ("tokenizer", "config", "data")}
        opened: dict[Side, Callable[[], TokenRows]] = {
            side: partial(open_side, held_out=side == "held_out") for side in SIDES
        }
        write_tokens(folder, opened, wanted, fewer, made_from["positions"], about, temporary)
    tokens = open_token_folder(folder)
    return {side: FolderRows(tokens, side) for side in SIDES}


def _complete(
    out: Path, made_from: dict[str, Any], totals: Mapping[Side, int], model: LoadedModel, places: Sequence[Hook]
) -> bool:
    """Write the whole manifest, if all shards are there."""
    shards: dict[Side, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for side, total in totals.items():
        while (there := sum(shard["rows"] for shard in shards[side])) < total:
            folder = shard_folder(side, len(shards[side]))
            if (shard := read_shard(out / folder)) is None:
                return False
            shards[side].append({"folder": folder} | shard)
        assert there == total
        shards[side] = [shard for shard in shards[side] if shard["rows"]]  # all of its images may be bad
    first = shards["train"][0]
    files, known = slugs(made_from["hooks"]), aliases(model.module)
    tokenizer = model.tokenizer if made_from["rows"] == "text" else None
    ids = None if tokenizer is None else sorted(set(tokenizer.all_special_ids))
    special = None if ids is None else {str(i): str(tokenizer.convert_ids_to_tokens(i)) for i in ids}  # type: ignore[union-attr]
    whole = {
        "dtype": made_from["dtype"],
        "hooks": [
            {
                "name": str(hook),
                "file": files[str(hook)],
                "width": first["widths"][str(hook)],
                "tl_name": tl_name(model.module, hook),
                "head": head_index(model.module, hook),
                "aliases": sorted(alias for alias, place in known.items() if place == str(hook)),
            }
            for hook in places
        ],
        "records": first["records"],
        "special_ids": special,
        "sides": {
            side: {
                "rows": totals[side],
                "shards": [{key: shard[key] for key in ("folder", "rows", "files")} for shard in shards[side]],
            }
            for side in SIDES
        },
        "complete": True,
    }
    if (out / IMAGES).is_file():
        whole["images"] = {"bytes": (out / IMAGES).stat().st_size, "blake2b": checksum(out / IMAGES)}
    write_json(out / MANIFEST, manifest_head(made_from) | whole)
    return True
