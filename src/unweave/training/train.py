"""The main job: from a model and text to trained SAEs on disk.

    text -> tokens -> activations at every hook in one pass -> masks -> shuffling ring -> the training loop -> folders

A run is a function of its config. `resume=True` goes on from the last checkpoint and ends bit-equal to a run that was
never interrupted (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import write_json
from unweave.activations import ActivationStream, ShuffledBatches, TokenRows
from unweave.models import LoadedModel, head_shape, load_model, resolve_hooks, tl_name
from unweave.sae import SAE
from unweave.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from unweave.training.config import TrainConfig, from_dict, to_dict
from unweave.training.finish import finished_sae, save_finished
from unweave.training.plan import CALIBRATION_TOKENS, Plan, plan_run
from unweave.training.progress import say
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
        model: The model that was used.
    """

    saes: list[SAE]
    folders: list[Path]
    history: list[dict[str, Any]]
    model: LoadedModel


@dataclass
class Session:
    """A prepared run: everything is loaded and checked, nothing is trained."""

    config: TrainConfig
    model: LoadedModel
    sites: list[list[Site]]
    """Of each SAE of the config."""
    rows: TokenRows
    stream: ActivationStream
    data: Any

    def plan(self) -> Plan:
        """Shapes, steps, bytes and time, measured on some forward passes and steps."""
        return plan_run(self.config, self.stream, self.sites)


def prepare(config: TrainConfig, model: Any = None, data: Any = None) -> Session:
    """Load the model, open the text, and resolve the hooks; raises UnweaveError where one of them is wrong."""
    loaded = model if isinstance(model, LoadedModel) else load_model(model or config.model, device=config.device)
    if loaded.tokenizer is None:
        raise UnweaveError(
            f"the model {loaded.name!r} has no tokenizer; train on its activations with train_on instead."
        )
    hooks = [str(hook) for hook in resolve_hooks(loaded.module, config.hooks)]
    targets = [str(hook) for hook in resolve_hooks(loaded.module, config.targets)]
    sites = [sites_of(sae, hooks, targets) for sae in config.saes]
    data = config.data if data is None else data
    rows = TokenRows(data, loaded.tokenizer, config.text, held_out=False, repeat=True)
    if config.text.held_out > 0:
        _check_held_out(data, loaded, config)
    places = resolve_hooks(loaded.module, list(dict.fromkeys([*hooks, *targets])))
    stream = ActivationStream(loaded, places, rows, config.masks, prompts_per_pass=config.prompts_per_pass)
    return Session(config, loaded, sites, rows, stream, data)


def _check_held_out(data: Any, model: LoadedModel, config: TrainConfig) -> None:
    """Find out before training, not after it, whether there is text to evaluate on."""
    try:
        TokenRows(data, model.tokenizer, config.text, held_out=True).peek(1)
    except UnweaveError as error:
        raise UnweaveError(f"{str(error).rstrip('.')}; with held_out=0 all of the text is trained on.") from error


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
        data: Texts or tokens that are in memory, in place of `config.data`; anything that `TokenRows` takes.
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
    if progress:
        say(str(session.plan()))

    batches = ShuffledBatches(session.stream, config.batch_size, config.ring_size, config.seed)
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
        stream_state=batches.state_dict,
        how_to_resume="Go on with the same command and --resume.",
    )
    return _finish(session, run, out, batches.state_dict)


def _finish(session: Session, run: Run, out: Path | None, stream_state: Callable[[], dict[str, Any]]) -> TrainResult:
    if out is not None:  # whatever happens from here on, the training is not lost
        save_checkpoint(out / "checkpoints", run.step, {"run": run.state_dict(), "stream": stream_state()})
    needed = any(trainee.sae.activation.calibrated for group in run.trainees.values() for trainee in group)
    held_out = _held_out_activations(session) if needed else {}
    only = sum(map(len, run.trainees.values())) == 1
    saes, folders = [], []
    for name, group in run.trainees.items():
        site = run.sites[name]
        calibration = [site.rows(held_out).x] if held_out else []
        for i, trainee in enumerate(group):
            sae = finished_sae(trainee, calibration, _metadata(session, site))
            saes.append(sae)
            if out is not None:
                folder = out / "sae" if only else out / "saes" / site.folder / f"{i:02d}_{sae.activation.name}"
                folders.append(save_finished(sae, trainee.config, folder))
    if out is not None:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return TrainResult(saes, folders, run.history, session.model)


def _held_out_activations(session: Session) -> dict[str, Tensor]:
    """Activations of held-out documents (of training ones if the text was given as training text alone)."""
    config = session.config
    held_out = config.text.held_out > 0
    rows = TokenRows(session.data, session.model.tokenizer, config.text, held_out=held_out)
    hooks = session.stream.hooks
    stream = ActivationStream(session.model, hooks, rows, config.masks, prompts_per_pass=config.prompts_per_pass)
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
        "hook_head_index": _head(session, site),
        "context_size": config.text.context,
        "prepend_bos": config.text.bos,
        "dataset_path": config.data if session.data is config.data else None,
        "seqpos_slice": [None],
        "exclude_special_tokens": config.masks.special_tokens,
        "text": to_dict(config.text),
        "masks": to_dict(config.masks),
        "training_tokens": config.tokens,
        "training_epochs": session.rows.epoch + 1,
        "seed": config.seed,
    }


def _head(session: Session, site: Site) -> int | None:
    """The number of the head that an SAE is trained on, if its hook is one head of what attention mixes."""
    hook = next(hook for hook in session.stream.hooks if str(hook) == site.inputs[0])
    whole = replace(hook, columns=None)
    if hook.columns is None or not str(tl_name(session.model.module, whole)).endswith("hook_z"):
        return None
    width, _ = head_shape(session.model.module, whole)
    head, rest = divmod(hook.columns[0], width)
    return head if rest == 0 and hook.columns[1] - hook.columns[0] == width else None


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
