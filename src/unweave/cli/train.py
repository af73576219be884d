"""`unweave train`: from a model and text to trained, evaluated, saved SAEs."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from unweave._errors import UnweaveError, nearest
from unweave.cli.evaluate import evaluate_saved
from unweave.cli.output import shown

_COEFFICIENTS = {"kl": "kl", "ce": "ce", "balanced": "beta"}
"""Of `EndToEnd`, by what --end-to-end calls the loss."""


@dataclass
class TrainArgs:
    """Train SAEs on the activations of a model.

    Everything can also stand in a TOML file (--config run.toml), whose keys are the fields of TrainConfig; a [[saes]]
    table for each SAE. What is given on the line wins, and settings of an SAE given on the line apply to all of them.
    """

    config: Annotated[Path | None, shown("PATH")] = None
    """TOML file with the settings of the run."""
    model: Annotated[str | None, shown("NAME", "demo")] = None
    """"demo" or "demo-vit" (the models that ship with unweave), a Hugging Face name, or a local folder."""
    data: Annotated[str | None, shown("NAME", "stdlib")] = None
    """"stdlib" (images: "digits"), files or folders of text or images, a dataset of the Hub, tokens or a cache."""
    hooks: Annotated[tuple[str, ...] | None, shown("NAME ...", "resid_post.1")] = None
    """Where to take activations: module paths, globs (h.*.mlp) or aliases (resid_post.1)."""
    target: Annotated[tuple[str, ...] | None, shown("NAME ...", "none")] = None
    """What transcoders predict from the hooks, one for each; makes --coder transcoder the default."""
    coder: Annotated[
        Literal["sae", "transcoder", "crosscoder", "clt"] | None, shown("{sae,transcoder,crosscoder,clt}", "sae")
    ] = None
    """An SAE of each hook, a transcoder from each to its target, or one crosscoder or cross-layer one (clt) of all."""
    skip: bool = False
    """Give transcoders a linear map from their input to their target."""
    glu: bool = False
    """Multiply what SAEs and transcoders encode by a second, learnt factor, a gated linear unit."""
    tokens: Annotated[int | None, shown("N", "2,000,000")] = None
    """Tokens to train on."""
    out: Annotated[str | None, shown("FOLDER", "unweave-run")] = None
    """Folder for the SAEs, metrics.jsonl, eval.json and checkpoints."""
    recipe: Annotated[str | None, shown("NAME", "none")] = None
    """A published recipe (april_2024, topk, gemma_scope, ...), whose settings the others change."""
    d_sae: Annotated[int | None, shown("N", "16,384")] = None
    """Number of latents."""
    activation: Annotated[str | None, shown("NAME", "topk")] = None
    """Activation function: topk, batchtopk, abstopk, groupmax, relu, tanhrelu, jumprelu, gated, or a registered one."""
    k: Annotated[float | None, shown("K", "32")] = None
    """Active latents per token, for topk, batchtopk (there it need not be whole), abstopk and groupmax."""
    end_to_end: Annotated[Literal["kl", "ce", "balanced"] | None, shown("{kl,ce,balanced}", "none")] = None
    """Train on what the SAE does to the model's predictions: KL, next-token loss, or KL and error at equal weight."""
    downstream: Annotated[tuple[str, ...] | None, shown("HOOK ...", "none")] = None
    """Later hooks whose error is trained on as well; makes --end-to-end kl the default."""
    l1: Annotated[float | None, shown("X", "0.1 * sqrt(d_in)")] = None
    """L1 coefficient, for relu, tanhrelu and gated."""
    target_l0: Annotated[float | None, shown("X", "32 for jumprelu")] = None
    """Mean number of active latents to reach, for jumprelu, relu, tanhrelu and gated."""
    matryoshka: Annotated[tuple[float, ...] | None, shown("WIDTH ...", "none")] = None
    """Prefixes of the dictionary that reconstruct by themselves: shares of d_sae, or numbers of latents."""
    multi_topk: Annotated[int | None, shown("K", "none")] = None
    """Larger k of a second reconstruction, for topk and batchtopk."""
    pre_act: Annotated[float | None, shown("X", "none")] = None
    """Coefficient of the pre-activation loss on dead latents, for jumprelu, relu and gated."""
    ghost: Annotated[float | None, shown("X", "none")] = None
    """Coefficient of ghost gradients for dead latents, in AuxK's place."""
    normalize: Annotated[
        Literal["scalar", "center", "whiten", "layer_norm", "constant_norm_rescale"] | None, shown("KIND", "scalar")
    ] = None
    """What is done to activations before training: scalar, center, whiten, layer_norm or constant_norm_rescale."""
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
    max_bad: Annotated[int | None, shown("N", "100; 10 images")] = None
    """Documents or images that may be left out because they cannot be read; each is named."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network instead of downloading it first."""
    held_out: Annotated[float | None, shown("X", "0.05")] = None
    """Share of the documents kept from training."""
    buffer: Annotated[int | None, shown("N", "32 batches")] = None
    """Tokens in the shuffling ring."""
    prompts_per_pass: Annotated[int | None, shown("N", "as many as are fast and fit")] = None
    """Rows in one forward pass of the model."""
    model_precision: Annotated[Literal["auto", "fp32", "bf16"] | None, shown("{auto,fp32,bf16}", "auto")] = None
    """What the model runs in while SAEs are trained; auto is bf16 where that is faster. It is evaluated in fp32."""
    checkpoint_every: Annotated[int | None, shown("N", "none")] = None
    """Tokens between checkpoints; one is always written at an interruption."""
    seed: Annotated[int | None, shown("N", "0")] = None
    """Every random choice follows from it."""
    device: Annotated[str | None, shown("NAME", "a GPU if there is one")] = None
    """Where to run."""
    model_device: Annotated[str | None, shown("NAME", "the same")] = None
    """Where to run the model, if that is another device than the SAEs'."""
    eval_tokens: int = 100_000
    """Held-out tokens to evaluate each SAE on afterwards; 0 for none."""
    resume: bool = False
    """Go on from the checkpoint in --out, whose settings hold; from the beginning if there is none."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    dry_run: bool = False
    """Print shapes, steps, bytes and expected time, and stop."""

    def run(self) -> None:
        from unweave.training import train
        from unweave.training.train import prepare

        config, model = self.prepared()
        if self.dry_run:
            plan = prepare(config, model).plan()
            print(plan)
            plan.check()
            return
        result = train(config, model=model, resume=self.resume, overwrite=self.overwrite)
        for folder in result.folders:
            print(f"saved {folder}")
        if self.eval_tokens:
            evaluate_saved(result, config, self.eval_tokens, again=not self.resume)

    def to_config(self) -> Any:
        """The run's TrainConfig: the TOML file or the resumed run's, with what was given on the line on top."""
        return self.prepared()[0]

    def prepared(self) -> tuple[Any, Any]:
        """The run's TrainConfig, and the model if a recipe had to ask it for its width."""
        from unweave.training.config import TrainConfig, from_dict, to_dict
        from unweave.training.given import check_given
        from unweave.training.run_folder import read_run_config

        out = self.out or "unweave-run"
        settings = read_toml(self.config) if self.config else {}
        if self.resume and (begun := self.has_begun(Path(out))):
            settings = to_dict(read_run_config(Path(out)))
        for name in (
            "model", "data", "tokens", "batch_size", "buffer", "prompts_per_pass", "model_precision",
            "checkpoint_every", "seed", "device", "model_device",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.hooks is not None:
            settings["hooks"] = list(self.hooks)
        if self.target is not None:
            settings["targets"] = list(self.target)
        settings["out"] = self.out or settings.get("out") or out
        text, images = settings.setdefault("text", {}), settings.setdefault("images", {})
        for name in ("context", "column", "held_out", "max_bad"):
            for part in [text] if name == "context" else [text, images]:
                if getattr(self, name) is not None:
                    part[name] = getattr(self, name)
        if self.streaming:
            text["streaming"] = images["streaming"] = True
        if self.end_to_end is not None or self.downstream is not None:
            settings["end_to_end"] = {_COEFFICIENTS[self.end_to_end or "kl"]: 1.0}
        if self.downstream is not None:
            settings["end_to_end"] |= {"downstream": 1.0, "hooks": list(self.downstream)}
        model = None
        if self.recipe is not None:
            if self.activation is not None:
                raise UnweaveError(f"the recipe {self.recipe!r} has an activation function: leave out --activation.")
            if settings.get("saes") and not self.resume:
                raise UnweaveError(f"give the recipe {self.recipe!r} or the [[saes]] of a file, not both.")
            sae, model = recipe_settings(self.recipe, settings)
            settings["saes"] = [sae]
        settings["saes"] = [self.sae_settings(sae) for sae in settings.get("saes") or [{}]]
        config = from_dict(TrainConfig, settings)
        if not (self.resume and begun):  # otherwise all settings of the run stand there, given or not
            check_given(settings)
        return config, model

    def has_begun(self, out: Path) -> bool:
        """Whether there is a run to resume; if not, it is begun, which needs to be told what it is.

        Raises:
            UnweaveError: It is not told.
        """
        if (out / "config.json").exists():
            return True
        told = (self.config, self.model, self.data, self.hooks, self.tokens, self.recipe, self.d_sae)
        if all(each is None for each in told):
            near = nearest(out.name, (path.name for path in out.parent.iterdir())) if out.parent.is_dir() else ""
            raise UnweaveError(f"there is no run to resume in {str(out)!r}{near or '.'}")
        return False

    def sae_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of one SAE with what was given on the line on top."""
        from unweave.sae import ACTIVATIONS

        for name in ("d_sae", "lr", "precision", "normalize"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.coder is not None or (self.target is not None and settings.get("coder", "sae") == "sae"):
            settings["coder"] = self.coder or "transcoder"
        for name in ("skip", "glu"):
            if getattr(self, name):
                settings[name] = True
        if self.activation is not None and settings.get("activation", {}).get("type") != self.activation:
            settings["activation"] = {"type": self.activation}
        kind = settings.get("activation", {"type": "topk"}).get("type")
        with_k = [name for name, cls in ACTIVATIONS.items() if "k" in {f.name for f in dataclasses.fields(cls)}]
        for value, flag, kinds in (
            (self.k, "--k", with_k), (self.l1, "--l1", ("relu", "tanhrelu", "gated")),
            (self.target_l0, "--target-l0", ("jumprelu", "relu", "tanhrelu", "gated")),
        ):  # fmt: skip
            if value is not None and kind in ACTIVATIONS and kind not in kinds:
                raise UnweaveError(f"{flag} goes with --activation {' or '.join(kinds)}, not with {kind}.")
        if self.k is not None:
            settings["activation"] = settings.get("activation", {"type": kind}) | {"k": self.k}
        if self.l1 is not None:
            settings["sparsity"] = {"type": "l1", "coefficient": self.l1}
        if self.target_l0 is not None and kind == "jumprelu":
            settings["sparsity"] = {"type": "target_l0", "l0": self.target_l0}
        elif self.target_l0 is not None:
            settings["l0_controller"] = (settings.get("l0_controller") or {}) | {"target": self.target_l0}
        for name, key in (
            ("matryoshka", "prefixes"), ("multi_topk", "k"), ("pre_act", "coefficient"), ("ghost", "coefficient"),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                settings[name] = (settings.get(name) or {}) | {key: getattr(self, name)}
        return settings


def recipe_settings(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A recipe's settings as plain values, and the model if the recipe depends on the width of its activations."""
    from unweave.models import load_model
    from unweave.training import recipes
    from unweave.training.cached import cached_data, widths_of
    from unweave.training.config import TrainConfig, to_dict
    from unweave.training.further import widths_at

    if not recipes.needs_width(name):
        return to_dict(recipes.RECIPES[name]()), None
    names, model = settings.get("hooks", TrainConfig.hooks), None
    if (source := cached_data(settings.get("data", TrainConfig.data))) is not None:
        widths = widths_of(source, names)
    else:
        model = load_model(settings.get("model", TrainConfig.model), device=settings.get("device"))
        widths = set(widths_at(model, names).values())
    if len(widths) > 1:
        raise UnweaveError(
            f"the recipe {name!r} depends on the width, and these hooks have {sorted(widths)}: train them in runs of "
            "their own."
        )
    return to_dict(recipes.RECIPES[name](d_in=widths.pop())), model


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"the config {str(path)!r} cannot be read: {error}.") from error
