"""`unweave dashboard`: a page of a saved SAE's features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unweave.cli.evaluate import saved, source_of
from unweave.cli.output import shown, status


@dataclass
class DashboardArgs:
    """Write one self-contained HTML page that shows a saved SAE's most interesting features."""

    sae: Annotated[tyro.conf.Positional[Path], shown("FOLDER")]
    """Folder of the SAE."""
    out: Annotated[Path | None, shown("FILE", "features.html in the SAE's folder")] = None
    """File to write."""
    model: Annotated[str | None, shown("NAME", "the model that the SAE was trained on")] = None
    """Model to run."""
    data: Annotated[str | None, shown("NAME", "the data that the SAE was trained on")] = None
    """Text or images to read."""
    hook: Annotated[str | None, shown("NAME", "the hook that the SAE was trained at")] = None
    """Where the SAE belongs."""
    tokens: int = 200_000
    """Tokens to look at."""
    features: int = 100
    """How many features to show."""
    context: Annotated[int | None, shown("N", "as in training")] = None
    """Tokens in a row."""
    seed: int = 0
    """Seed of the order of the documents and of the sampled contexts."""

    def run(self) -> None:
        from unweave.dashboard import dashboard, image_dashboard
        from unweave.dashboard.page import check_replaceable
        from unweave.sae import SAE

        path = self.out or self.sae / "features.html"
        check_replaceable(path)
        sae = SAE.load(saved(self.sae))
        write = image_dashboard if "images" in sae.metadata else dashboard
        with status("looking for features") as tick:
            path = write(
                sae, **source_of(sae, self), hook=self.hook, tokens=self.tokens, n_features=self.features,
                path=path, seed=self.seed, progress=tick,
            )  # fmt: skip
        print(f"saved {path}")
