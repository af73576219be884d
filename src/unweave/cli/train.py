"""`unweave train`: from a model and text to trained, evaluated, saved SAEs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from unweave._errors import UnweaveError
from unweave.cli.output import shown, status


@dataclass
class TrainArgs:
    """Train SAEs on the activations of a model.

    Everything can also stand in a TOML file (--config run.toml), whose keys are the fields of TrainConfig; a [[saes]]
    table for each SAE. What is given on the line wins, and settings of an SAE given on the line apply to all of them.
    """

    config: Annotated[Path | None, shown("PATH")] = None
    """TOML file with the settings of the run."""
    model: Annotated[str | None, shown("NAME", "demo")] = None
    """"demo" (the model that ships with unweave), a Hugging Face name, or a local folder."""
    data: Annotated[str | None, shown("NAME", "stdlib")] = None
    """"stdlib", a .txt, .jsonl or .parquet file, a folder of them, or a Hugging Face dataset."""
    hooks: Annotated[tuple[str, ...] | None, shown("NAME ...", "resid_post.1")] = None
    """Where to take activations: module paths, globs (h.*.mlp) or aliases (resid_post.1)."""
    tokens: Annotated[int | None, shown("N", "2,000,000")] = None
    """Tokens to train on."""
    out: Annotated[str | None, shown("FOLDER", "unweave-run")] = None
    """Folder for the SAEs, metrics.jsonl, eval.json and checkpoints."""
    d_sae: Annotated[int | None, shown("N", "16,384")] = None
    """Number of latents."""
    activation: Annotated[
        Literal["topk", "batchtopk", "relu", "jumprelu", "gated"] | None,
        shown("{topk,batchtopk,relu,jumprelu,gated}", "topk"),
    ] = None
    """Activation function."""
    k: Annotated[int | None, shown("K", "32")] = None
    """Active latents per token, for topk and batchtopk."""
    l1: Annotated[float | None, shown("X", "0.1 * sqrt(d_in)")] = None
    """L1 coefficient, for relu and gated."""
    target_l0: Annotated[float | None, shown("X", "32")] = None
    """Mean number of active latents to reach, for jumprelu."""
    matryoshka: Annotated[tuple[float, ...] | None, shown("WIDTH ...", "none")] = None
    """Prefixes of the dictionary that reconstruct by themselves: shares of d_sae, or numbers of latents."""
    multi_topk: Annotated[int | None, shown("K", "none")] = None
    """Larger k of a second reconstruction, for topk and batchtopk."""
    pre_act: Annotated[float | None, shown("X", "none")] = None
    """Coefficient of the pre-activation loss on dead latents, for jumprelu, relu and gated."""
    ghost: Annotated[float | None, shown("X", "none")] = None
    """Coefficient of ghost gradients for dead latents, in AuxK's place."""
    lr: Annotated[float | None, shown("X", "2e-4 / sqrt(d_sae / 16384)")] = None
    """Learning rate."""
    precision: Annotated[Literal["auto", "fp32", "bf16"] | None, shown("{auto,fp32,bf16}", "auto")] = None
    """Of dense products. The codes are those of fp32 either way, once few latents fire."""
    batch_size: Annotated[int | None, shown("N", "4096")] = None
    """Tokens in an optimiser step."""
    context: Annotated[int | None, shown("N", "128")] = None
    """Tokens in a row."""
    column: Annotated[str | None, shown("NAME", "found by its usual names")] = None
    """Text column of .jsonl, .parquet and Hugging Face data."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network instead of downloading it first."""
    held_out: Annotated[float | None, shown("X", "0.05")] = None
    """Share of the documents kept from training."""
    buffer: Annotated[int | None, shown("N", "32 batches")] = None
    """Tokens in the shuffling ring."""
    checkpoint_every: Annotated[int | None, shown("N", "none")] = None
    """Tokens between checkpoints; one is always written at an interruption."""
    seed: Annotated[int | None, shown("N", "0")] = None
    """Every random choice follows from it."""
    device: Annotated[str | None, shown("NAME", "a GPU if there is one")] = None
    """Where to run."""
    eval_tokens: int = 100_000
    """Held-out tokens to evaluate each SAE on afterwards; 0 for none."""
    resume: bool = False
    """Go on from the checkpoint in --out; the other settings are read from there."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    dry_run: bool = False
    """Print shapes, steps, bytes and expected time, and stop."""

    def run(self) -> None:
        from unweave.training import train
        from unweave.training.train import prepare

        config = self.to_config()
        if self.dry_run:
            print(prepare(config).plan())
            return
        result = train(config, resume=self.resume, overwrite=self.overwrite)
        for folder in result.folders:
            print(f"saved {folder}")
        if self.eval_tokens:
            evaluate_saved(result, config, self.eval_tokens)

    def to_config(self) -> Any:
        """The run's TrainConfig: the TOML file or the resumed run's, with what was given on the line on top."""
        from unweave.training.config import TrainConfig, from_dict, to_dict
        from unweave.training.train import read_run_config

        out = self.out or "unweave-run"
        settings = read_toml(self.config) if self.config else {}
        if self.resume:
            settings = to_dict(read_run_config(Path(out)))
        for name in ("model", "data", "tokens", "batch_size", "buffer", "checkpoint_every", "seed", "device"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.hooks is not None:
            settings["hooks"] = list(self.hooks)
        settings["out"] = self.out or settings.get("out") or out
        text = settings.setdefault("text", {})
        for name in ("context", "column", "held_out"):
            if getattr(self, name) is not None:
                text[name] = getattr(self, name)
        if self.streaming:
            text["streaming"] = True
        settings["saes"] = [self.sae_settings(sae) for sae in settings.get("saes") or [{}]]
        return from_dict(TrainConfig, settings)

    def sae_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of one SAE with what was given on the line on top."""
        for name in ("d_sae", "lr", "precision"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.activation is not None and settings.get("activation", {}).get("type") != self.activation:
            settings["activation"] = {"type": self.activation}
        kind = settings.get("activation", {"type": "topk"}).get("type")
        for value, flag, kinds in (
            (self.k, "--k", ("topk", "batchtopk")), (self.l1, "--l1", ("relu", "gated")),
            (self.target_l0, "--target-l0", ("jumprelu",)),
        ):  # fmt: skip
            if value is not None and kind not in kinds:
                raise UnweaveError(f"{flag} goes with --activation {' or '.join(kinds)}, not with {kind}.")
        if self.k is not None:
            settings["activation"] = {"type": kind, "k": self.k}
        if self.l1 is not None:
            settings["sparsity"] = {"type": "l1", "coefficient": self.l1}
        if self.target_l0 is not None:
            settings["sparsity"] = {"type": "target_l0", "l0": self.target_l0}
        for name, key in (
            ("matryoshka", "prefixes"), ("multi_topk", "k"), ("pre_act", "coefficient"), ("ghost", "coefficient"),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                settings[name] = (settings.get(name) or {}) | {key: getattr(self, name)}
        return settings


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"the config {str(path)!r} cannot be read: {error}.") from error


def evaluate_saved(result: Any, config: Any, tokens: int) -> list[Any]:
    """Evaluate trained SAEs on held-out text, write an `eval.json` for each, and print their tables."""
    from rich.console import Console

    from unweave.evaluation import evaluate

    reports = []
    for sae, folder in zip(result.saes, result.folders, strict=True):
        with status(f"evaluating {folder}") as tick:
            report = evaluate(
                sae, model=result.model, data=config.data, hook=sae.metadata["hf_hook_name"], tokens=tokens,
                data_config=config.text, masks=config.masks, seed=config.seed, progress=tick,
            )  # fmt: skip
        path = folder.parent / "eval.json" if folder.name == "sae" else folder / "eval.json"
        report.save(path)
        Console().print(report.table())
        print(f"saved {path}")
        reports.append(report)
    return reports
