"""The main job: from a model and text or images to trained SAEs on disk.

    data -> tokens -> activations at every hook in one pass -> masks -> shuffling ring -> the training loop -> folders

From a cache of activations, reading takes the place of all that comes before the loop.
A run is a function of its config. `resume=True` goes on from the last checkpoint and ends bit-equal to a run that was
never interrupted (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import write_json
from unweave.activations import ActivationStream, ShuffledBatches
from unweave.models import LoadedModel, dtype_of, head_index, load_model, resolve_hooks, tl_name
from unweave.sae import SAE
from unweave.training.cached import CachedSession, cached_data
from unweave.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from unweave.training.config import TrainConfig, from_dict, to_dict
from unweave.training.finish import finished_sae, save_finished
from unweave.training.harvest import ahead_of, live_stream
from unweave.training.plan import CALIBRATION_TOKENS, Plan, plan_run
from unweave.training.progress import say
from unweave.training.rows import AnyRows, as_tokenized, held_out_share, open_rows, rows_metadata
from unweave.training.sites import Site, sites_of, where
from unweave.training.trainees import trainees_at
from unweave.training.trainer import Run, fit


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        saes: The trained SAEs: all configs at the first hook, then at the second, and so on.
        folders: Where each was saved; empty if the run had no folder.
        history: The rows of `metrics.jsonl`.
    """

    saes: list[SAE]
    folders: list[Path]
    history: list[dict[str, Any]]
    session: Session | CachedSession = field(repr=False)
    """What was trained on."""

    @property
    def model(self) -> Any:
        """The `LoadedModel` that was used. After training from a cache it is loaded now; None if it is not here."""
        return self.session.model


@dataclass
class Session:
    """A prepared run: everything is loaded and checked, nothing is trained."""

    config: TrainConfig
    model: LoadedModel
    sites: list[list[Site]]
    """Of each SAE of the config."""
    rows: AnyRows
    stream: ActivationStream
    data: Any

    def plan(self, seconds: float = 0.0) -> Plan:
        """Shapes, steps, bytes and time, measured on some forward passes (for `seconds`, at least) and steps."""
        return plan_run(self.config, self.stream, self.sites, seconds)

    @contextmanager
    def batches(self) -> Iterator[ShuffledBatches]:
        """Shuffled batches without end, the model running ahead if it is to."""
        with ahead_of(self.config, self.stream) as stream:
            yield ShuffledBatches(stream, self.config.batch_size, self.config.ring_size, self.config.seed)

    def held_out(self) -> dict[str, Tensor]:
        """Activations of held-out documents (of training ones if the text was given as training text alone)."""
        return _held_out_activations(self)

    def metadata(self, site: Site) -> dict[str, Any]:
        """Where an SAE comes from."""
        return _metadata(self, site)


def prepare(config: TrainConfig, model: Any = None, data: Any = None) -> Session | CachedSession:
    """Load the model, open the data, and resolve the hooks; raises UnweaveError where one of them is wrong.

    From a cache, the model is only loaded if something asks for it.
    """
    if (cached := cached_data(config.data if data is None else data)) is not None:
        return CachedSession.of(config, cached, model)
    loaded = (
        model
        if isinstance(model, LoadedModel)
        else load_model(model or config.model, device=config.model_device or config.device)
    )
    hooks = [str(hook) for hook in resolve_hooks(loaded.module, config.hooks)]
    targets = [str(hook) for hook in resolve_hooks(loaded.module, config.targets)]
    sites = [sites_of(sae, hooks, targets) for sae in config.saes]
    data = config.data if data is None else data
    if loaded.vision is None:
        config = replace(config, text=as_tokenized(data, config.text))
    rows = open_rows(data, loaded, config, held_out=False, repeat=True)
    if held_out_share(loaded, config) > 0:
        rows.peek(1)  # what is wrong with all of the data is not to be taken for a fault of the held-out side
        _check_held_out(data, loaded, config)
    places = resolve_hooks(loaded.module, list(dict.fromkeys([*hooks, *targets])))
    stream = live_stream(config, loaded, places, rows)
    return Session(config, loaded, sites, rows, stream, data)


def _check_held_out(data: Any, model: LoadedModel, config: TrainConfig) -> None:
    """Find out before training, not after it, whether there is anything to evaluate on."""
    try:
        open_rows(data, model, config, held_out=True).peek(1)
    except UnweaveError as error:
        raise UnweaveError(f"{str(error).rstrip('.')}; with held_out=0 all of the data are trained on.") from error


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    data: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train every SAE of `config` at every hook, on the same batches.

    Args:
        config: The run.
        model: A model that is loaded already, in place of `config.model`.
        data: Texts, tokens or images that are in memory, in place of `config.data`; anything that `TokenRows` or, for
            a vision model, `ImageRows` takes. A cache, or any `Store`: then no pass of the model is made.
        resume: Go on from the checkpoint in `config.out`.
        overwrite: Replace what `config.out` holds.
        progress: Whether to show the plan and the progress on standard error.

    Returns:
        The trained SAEs, and where they are.

    Raises:
        UnweaveError: If something about the input is wrong; nothing has been written then.
        TrainingInterrupted: After Ctrl-C, once a checkpoint is written.
    """
    out = Path(config.out) if config.out is not None else None
    checkpoint = _check_folder(config, out, resume=resume, overwrite=overwrite)
    session = prepare(config, model, data)
    plan = session.plan()
    plan.check()
    if progress:
        say(str(plan))

    with session.batches() as batches:
        state_now = partial(batches.state_dict, copy=False)  # it is written at once, and as large as the ring
        state = load_checkpoint(checkpoint) if checkpoint else None
        if state is not None:
            batches.load_state_dict(state["stream"])
        steps, sample = -(-config.tokens // config.batch_size), batches.peek(CALIBRATION_TOKENS)
        trainees = trainees_at(config.saes, session.sites, sample, steps=steps, tokens=config.tokens, seed=config.seed)
        run = Run(trainees, config.tokens, out, sites={str(site): site for group in session.sites for site in group})
        if state is not None:
            run.load_state_dict(state["run"])
        del state, sample  # as large as the ring
        if out is not None:
            _claim_folder(config, out, keep=resume)
        fit(
            run,
            iter(batches),
            progress=progress,
            checkpoint_every=config.checkpoint_every,
            stream_state=state_now,
            how_to_resume="Go on with the same command and --resume.",
        )
        if out is not None:  # whatever happens from here on, the training is not lost
            save_checkpoint(out / "checkpoints", run.step, {"run": run.state_dict(), "stream": state_now()})
    del batches, state_now
    return _finish(session, run, out)


def _finish(session: Session | CachedSession, run: Run, out: Path | None) -> TrainResult:
    needed = any(trainee.sae.activation.calibrated for group in run.trainees.values() for trainee in group)
    held_out = session.held_out() if needed else {}
    only = sum(map(len, run.trainees.values())) == 1
    saes, folders = [], []
    for name, group in run.trainees.items():
        site = run.sites[name]
        calibration = [site.rows(held_out).x] if held_out else []
        for i, trainee in enumerate(group):
            sae = finished_sae(trainee, calibration, session.metadata(site))
            saes.append(sae)
            if out is not None:
                folder = out / "sae" if only else out / "saes" / site.folder / f"{i:02d}_{sae.activation.name}"
                folders.append(save_finished(sae, trainee.config, folder))
    if out is not None:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return TrainResult(saes, folders, run.history, session)


def _held_out_activations(session: Session) -> dict[str, Tensor]:
    """Activations of held-out documents (of training ones if the text was given as training text alone)."""
    config = session.config
    rows = open_rows(session.data, session.model, config, held_out=held_out_share(session.model, config) > 0)
    hooks = session.stream.hooks
    at, n = session.stream.device, config.prompts_per_pass
    stream = ActivationStream(session.model, hooks, rows, config.masks, n, device=at)
    parts: list[dict[str, Tensor]] = []
    for part in stream:
        parts.append(part)
        if sum(len(p[str(hooks[0])]) for p in parts) >= CALIBRATION_TOKENS:
            break
    if not parts:
        raise UnweaveError("the masks leave no held-out token to calibrate thresholds on.")
    return {name: torch.cat([p[name] for p in parts])[:CALIBRATION_TOKENS] for name in map(str, hooks)}


def _metadata(session: Session, site: Site) -> dict[str, Any]:
    config, module = session.config, session.model.module
    names = {str(hook): tl_name(module, hook) or str(hook) for hook in session.stream.hooks}
    return {
        "model_name": session.model.name,
        "model_class_name": type(session.model.module).__name__,
        **where(site, names),
        "hook_head_index": head_index(module, next(h for h in session.stream.hooks if str(h) == site.inputs[0])),
        "context_size": session.rows.context,
        "dataset_path": config.data if session.data is config.data else None,
        "seqpos_slice": [None],
        "exclude_special_tokens": config.masks.special_tokens,
        **rows_metadata(session.model, config),
        "masks": to_dict(config.masks),
        "model_precision": str(dtype_of(session.stream.model.module)).removeprefix("torch."),
        "training_tokens": config.tokens,
        "training_epochs": session.rows.epoch + 1,
        "seed": config.seed,
    }


def _check_folder(config: TrainConfig, out: Path | None, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, if any; refuses a folder that holds something else."""
    if out is None:
        if resume:
            raise UnweaveError("a run without an output folder cannot be resumed.")
        return None
    if out.exists() and not out.is_dir():
        raise UnweaveError(f"the output {str(out)!r} is a file; name a folder.")
    if not resume:
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UnweaveError(
                f"the folder {str(out)!r} is not empty; pass --resume to go on or --overwrite to start anew."
            )
        return None
    saved = checkpoints(out / "checkpoints")
    if not saved and any((out / name).exists() for name in ("sae", "saes")):
        raise UnweaveError(f"the run in {str(out)!r} is finished, so there is nothing to resume.")
    if not saved:
        raise UnweaveError(f"there is no checkpoint to resume from in {str(out)!r}.")
    before = read_run_config(out)
    for key, value in to_dict(config).items():
        if key not in ("out", "device") and value != to_dict(before)[key]:
            raise UnweaveError(
                f"the run in {str(out)!r} has {key}={to_dict(before)[key]!r}, so it cannot go on with {value!r}."
            )
    return saved[-1]


def read_run_config(out: Path) -> TrainConfig:
    """The config of the run in a folder.

    Raises:
        UnweaveError: If there is none, or it is damaged.
    """
    path = out / "config.json"
    try:
        config = from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is not the config of a run: {error}.") from error
    assert isinstance(config, TrainConfig)
    return config


def _claim_folder(config: TrainConfig, out: Path, *, keep: bool) -> None:
    """Empty the folder of an earlier run's files and write the config that a resumed run is checked against."""
    if keep:
        return
    for name in ("sae", "saes", "checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("metrics.jsonl", "eval.json", "features.html"):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("eval_*.json"):  # of a coder with several targets
        path.unlink()
    write_json(out / "config.json", to_dict(config))
