"""A whole run on a synthetic world: train SAEs, score them against the known features, save everything.

A folder of one SAE is laid out as SAELens lays out its own: the SAE's files beside `runner_config.json` and
`eval_stats.json`. Several SAEs, trained on the same stream, have a folder each under `saes/`, with their
`eval_stats.json` in it. Streams of the world: `seed + 1` is trained on, seed 0 evaluated on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unweave._errors import UnweaveError
from unweave._files import write_json
from unweave.sae import SAE
from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.runner_config import SyntheticSAERunnerConfig
from unweave.synthetic.scores import SyntheticDataEvalResult, eval_sae_on_synthetic_data
from unweave.synthetic.training import SyntheticActivationIterator, Toys, named
from unweave.training.checkpoint import checkpoints, load_checkpoint
from unweave.training.finish import save_finished
from unweave.training.trainer import Run, fit

RUNNER_CONFIG_FILENAME = "runner_config.json"
EVAL_STATS_FILENAME = "eval_stats.json"
EVAL_HISTORY_FILENAME = "eval_history.json"
MODEL_FOLDER = "synthetic_model"
_FOLDERS = ("saes", "training", "checkpoints", MODEL_FOLDER)
_FILES = (
    "cfg.json", "sae_weights.safetensors", "metrics.jsonl", RUNNER_CONFIG_FILENAME, EVAL_STATS_FILENAME,
    EVAL_HISTORY_FILENAME,
)  # fmt: skip


@dataclass(frozen=True)
class SyntheticSAERunnerResult:
    """What a run gave.

    Attributes:
        saes: The trained SAEs, for raw activations of the world, in the order of their configs.
        synthetic_model: The world.
        evals: The final evaluation of each; empty without one.
        output_path: The folder of the run, if it had one.
        folders: The folder of each SAE; empty if the run had none.
        history: The logged rows of training.
        eval_history: The evaluations during the run: `step`, `samples`, `sae` and every score, flat.
    """

    saes: list[SAE]
    synthetic_model: SyntheticModel
    evals: list[SyntheticDataEvalResult]
    output_path: Path | None
    folders: list[Path]
    history: list[dict[str, Any]]
    eval_history: list[dict[str, Any]]

    @property
    def sae(self) -> SAE:
        """The first SAE."""
        return self.saes[0]

    @property
    def final_eval(self) -> SyntheticDataEvalResult | None:
        """The first SAE's final evaluation, if there was one."""
        return self.evals[0] if self.evals else None


class SyntheticSAERunner:
    """Runs a `SyntheticSAERunnerConfig`.

    Args:
        cfg: The run.
        override_synthetic_model: A world that is there already, in place of the config's.
        override_sae: An SAE for raw activations, of which a copy is trained in place of a fresh one. Only for a run
            of one SAE.

    Raises:
        UnweaveError: If `override_sae` is given for several SAEs.
    """

    def __init__(
        self,
        cfg: SyntheticSAERunnerConfig,
        override_synthetic_model: SyntheticModel | None = None,
        override_sae: SAE | None = None,
    ) -> None:
        if override_sae is not None and len(cfg.saes) > 1:
            raise UnweaveError(f"override_sae is one SAE, and the run has {len(cfg.saes)}.")
        self.cfg, self.override_sae = cfg, override_sae
        self._overridden = override_synthetic_model is not None
        self.synthetic_model = override_synthetic_model or SyntheticModel.load_from_source(
            cfg.synthetic_model, device=cfg.device
        )
        self.eval_history: list[dict[str, Any]] = []

    def run(self, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> SyntheticSAERunnerResult:
        """Train, evaluate, save.

        Args:
            resume: Go on from the checkpoint in the output folder. The batches that were trained on are drawn again
                and dropped, and the run ends bit-equal to one that was never stopped.
            overwrite: Replace the run that the output folder holds.
            progress: Whether to show progress on standard error.

        Raises:
            UnweaveError: If the folder holds another run, or there is nothing to resume.
            TrainingInterrupted: After Ctrl-C, once a checkpoint is written.
        """
        cfg, out = self.cfg, None if self.cfg.output_path is None else Path(self.cfg.output_path)
        state = self._claim(out, resume=resume, overwrite=overwrite)
        model = self.synthetic_model
        stream = model.activation_generator.fork(cfg.seed + 1)
        iterator = SyntheticActivationIterator(model.feature_dict, stream, cfg.batch_size, device=cfg.device)
        configs = cfg.saes_with_schedule()
        starts = [self.override_sae] * len(configs)
        toys = Toys(configs, iterator, cfg.training_samples, seed=cfg.seed, starts=starts)
        run = Run({"": toys.trainees}, cfg.training_samples, out)
        self.eval_history, world = [], _fingerprint(model)
        if state is not None:
            run.load_state_dict(state["run"])
            self.eval_history = state["stream"]["eval_history"]
            iterator.skip(run.step)

        def after_step() -> None:
            if cfg.eval_frequency and run.step % cfg.eval_frequency == 0:
                for i in range(len(configs)):
                    scores = self._evaluate(toys.finished(i)).to_log_dict()
                    self.eval_history.append({"step": run.step, "samples": run.seen, "sae": i, **scores})
                if out is not None:
                    write_json(out / EVAL_HISTORY_FILENAME, self.eval_history)

        fit(
            run,
            named(iterator),
            progress=progress,
            checkpoint_every=-(-cfg.training_samples // (cfg.n_checkpoints + 1)) if cfg.n_checkpoints else None,
            stream_state=lambda: {"eval_history": self.eval_history, "world": world},
            how_to_resume="Go on with run(resume=True).",
            after_step=after_step,
        )
        return self._finish(toys, run, out)

    def _finish(self, toys: Toys, run: Run, out: Path | None) -> SyntheticSAERunnerResult:
        saes = [toys.finished(i) for i in range(len(toys.trainees))]
        folders: list[Path] = []
        if out is not None:
            folders = [out]
            if len(saes) > 1:
                folders = [out / "saes" / f"{i:02d}_{sae.activation.name}" for i, sae in enumerate(saes)]
            for sae, trainee, folder in zip(saes, toys.trainees, folders, strict=True):
                save_finished(sae, trainee.config, folder)
        evals = [self._evaluate(sae) for sae in saes] if self.cfg.run_final_eval else []
        if out is not None:
            for folder, result in zip(folders, evals, strict=False):  # there may be no evaluation
                write_json(folder / EVAL_STATS_FILENAME, result.to_dict())
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return SyntheticSAERunnerResult(
            saes, self.synthetic_model, evals, out, folders, run.history, list(self.eval_history)
        )

    def _evaluate(self, sae: SAE) -> SyntheticDataEvalResult:
        model = self.synthetic_model
        return eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, self.cfg.eval_samples, hierarchy=model.hierarchy
        )

    def _claim(self, out: Path | None, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Check the output folder and write the config into it; the state to resume from, if any."""
        if out is None:
            if resume:
                raise UnweaveError("a run without an output folder cannot be resumed.")
            return None
        values = json.loads(json.dumps(self.cfg.to_dict()))
        if resume:
            return self._resume(out, values)
        if out.exists() and not out.is_dir():
            raise UnweaveError(f"the output {str(out)!r} is a file; name a folder.")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UnweaveError(f"the folder {str(out)!r} is not empty; pass resume=True or overwrite=True.")
        taken = [name for name in (*_FOLDERS, *_FILES) if (out / name).exists()]
        if taken and not (out / RUNNER_CONFIG_FILENAME).exists():
            raise UnweaveError(f"{str(out / taken[0])!r} is not of a run that is to be replaced: name another folder.")
        for name in _FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        write_json(out / RUNNER_CONFIG_FILENAME, values)
        if self.cfg.save_synthetic_model:
            self.synthetic_model.save(out / MODEL_FOLDER)
        return None

    def _resume(self, out: Path, values: dict[str, Any]) -> dict[str, Any]:
        saved = checkpoints(out / "checkpoints")
        if not saved:
            raise UnweaveError(f"there is no checkpoint to resume from in {str(out)!r}.")
        try:
            before = json.loads((out / RUNNER_CONFIG_FILENAME).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UnweaveError(f"the folder {str(out)!r} has no readable {RUNNER_CONFIG_FILENAME}: {error}.") from error
        for key, value in values.items():
            if key not in ("output_path", "device") and value != before.get(key):
                raise UnweaveError(
                    f"the run in {str(out)!r} has {key}={before.get(key)!r}, so it cannot go on with {value!r}."
                )
        state = load_checkpoint(saved[-1], self.cfg.device)
        if self.cfg.save_synthetic_model and not self._overridden:
            self.synthetic_model = SyntheticModel.load_from_disk(out / MODEL_FOLDER, device=self.cfg.device)
        if state["stream"]["world"] != _fingerprint(self.synthetic_model):
            raise UnweaveError(
                f"the run in {str(out)!r} is on another synthetic model: give its config a seed, or save it with "
                "save_synthetic_model=True, if it is to be resumed."
            )
        return state


def _fingerprint(model: SyntheticModel) -> str:
    """Changes with the features, their bias and what fires."""
    generator = model.activation_generator
    tensors = [*model.feature_dict.parameters(), *(b for _, b in generator.named_buffers())]
    found = hashlib.sha256(str(generator.seed).encode())
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
