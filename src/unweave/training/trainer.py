"""The training loop: a plain loop over an iterator of batches, for any number of SAEs at any number of hooks.

Each SAE runs forward, backward and its update by itself, so only one graph is alive at a time. The loop knows
neither the model nor the text; what resuming needs of them comes in as `stream_state`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_path
from unweave.objectives import QuadraticL0, TargetL0
from unweave.training.checkpoint import save_checkpoint
from unweave.training.clip import check_pending
from unweave.training.decoder_tuning import DecoderTuning
from unweave.training.progress import Progress
from unweave.training.readback import Readback
from unweave.training.sites import Site
from unweave.training.trainee import StepSums, Trainee
from unweave.training.watch import may_whiten, outlier_dimension, warnings_for

LOG_EVERY = 25
"""Steps between two logged rows."""

Batches = Iterator[dict[str, Float[Tensor, "n d_in"]]]


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by the user. The message says what was saved and how to go on."""


@dataclass
class Run:
    """Where a training run stands.

    Attributes:
        trainees: The SAEs of each site, by its name.
        tokens: Tokens to train on.
        seen: Tokens trained on so far.
        step: Steps taken so far.
        out: Folder of `metrics.jsonl` and `checkpoints/`; None keeps everything in memory.
        history: Every logged row.
    """

    trainees: dict[str, list[Trainee]]
    tokens: int
    out: Path | None = None
    seen: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    keep_recent: int = 0
    """How many batches of each hook to keep in `recent`."""
    recent: dict[str, list[Tensor]] = field(default_factory=dict)
    """The last batches of each hook, which calibrate thresholds where nothing is held out."""
    sums: dict[str, list[StepSums]] = field(default_factory=dict)
    """What has been summed up since the last logged row, for each SAE of each hook."""
    sites: dict[str, Site] = field(default_factory=dict)
    """Where the trainees of each name read and what they predict; a name that is missing is that of a hook."""

    def state_dict(self) -> dict[str, Any]:
        trainees = {hook: [t.state_dict() for t in group] for hook, group in self.trainees.items()}
        sums = {hook: [list(s) for s in group] for hook, group in self.sums.items()}
        return {"trainees": trainees, "sums": sums, "seen": self.seen, "step": self.step, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            UnweaveError: If a trainee's state has other entries, as that of another version of unweave has.
        """
        for hook, group in self.trainees.items():
            for trainee, saved in zip(group, state["trainees"][hook], strict=True):
                _check_entries(saved, trainee.state_dict())
                trainee.load_state_dict(saved)
        self.sums = {hook: [StepSums(*s) for s in group] for hook, group in state["sums"].items()}
        self.seen, self.step, self.history = state["seen"], state["step"], state["history"]


def _check_entries(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    for theirs, ours in ((saved, expected), (saved.get("sae", {}), expected["sae"])):
        if odd := theirs.keys() ^ ours.keys():
            name = min(odd)
            lacks = "lacks" if name in ours else "has an unknown"
            raise UnweaveError(
                f"the checkpoint {lacks} {name!r}: another version of unweave wrote it, so start anew with --overwrite."
            )


def fit(
    run: Run,
    batches: Batches,
    *,
    progress: bool = True,
    checkpoint_every: int | None = None,
    stream_state: Callable[[], dict[str, Any]] = dict,
    how_to_resume: str = "",
    after_step: Callable[[], None] | None = None,
) -> None:
    """Train until `run.tokens` tokens are seen; the last batch is cut to end exactly there.

    Args:
        run: Where the run stands; it moves on.
        batches: What to train on.
        progress: Whether to show progress on standard error.
        checkpoint_every: Tokens between checkpoints; None: none but the one at an interruption.
        stream_state: Gives the state of `batches`, for checkpoints.
        how_to_resume: What the message of an interruption ends with.
        after_step: Called after every step.

    Raises:
        UnweaveError: If a batch has the wrong shape or values that are not finite, or the batches run out.
        TrainingInterrupted: After SIGINT or SIGTERM, once a checkpoint is written.
    """
    log = _open_log(run)
    since_checkpoint, started, seen_before = 0, time.perf_counter(), run.seen
    warned: set[str] = set()
    # Where every step reads late, so can this; elsewhere a step would see it first, and not know the hook.
    sums = {hook: Readback() for hook, own in run.trainees.items() if all(t.readback is not None for t in own)}
    with _stop_on_signal() as stop, Progress(run.tokens, run.seen, show=progress) as bar, log:
        while run.seen < run.tokens:
            batch = next(batches, None)
            if batch is None:
                raise UnweaveError(f"the activations ran out after {run.seen:,} of {run.tokens:,} tokens.")
            n = 0
            for hook, trainees in run.trainees.items():
                x, y = run.sites.get(hook, Site((hook,))).rows(batch)
                x, y = x[: run.tokens - run.seen], None if y is None else y[: run.tokens - run.seen]
                n = len(x)
                _check_batch(x, trainees[0].sae.d_in, hook, run.step, sums.get(hook))
                if y is not None:
                    _check_batch(y, trainees[0].sae.d_out, hook, run.step)
                if run.step == 0:
                    _warn_of_outliers(x * trainees[0].scale, hook, trainees, bar)  # hooks side by side have one each
                if run.keep_recent:
                    run.recent[hook] = [*run.recent.get(hook, []), x.detach()][-run.keep_recent :]
                steps = [trainee.step(x, y) for trainee in trainees]
                before = run.sums.get(hook)
                run.sums[hook] = [_add(a, b) for a, b in zip(before, steps, strict=True)] if before else steps
            run.seen, run.step, since_checkpoint = run.seen + n, run.step + 1, since_checkpoint + n
            rows = None
            if run.step % LOG_EVERY == 0 or run.seen >= run.tokens:
                _check_sums(sums)
                if run.seen >= run.tokens:
                    for trainee in (t for group in run.trainees.values() for t in group):
                        check_pending(trainee)
                rate = (run.seen - seen_before) / (time.perf_counter() - started)
                rows = [_row(run, hook, i, s, rate) for hook, group in run.sums.items() for i, s in enumerate(group)]
                run.sums = {}
                for row in rows:
                    log.write(json.dumps(row) + "\n")
                    run.history.append(row)
                    _warn(run, row, warned, bar)
                log.flush()
            bar.update(run.seen, rows)
            if after_step is not None:
                after_step()
            if stop.is_set():
                _check_sums(sums)
                raise TrainingInterrupted(_save_interrupted(run, stream_state, how_to_resume))
            if checkpoint_every and since_checkpoint >= checkpoint_every and run.out and run.seen < run.tokens:
                _check_sums(sums)
                _save(run, stream_state)
                since_checkpoint = 0


def _add(a: StepSums, b: StepSums) -> StepSums:
    return StepSums(*map(torch.add, a, b))


def _check_batch(x: Tensor, d_in: int, hook: str, step: int, sums: Readback | None = None) -> None:
    """Refuse a batch of another shape or with values that are not finite: at once, or on a GPU steps later."""
    if x.ndim != 2 or x.shape[1] != d_in:
        raise UnweaveError(f"batch {step} has the shape {tuple(x.shape)}, and (n, {d_in}) was expected.")
    if len(x) == 0:
        raise UnweaveError(f"batch {step} is empty.")
    total = x.sum(dtype=torch.float32)
    if sums is None:
        if not total.isfinite() and not x.isfinite().all():
            raise _not_finite(hook, step)
    elif (seen := sums.push(step, total.view(1))) is not None:
        _check_sum(hook, *seen)


def _check_sums(sums: dict[str, Readback]) -> None:
    """Refuse what a GPU has not spoken of yet; for where the host waits anyway."""
    for hook, late in sums.items():
        for seen in late.state():
            _check_sum(hook, *seen)


def _check_sum(hook: str, step: int, total: list[float]) -> None:
    if not math.isfinite(total[0]):  # squares of finite values whose sum is infinite are, too, and have no gradient
        raise _not_finite(hook, step)


def _not_finite(hook: str, step: int) -> UnweaveError:
    where = f" at the hook {hook!r}" if hook else ""
    return UnweaveError(f"batch {step}{where} holds activations that are NaN or infinite.")


def _row(run: Run, hook: str, i: int, sums: StepSums, rate: float) -> dict[str, Any]:
    """One line of `metrics.jsonl`: what happened since the last one."""
    tokens, *totals = torch.stack(sums).tolist()
    error, variance, l0, loss, grad_norm = (total / tokens for total in totals)
    trainee = run.trainees[hook][i]
    row: dict[str, Any] = {"step": run.step, "tokens": run.seen, "total_tokens": run.tokens, "hook": hook, "sae": i}
    row |= {
        "loss": loss,
        "mse": error,
        "explained_variance": 1 - error / variance if variance > 0 else None,
        "l0": l0,
        "dead": trainee.dead.float().mean().item(),
        "lr": trainee.lr,
        "grad_norm": grad_norm,
        "tokens_per_second": rate,
    }
    if trainee.sae.threshold is not None:
        threshold = trainee.sae.threshold.mean().item()
        row["threshold"] = None if math.isnan(threshold) else threshold  # a BatchTopK that has not fired yet has none
    if trainee.sparsity.terms:
        row["coefficient"] = trainee.sparsity.scaled(max(trainee.step_count - 1, 0), 1.0)
    if trainee.config.l0_controller is not None:
        row["target_l0"] = trainee.config.l0_controller.target
    elif isinstance(trainee.config.sparsity_term, TargetL0 | QuadraticL0):
        row["target_l0"] = trainee.config.sparsity_term.l0
    if not all(v is None or isinstance(v, str) or abs(v) < float("inf") for v in row.values()):
        raise UnweaveError(f"training diverged at step {run.step} ({trainee.config}): try a lower learning rate.")
    return row


def _warn(run: Run, row: dict[str, Any], warned: set[str], bar: Progress) -> None:
    own = [r for r in run.history if (r["hook"], r["sae"]) == (row["hook"], row["sae"])]
    for message in warnings_for(own):
        kind = f"{row['hook']} {row['sae']} {message.split(':')[-1]}"
        if kind not in warned:
            warned.add(kind)
            bar.say(f"warning: {message} ({run.trainees[row['hook']][row['sae']].config})")


def _warn_of_outliers(x: Tensor, hook: str, trainees: list[Trainee], bar: Progress) -> None:
    # No latent dies of a decoder that is fine-tuned.
    concerned = [t.config for t in trainees if t.config.normalize != "whiten" and not isinstance(t, DecoderTuning)]
    if concerned and (message := outlier_dimension(x, whitens=any(map(may_whiten, concerned)))):
        bar.say(f"warning: {message} ({hook})" if hook else f"warning: {message}")


def _open_log(run: Run) -> Any:
    """`metrics.jsonl`, holding the rows up to where the run stands and no later ones."""
    if run.out is None:
        return open(os.devnull, "w", encoding="utf-8")
    path = run.out / "metrics.jsonl"
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in run.history), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _save(run: Run, stream_state: Callable[[], dict[str, Any]]) -> Path:
    assert run.out is not None
    return save_checkpoint(run.out / "checkpoints", run.step, {"run": run.state_dict(), "stream": stream_state()})


def _save_interrupted(run: Run, stream_state: Callable[[], dict[str, Any]], how_to_resume: str) -> str:
    if run.out is None:
        return f"stopped after {run.seen:,} of {run.tokens:,} tokens; nothing was saved, because the run has no folder."
    path = _save(run, stream_state)
    return f"stopped after {run.seen:,} of {run.tokens:,} tokens and saved {str(path)!r}. {how_to_resume}".strip()


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set instead of killing the process; a second signal kills it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
