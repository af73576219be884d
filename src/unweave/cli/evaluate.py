"""`unweave eval`: how good a saved SAE is, on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from unweave.cli.output import status


@dataclass
class EvalArgs:
    """Evaluate a saved SAE on held-out text: a table here, and eval.json in SAEBench's shape."""

    sae: tyro.conf.Positional[Path]
    """Folder of the SAE."""
    model: str | None = None
    """Default: the model that the SAE was trained on."""
    data: str | None = None
    """Default: the data that the SAE was trained on."""
    hook: str | None = None
    """Default: the hook that the SAE was trained at."""
    tokens: int = 200_000
    """Held-out tokens to evaluate on."""
    context: int | None = None
    """Tokens in a row. Default: as in training."""
    held_out: float | None = None
    """Share of the documents that is held out. Default: as in training."""
    out: Path | None = None
    """File to write. Default: eval.json in the SAE's folder."""
    seed: int = 0
    """Seed of the order of the documents."""
    device: str | None = None
    """Where to run. Default: a GPU if there is one."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.evaluation import evaluate
        from unweave.sae import SAE

        sae = SAE.load(self.sae)
        with status(f"evaluating {self.sae}") as tick:
            report = evaluate(
                sae, **source_of(sae, self), hook=self.hook, tokens=self.tokens, device=self.device, seed=self.seed,
                progress=tick,
            )  # fmt: skip
        Console().print(report.table())
        path = self.out or self.sae / "eval.json"
        report.save(path)
        print(f"saved {path}")


def source_of(sae: object, args: object) -> dict[str, object]:
    """Model, data and how to read them: from the command line, else as the SAE was trained."""
    from unweave._errors import UnweaveError
    from unweave.activations import DataConfig

    metadata = sae.metadata  # type: ignore[attr-defined]
    found = {}
    for name, key in (("model", "model_name"), ("data", "dataset_path")):
        found[name] = getattr(args, name) or metadata.get(key)
        if found[name] is None:
            raise UnweaveError(f"the SAE does not say which {name} it was trained on; pass --{name}.")
    text = {
        "context": getattr(args, "context", None) or metadata.get("context_size"),
        "held_out": getattr(args, "held_out", None),
        "bos": metadata.get("prepend_bos"),
    }
    return found | {"data_config": DataConfig(**{k: v for k, v in text.items() if v is not None})}
