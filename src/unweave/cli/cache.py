"""`unweave cache`: activations of a model, stored once, to train on as often as you like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from unweave._errors import UnweaveError
from unweave.cli.output import shown, status

if TYPE_CHECKING:
    from unweave.activations.cache import Cache


@dataclass
class CacheArgs:
    """Store the activations of a model in a folder that unweave train takes as its --data.

    What is killed goes on with the same command and --resume, and ends in the same bytes. Several processes that are
    started with RANK and WORLD_SIZE in their environment, as torchrun does, share the work.
    """

    hooks: Annotated[tuple[str, ...], shown("NAME ...")]
    """Where to take activations: module paths, globs (h.*.mlp) or aliases (resid_post.1)."""
    tokens: Annotated[int, shown("N")]
    """Tokens to store, exactly."""
    out: Annotated[Path, shown("FOLDER", "unweave-cache")] = Path("unweave-cache")
    """The folder to write."""
    data: Annotated[str, shown("NAME", "stdlib")] = "stdlib"
    """"stdlib", text as for unweave train, or a folder that unweave tokenize wrote; for a vision model images."""
    model: Annotated[str, shown("NAME", "demo")] = "demo"
    """"demo" or "demo-vit" (the models that ship with unweave), a Hugging Face name, or a local folder."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Type to store; int8 has a scale for each token."""
    positions: Annotated[str | None, shown("SLICE", "all")] = None
    """Positions of a row to store, such as 1: or ::4."""
    held_out_tokens: Annotated[int | None, shown("N", "a 20th of --tokens, at most 100,000")] = None
    """Tokens of held-out documents to store besides."""
    context: Annotated[int | None, shown("N", "128, or the token folder's")] = None
    """Tokens in a row."""
    column: Annotated[str | None, shown("NAME", "found by its usual names")] = None
    """Text column of .jsonl, .parquet and Hugging Face data."""
    max_bad: Annotated[int | None, shown("N", "100; 10 images")] = None
    """Documents or images that may be left out because they cannot be read; each is named."""
    held_out: Annotated[float | None, shown("X", "0.05, or the token folder's")] = None
    """Share of the documents kept from training."""
    seed: Annotated[int | None, shown("N", "0")] = None
    """Seed of the order of the documents."""
    prompts_per_pass: int = 32
    """Rows in one forward pass of the model."""
    model_precision: Annotated[Literal["auto", "fp32", "bf16"], shown("{auto,fp32,bf16}", "auto")] = "auto"
    """What the model runs in; auto: bf16 where the hardware is faster at it and the model gains."""
    shard_mb: float = 512.0
    """Megabytes in a shard; what a kill loses at most."""
    device: Annotated[str | None, shown("NAME", "a GPU if there is one")] = None
    """Where to run."""
    allow_fewer: bool = False
    """Store what there is where the data end before --tokens, instead of stopping."""
    resume: bool = False
    """Go on with the unfinished folder --out."""

    def run(self) -> None:
        from dataclasses import replace

        from unweave.activations import ImageConfig
        from unweave.activations.cache import cache
        from unweave.activations.cache.write import config_of
        from unweave.models import load_model

        model = load_model(self.model, device=self.device)
        given = {name: getattr(self, name) for name in ("context", "column", "max_bad", "held_out", "seed")}
        given = {name: value for name, value in given.items() if value is not None}
        if model.vision is not None and "context" in given:
            raise UnweaveError("the rows of images are as long as the images make them: leave out --context.")
        usual: Any = config_of(self.data) if model.vision is None else ImageConfig()
        config = replace(usual, **given)
        if self.shard_mb <= 0:
            raise UnweaveError(f"--shard-mb {self.shard_mb} is not positive.")
        try:
            with status(f"caching {', '.join(self.hooks)}") as tick:
                stored = cache(
                    self.data, self.out, hooks=self.hooks, tokens=self.tokens, model=model, dtype=self.dtype,
                    config=config, positions=self.positions, held_out_tokens=self.held_out_tokens,
                    shard_bytes=max(1, int(self.shard_mb * 1e6)), prompts_per_pass=self.prompts_per_pass,
                    model_precision=self.model_precision,
                    resume=self.resume, allow_fewer=self.allow_fewer, progress=tick,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; go on with the same command and --resume.") from None
        if stored is None:
            print(f"this process is done with its part of {self.out}; others are still writing.")
        else:
            report(stored)


def report(stored: Cache) -> None:
    """What was written, and how well training's batches of it are mixed."""
    from unweave.activations.cache import StoreBatches, shuffle_quality

    files = [file.stat().st_size for file in stored.path.rglob("*") if file.is_file()]
    held_out = 0 if stored.held_out is None else stored.held_out.n_rows
    widths = ", ".join(f"{hook} (width {width})" for hook, width in stored.train.widths.items())
    print(f"saved {stored.path}: {stored.train.n_rows:,} tokens for training, {held_out:,} held out, at {widths}")
    print(f"{stored.dtype}, {sum(files) / 1e6:,.1f} MB in {len(files)} files; hash {stored.hash}")
    size = min(4096, max(2, stored.train.n_rows // 8))
    if stored.train.n_rows >= 2 * size:
        print(shuffle_quality(StoreBatches(stored.train, size, 128 * size, workers=0)))
