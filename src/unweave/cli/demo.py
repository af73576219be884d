"""`unweave demo`: the whole way, with the model and the text that are here already."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unweave.cli.output import shown

if TYPE_CHECKING:
    from unweave.training import TrainConfig


@dataclass
class DemoArgs:
    """Train a sparse autoencoder on a model that ships with unweave, evaluate it, and write a page of its features.

    Needs no network, no GPU and about three minutes; with --vision under one.
    """

    out: Path = Path("unweave-demo")
    """Folder for what it writes."""
    vision: bool = False
    """Take the vision transformer and handwritten digits, in place of the language model and text."""
    tokens: Annotated[int | None, shown("N", "1,600,000; with --vision 400,000")] = None
    """Tokens to train on."""
    seed: int = 0
    """Every random choice follows from it."""
    resume: bool = False
    """Go on with a demo that was interrupted."""
    overwrite: bool = False
    """Replace what the folder holds."""

    def run(self) -> None:
        from unweave.cli.evaluate import evaluate_saved
        from unweave.dashboard import dashboard, image_dashboard
        from unweave.training import train

        started = time.perf_counter()
        if self.vision:
            print("A BatchTopK SAE on the patches of a 3-layer vision transformer, looking at handwritten digits.")
            config = vision_config(str(self.out), self.tokens or 400_000, self.seed)
        else:
            print("A BatchTopK SAE on the residual stream of a 4-layer GPT-2, reading Python's own sources.")
            config = demo_config(str(self.out), self.tokens or 1_600_000, self.seed)
        result = train(config, resume=self.resume, overwrite=self.overwrite)
        (report,) = evaluate_saved(result, config, tokens=100_000)
        sae, path = result.saes[0], self.out / "features.html"
        common: dict[str, Any] = {
            "model": result.model, "data": config.data, "tokens": 200_000, "masks": config.masks, "report": report,
            "seed": self.seed,
        }  # fmt: skip
        if self.vision:
            page = image_dashboard(sae, path=path, data_config=config.images, **common)
        else:
            page = dashboard(sae, path=path, data_config=config.text, **common)
        print(f"done in {time.perf_counter() - started:.0f} s:")
        for path, what in (
            (result.folders[0], "the SAE, in a layout that SAELens reads"),
            (self.out / "eval.json", "the numbers above, in SAEBench's shape"),
            (self.out / "metrics.jsonl", "how training went"),
            (page, "open this one in a browser"),
        ):
            print(f"  {path!s:<32} {what}")


def demo_config(out: str | None, tokens: int, seed: int) -> TrainConfig:
    """The demo's run: small enough for two CPU cores, good enough to look into."""
    from unweave.sae import BatchTopK
    from unweave.training import SAEConfig, TrainConfig

    sae = SAEConfig(d_sae=4096, activation=BatchTopK(k=30), lr=4e-3)
    return TrainConfig(
        model="demo", data="stdlib", hooks=("resid_post.2",), saes=(sae,), tokens=tokens, out=out, seed=seed
    )


def vision_config(out: str | None, tokens: int, seed: int) -> TrainConfig:
    """The demo's run on images."""
    from unweave.sae import BatchTopK
    from unweave.training import SAEConfig, TrainConfig

    sae = SAEConfig(d_sae=256, activation=BatchTopK(k=8), lr=2e-3)
    return TrainConfig(
        model="demo-vit", data="digits", hooks=("resid_post.1",), saes=(sae,), tokens=tokens, batch_size=2048,
        prompts_per_pass=128, out=out, seed=seed,
    )  # fmt: skip
