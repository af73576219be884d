"""The main job: from a model and text or images to trained SAEs on disk.

    data -> tokens -> activations at every hook in one pass -> masks -> shuffling ring -> the training loop -> folders

From a cache of activations, reading takes the place of all that comes before the loop.
A run is a function of its config. `resume=True` goes on from the last checkpoint and ends bit-equal to a run that was
never interrupted (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unweave._errors import UnweaveError
from unweave._files import remove_folder, remove_leftovers
from unweave.activations.limits import trim_memory
from unweave.models import LoadedModel, load_model, resolve_hooks
from unweave.sae import SAE, TemporalSAE
from unweave.training.cached import CachedSession, cached_data
from unweave.training.checkpoint import load_checkpoint, save_checkpoint
from unweave.training.config import TrainConfig
from unweave.training.end_to_end import check_end_to_end
from unweave.training.finish import calibrates, finished_sae, save_finished
from unweave.training.further import furthered, resolved, site_of_start, tuning_of, widths_at
from unweave.training.harvest import live_stream
from unweave.training.plan import CALIBRATION_TOKENS, Plan, repeats
from unweave.training.progress import say
from unweave.training.rows import as_tokenized, held_out_share, open_rows
from unweave.training.run_folder import CHECKPOINTS, check_folder, claim_folder, is_finished
from unweave.training.session import Session
from unweave.training.sites import Site, sites_of
from unweave.training.spliced_session import SplicedSession
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


def prepare(
    config: TrainConfig, model: Any = None, data: Any = None, start: SAE | None = None
) -> Session | CachedSession:
    """Load the model, open the data, and resolve the hooks; raises UnweaveError where one of them is wrong.

    From a cache, the model is only loaded if something asks for it.
    """
    config, start = resolved(config, start)
    if (cached := cached_data(config.data if data is None else data)) is not None:
        if config.end_to_end is not None:
            raise UnweaveError("an end-to-end loss runs the model on text, and a cache holds activations alone.")
        if isinstance(start, TemporalSAE):
            raise UnweaveError("a temporal SAE reads whole rows of text, and of a cache's rows tokens are left out.")
        from_cache = CachedSession.of(config, cached, model)
        if start is not None:
            (named,) = from_cache.sites
            made_with = from_cache.metadata(named[0])
            from_cache.sites = [[site_of_start(start, named, from_cache.store.widths, made_with)]]
            from_cache.make = tuning_of(start, config)
        return from_cache
    check_place(model, config)
    loaded = (
        model
        if isinstance(model, LoadedModel)
        else load_model(model or config.model, device=config.model_device or config.device)
    )
    hooks = [str(hook) for hook in resolve_hooks(loaded.module, config.hooks)]
    targets = [str(hook) for hook in resolve_hooks(loaded.module, config.targets)]
    sites = [sites_of(sae, hooks, targets) for sae in config.saes]
    if start is not None:
        (named,) = sites
        sites = [[site_of_start(start, named, widths_at(loaded, [*hooks, *targets]), loaded)]]
    if config.end_to_end is not None:
        spliced = [hook for group in sites for site in group for hook in site.targets or site.inputs]
        check_end_to_end(config, loaded, spliced)
    elif isinstance(start, TemporalSAE) and loaded.tokenizer is None:
        raise UnweaveError(f"a temporal SAE reads rows of text, and the model {loaded.name!r} has no tokenizer.")
    data = config.data if data is None else data
    if loaded.vision is None:
        config = replace(config, text=as_tokenized(data, config.text))
    rows = open_rows(data, loaded, config, held_out=False, repeat=True)
    if held_out_share(loaded, config) > 0:
        rows.peek(1)  # what is wrong with all of the data is not to be taken for a fault of the held-out side
        _check_held_out(data, loaded, config)
    read = resolve_hooks(loaded.module, list(dict.fromkeys([*hooks, *targets])))
    stream = live_stream(config, loaded, read, rows)
    if config.end_to_end is not None or isinstance(start, TemporalSAE):
        return SplicedSession(config, loaded, sites, rows, stream, data, start=start)
    session = Session(config, loaded, sites, rows, stream, data)
    if start is not None:
        session.make = tuning_of(start, config)
    return session


def check_place(model: Any, config: TrainConfig) -> None:
    """A loaded model stays where it is.

    Raises:
        UnweaveError: `model_device` is another place.
    """
    if config.model_device is None or not isinstance(model, LoadedModel):
        return
    wanted, there = torch.device(config.model_device), model.device
    if wanted.type != there.type or wanted.index not in (None, there.index):
        raise UnweaveError(
            f"model_device={config.model_device!r}, and the model that was given is on {str(there)!r}: move it there, "
            "or leave model_device out."
        )


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
    start: SAE | None = None,
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
        start: An SAE that is loaded already, in place of `config.start.sae`; it is not changed.
        resume: Go on from the checkpoint in `config.out`; from the beginning if there is none yet. What a finished run
            saved is returned as it is.
        overwrite: Replace what `config.out` holds.
        progress: Whether to show the plan and the progress on standard error.

    Returns:
        The trained SAEs, and where they are.

    Raises:
        UnweaveError: If something about the input is wrong; nothing has been written then.
        TrainingInterrupted: After Ctrl-C, once a checkpoint is written.
    """
    config, start = resolved(config, start)
    out = Path(config.out) if config.out is not None else None
    checkpoint = check_folder(config, out, resume=resume, overwrite=overwrite)
    session = prepare(config, model, data, start)
    if resume and out is not None and is_finished(out):
        remove_leftovers(out)  # of an evaluation that was killed
        return _saved(session, out)
    plan = session.plan()
    plan.check()
    if progress:
        say(str(plan))
    trim_memory()  # of what planning made

    with session.batches() as batches:
        state_now = partial(batches.state_dict, copy=False)  # it is written at once, and as large as the ring
        state = load_checkpoint(checkpoint) if checkpoint else None
        if state is not None:
            batches.load_state_dict(state["stream"])
        sample = batches.peek(CALIBRATION_TOKENS)
        trainees = trainees_at(
            config.saes, session.sites, sample, steps=plan.steps, tokens=config.tokens, seed=config.seed,
            make=session.make,
        )  # fmt: skip
        run = Run(trainees, config.tokens, out, sites={str(site): site for group in session.sites for site in group})
        if state is not None:
            run.load_state_dict(state["run"])
        del state, sample  # as large as the ring
        if out is not None:
            claim_folder(config, out, checkpoint, resume=resume)
        fit(
            run,
            iter(batches),
            progress=progress,
            checkpoint_every=config.checkpoint_every,
            stream_state=state_now,
            how_to_resume="Go on with the same command and --resume.",
            after_step=_says_where_data_begin_again(session, plan) if progress else None,
        )
        if out is not None:  # whatever happens from here on, the training is not lost
            save_checkpoint(out / CHECKPOINTS, run.step, {"run": run.state_dict(), "stream": state_now()})
    del batches, state_now
    trim_memory()
    return _finish(session, run, out, start)


def _says_where_data_begin_again(session: Session | CachedSession, plan: Plan) -> Callable[[], None] | None:
    """What tells, once, that the data were read to their end; None if the plan knew where that is."""
    if plan.once is not None or isinstance(session, CachedSession):
        return None
    said = False

    def tell() -> None:
        nonlocal said
        if not said and session.once is not None:
            said = True
            if sentence := repeats(plan.tokens, session.once):
                say(sentence)

    return tell


def _finish(session: Session | CachedSession, run: Run, out: Path | None, start: SAE | None) -> TrainResult:
    needed = any(calibrates(trainee) for group in run.trainees.values() for trainee in group)
    held_out = session.held_out() if needed else {}
    only = sum(map(len, run.trainees.values())) == 1
    saes, folders = [], []
    for name, group in run.trainees.items():
        site = run.sites[name]
        calibration = [site.rows(held_out).x] if held_out else []
        for i in range(len(group)):
            trainee, metadata = group.pop(0), session.metadata(site)  # which is not kept longer than the SAE made of it
            if start is not None:
                metadata = furthered(start, session.config, trainee.config.learning_rate, metadata)
            sae = finished_sae(trainee, calibration, metadata)
            saes.append(sae)
            if out is not None:
                folder = out / "sae" if only else out / "saes" / site.folder / f"{i:02d}_{sae.activation.name}"
                folders.append(save_finished(sae, trainee.config, folder))
            del trainee
    if out is not None:
        remove_folder(out / CHECKPOINTS)
    return TrainResult(saes, folders, run.history, session)


def _saved(session: Session | CachedSession, out: Path) -> TrainResult:
    """What a finished run has saved, in the order of `_finish`."""
    numbers: dict[Site, int] = {}
    for site in (site for group in session.sites for site in group):
        numbers[site] = numbers.get(site, 0) + 1
    folders = [out / "sae"]
    if sum(numbers.values()) > 1:
        folders = [
            next(iter((out / "saes" / site.folder).glob(f"{i:02d}_*"))) for site, n in numbers.items() for i in range(n)
        ]
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return TrainResult([SAE.load(folder) for folder in folders], folders, [json.loads(x) for x in lines], session)
