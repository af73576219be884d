"""A world looked into: its statistics, SAEs trained on it, their scores, and the folder with all of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_path, refuse_foreign, write_json
from unweave.sae import SAE
from unweave.synthetic.figures import save_figure
from unweave.synthetic.files import MODEL_FILES, SYNTHETIC_MODEL_WEIGHTS_FILENAME
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.plots import Bar, plot_recovery, plot_sae_feature_similarity, plot_similarity_across_saes
from unweave.synthetic.scores import SyntheticDataEvalResult, eval_sae_on_synthetic_data
from unweave.synthetic.superposition import SuperpositionStats, compute_superposition_stats
from unweave.synthetic.survey import Survey
from unweave.synthetic.training import SyntheticActivationIterator, Toys, named
from unweave.synthetic.world_plots import plot_firing_correlations, plot_firing_rates, plot_superposition
from unweave.synthetic.worlds import World
from unweave.training.config import SAEConfig
from unweave.training.finish import save_finished
from unweave.training.run_folder import OURS
from unweave.training.trainer import Run, fit

ALL_PAIRS = 20_000
"""Features up to which each is compared with all others; above, a sample of `SAMPLED` is."""
SAMPLED = 256
SHOWN_LATENTS = 4096
"""Latents and features up to which a similarity heat map still has something to show."""
SCALE = 2.0
FOLDERS, FILES = ("model", "pictures", "saes"), ("metrics.jsonl", "results.json")
_DRAWN = r"(firing_rates|correlations|superposition|recovery|similarity(_\d+_\w+)?)\.(png|svg)"
_OURS = re.compile("|".join([*map(re.escape, MODEL_FILES), _DRAWN, OURS.pattern]))
"""Files in the folders."""


@dataclass(eq=False)
class Study:
    """What was found out about a world.

    Attributes:
        world: The world.
        model: Its data.
        survey: What a sample shows.
        superposition: How much its features overlap; of a sample of them if there are very many.
        saes: The SAEs trained on it, for its raw activations; in the order of the world's configs.
        scores: How well each recovered it.
        history: Every logged row of their training.
    """

    world: World
    model: SyntheticModel
    survey: Survey
    superposition: SuperpositionStats
    saes: list[SAE] = field(default_factory=list)
    scores: list[SyntheticDataEvalResult] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The trained SAEs in few words."""
        return short_names(self.world.saes[: len(self.saes)])

    def results(self) -> dict[str, Any]:
        """Everything but the weights and the counts of single features, as JSON values."""
        overlap = self.superposition
        superposition = {
            "features_compared": len(overlap.feature_indices), "max_abs_cos": overlap.mean_max_abs_cos_sim,
            "largest_abs_cos": float(overlap.max_abs_cos_sims.max()), "mean_abs_cos": overlap.mean_abs_cos_sim,
            "expected_interference": overlap.mean_expected_interference,
        }  # fmt: skip
        saes = [
            {"name": name, "folder": folder, "scores": score.to_dict()}
            for name, folder, score in zip(self.names, sae_folders(self.world.saes), self.scores, strict=False)
        ]
        return {
            "world": self.world.to_dict(), "statistics": self.survey.summary(), "superposition": superposition,
            "saes": saes,
        }  # fmt: skip

    def save(self, out: Path, pictures: bool = True) -> list[Path]:
        """Write the model, the SAEs, `metrics.jsonl`, pictures and, at the very end, `results.json`.

        What an earlier study left in the folder is replaced, and nothing else in it is touched.

        Returns:
            What was written, in words fit for a list.
        """
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        self.model.save(out / "model")
        written = [out / "model"]
        for sae, config, folder in zip(self.saes, self.world.saes, sae_folders(self.world.saes), strict=False):
            written.append(save_finished(sae, config, out / folder))
        if self.history:
            with atomic_path(out / "metrics.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
            written.append(out / "metrics.jsonl")
        if pictures:
            written += draw(self, out / "pictures")
        write_json(out / "results.json", self.results())
        return [*written, out / "results.json"]


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that a study must not be written to.

    Raises:
        UnweaveError: If it is a file, or not empty and either nobody asked to overwrite it or it holds no study.
    """
    if out.exists() and not out.is_dir():
        raise UnweaveError(f"the output {str(out)!r} is a file; name a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UnweaveError(f"the folder {str(out)!r} is not empty; pass --overwrite to replace the study in it.")
    if not _is_study(out):
        raise UnweaveError(f"the folder {str(out)!r} holds something that is no study of a world; name another one.")
    refuse_foreign(out, FOLDERS, _OURS)


def _is_study(out: Path) -> bool:
    """Whether a folder holds a finished study, or what a killed one had written of it."""
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (out / "model" / SYNTHETIC_MODEL_WEIGHTS_FILENAME).is_file()  # the first thing that is written
    return isinstance(results, dict) and {"world", "statistics"} <= results.keys()


def superposition_of(model: SyntheticModel, rates: Float[Tensor, " features"]) -> SuperpositionStats:
    """The overlap of a world's features, with the interference that firing at these rates causes."""
    generator, n = model.activation_generator, model.cfg.num_features
    return compute_superposition_stats(
        model.feature_dict, percentiles=[], num_sampled=None if n <= ALL_PAIRS else SAMPLED, seed=0,
        firing_probabilities=rates.float(), mean_firing_magnitudes=generator.mean_firing_magnitudes,
        std_firing_magnitudes=generator.std_firing_magnitudes,
    )  # fmt: skip


def train_saes(
    world: World, model: SyntheticModel, seed: int = 0, progress: bool = True
) -> tuple[list[SAE], list[dict[str, Any]]]:
    """Train a world's SAEs on one stream by the ordinary trainer; every SAE sees every batch.

    Args:
        world: What to train, and for how long.
        model: The data, whose stream moves on.
        seed: Gives the initial weights: the first SAE's is `seed`, the second's `seed + 1`, ...
        progress: Whether to show progress on standard error.

    Returns:
        The SAEs, for raw activations, and the logged rows.
    """
    batches = SyntheticActivationIterator(model.feature_dict, model.activation_generator, world.batch_size)
    toys = Toys(world.saes, batches, world.training_samples, seed=seed, starts=[None] * len(world.saes))
    run = Run({"": toys.trainees}, world.training_samples)
    fit(run, named(batches), progress=progress)
    return [toys.finished(i) for i in range(len(world.saes))], run.history


def score(world: World, model: SyntheticModel, sae: SAE) -> SyntheticDataEvalResult:
    """Score an SAE on a world, on samples that are the same for all."""
    return eval_sae_on_synthetic_data(
        sae, model.feature_dict, model.activation_generator, world.eval_samples, hierarchy=model.hierarchy
    )


def draw(study: Study, folder: Path) -> list[Path]:
    """Draw a study's pictures, each as PNG and SVG; returns the PNGs."""
    survey, world, model = study.survey, study.world, study.model
    figures = {"firing_rates": plot_firing_rates(survey.requested_rates, survey.counts, survey.samples, world.name)}
    if len(survey.pair_features) > 1:
        shown = len(survey.pair_features)
        which = "" if shown == len(survey.counts) else f": the {shown} features that fire most"
        figures["correlations"] = plot_firing_correlations(
            survey.correlations, survey.requested_correlations, world.name + which
        )
    figures["superposition"] = plot_superposition(
        model.feature_dict.feature_vectors, study.superposition.max_abs_cos_sims, world.name
    )
    if study.saes:
        figures["recovery"] = plot_recovery(study.names, recovery_bars(study.scores), world.name)
    drawable = [
        (name, sae)
        for name, sae in zip(study.names, study.saes, strict=True)
        if max(sae.d_sae, model.cfg.num_features) <= SHOWN_LATENTS
    ]
    if len(drawable) > 1:
        title = f"{world.name}: decoders"
        figures["similarity"] = plot_similarity_across_saes(dict(drawable), model.feature_dict, title)
    for i, (name, sae) in enumerate(drawable):
        figures[f"similarity_{i:02d}_{sae.activation.name}"] = plot_sae_feature_similarity(
            sae, model.feature_dict, f"{world.name}: {name}", reorder_features=True, show_plot=False
        )
    for name, figure in figures.items():
        for suffix in (".png", ".svg"):
            save_figure(figure, folder / f"{name}{suffix}", SCALE)
    return [folder / f"{name}.png" for name in figures]


def recovery_bars(scores: Sequence[SyntheticDataEvalResult]) -> list[Bar]:
    """The panels of `plot_recovery` for some SAEs of one world."""
    bars = [
        Bar("MCC", [s.mcc for s in scores], 1.0, 1.0),
        Bar("F1", [s.classification.f1_score for s in scores], 1.0, 1.0),
        Bar("explained variance", [s.explained_variance for s in scores], 1.0, 1.0),
        Bar("uniqueness", [s.uniqueness for s in scores], 1.0, 1.0),
        Bar("L0 (latents per sample)", [s.sae_l0 for s in scores], scores[0].true_l0),
        Bar("shrinkage (norm ratio)", [s.shrinkage for s in scores], 1.0),
        Bar("dead (latents)", [s.dead_latents for s in scores], 0.0),
    ]
    if scores[0].hierarchy is not None:
        families = [s.hierarchy for s in scores if s.hierarchy is not None]
        bars.append(Bar("absorption (recall lost)", [f.absorption for f in families], 0.0))
        bars.append(Bar("split parents (share)", [f.split_parents for f in families], 0.0, 1.0))
    return bars


def short_names(configs: Sequence[SAEConfig]) -> list[str]:
    """Names that tell SAEs apart: by activation function and objectives, then by width, and last by number."""
    names = []
    for c in configs:
        extras = [type(part).__name__ for part in (c.matryoshka, c.multi_topk, c.ghost, c.pre_act) if part is not None]
        names.append(" ".join([str(c.activation).partition("()")[0], *extras]))
    if len({config.d_sae for config in configs}) > 1:
        names = [f"{name}, {config.d_sae:,}" for name, config in zip(names, configs, strict=True)]
    return [f"{i}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def sae_folders(configs: Sequence[SAEConfig]) -> list[str]:
    """Where each SAE is saved, below the study's folder."""
    return [f"saes/{i:02d}_{config.activation.name}" for i, config in enumerate(configs)]
