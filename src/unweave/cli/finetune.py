"""`unweave finetune`: train any SAE, transcoder or other coder further, and show what it is worth before and after."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from unweave._errors import UnweaveError
from unweave.cli.evaluate import evaluate_saved, saes_below, saved, source_of
from unweave.cli.output import shown, status

if TYPE_CHECKING:
    from rich.table import Table

    from unweave.evaluation import Report
    from unweave.sae import SAE
    from unweave.training import TrainConfig

SHOWN = ("explained variance", "squared error", "norm ratio", "L0", "dead", "loss recovered", "loss with SAE",
         "KL divergence")  # fmt: skip
"""Metrics of the comparison, by their names in the table of an evaluation."""


@dataclass
class FinetuneArgs:
    """Train an SAE further, on the squared error with frozen codes or end to end, and evaluate it before and after.

    The output folder is that of unweave train. Model, data, hook, context and masks are by default the SAE's own.
    """

    sae: Annotated[tyro.conf.Positional[str | None], shown("SAE")] = None
    """A path, a release, or a repository on the Hub (OWNER/NAME); with --resume, what the run began with."""
    id: Annotated[tyro.conf.Positional[str | None], shown("ID")] = None
    """The SAE in it, where there are several: its id, or of a run's folder the end of its path."""
    what: Literal["decoder", "unrotated_decoder", "scale", "end_to_end"] = "decoder"
    """What is trained: the decoder (and a transcoder's skip), norms of its rows and bias, or norms alone, all with codes that stay; or the whole SAE, on its error and what it does to the model's predictions (KL) at equal weight."""  # noqa: E501
    tokens: int = 2_000_000
    """Tokens to train on."""
    out: Annotated[str | None, shown("FOLDER", "unweave-finetuned")] = None
    """Folder for the SAE, metrics.jsonl, eval.json and checkpoints."""
    model: Annotated[str | None, shown("NAME", "the model that the SAE was trained on")] = None
    """Model to run."""
    data: Annotated[str | None, shown("NAME", "the data that the SAE was trained on")] = None
    """Text, images or tokens; for codes that stay, a cache as well."""
    hook: Annotated[tuple[str, ...] | None, shown("NAME ...", "the hook that the SAE was trained at")] = None
    """Where the SAE belongs; of a transcoder, what it reads; of a crosscoder, all its hooks."""
    target: Annotated[tuple[str, ...] | None, shown("NAME ...", "the target that the transcoder was trained on")] = None
    """Where a transcoder's output belongs."""
    lr: Annotated[float | None, shown("X", "3e-3; a quarter of train's for end_to_end")] = None
    """Learning rate."""
    batch_size: int = 4096
    """Tokens in an optimiser step; end to end, the rows of one are as many as these tokens are."""
    context: Annotated[int | None, shown("N", "as in training")] = None
    """Tokens in a row."""
    column: Annotated[str | None, shown("NAME", "found by its usual names")] = None
    """Text column of .jsonl, .parquet and Hugging Face data."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network instead of downloading it first."""
    held_out: Annotated[float | None, shown("X", "as in training")] = None
    """Share of the documents kept from training."""
    checkpoint_every: Annotated[int | None, shown("N", "a tenth of the run")] = None
    """Tokens between checkpoints; one is always written at an interruption."""
    seed: int = 0
    """Seed of the order of the tokens."""
    device: Annotated[str | None, shown("NAME", "a GPU if there is one")] = None
    """Where to run."""
    eval_tokens: int = 100_000
    """Held-out tokens to evaluate on, before and after; 0 for none."""
    resume: bool = False
    """Go on from the checkpoint in --out; without SAE, all settings are read from there."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    dry_run: bool = False
    """Print steps, bytes and expected time, and stop."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.sae import SAE, by_target
        from unweave.training.run_folder import read_run_config
        from unweave.training.train import prepare, train

        out = self.out or "unweave-finetuned"
        if self.sae is not None:
            name, id = named(self.sae, self.id)
            sae = SAE.from_pretrained(name, id)
            config = self.to_config(sae, out, name, id)
        elif self.resume:
            config = replace(read_run_config(Path(out)), out=out)
            if config.start is None or config.start.sae is None:
                raise UnweaveError(f"the run in {out!r} trains a fresh SAE: go on with unweave train --resume.")
            sae = SAE.from_pretrained(config.start.sae, config.start.id)
        else:
            raise UnweaveError("name the SAE to train further: a path, a release or a repository.")
        if self.dry_run:
            plan = prepare(config, start=sae).plan()
            print(plan)
            plan.check()
            return
        result = train(config, start=sae, resume=self.resume, overwrite=self.overwrite)
        print(f"saved {result.folders[0]}")
        if not self.eval_tokens:
            return
        tuned, before = result.saes[0], copy.deepcopy(sae)
        before.metadata = dict(tuned.metadata)  # so that the rows, masks and hooks are the same
        reports = evaluate_saved(result, config, self.eval_tokens)
        if reports:
            places, parts = by_target(tuned), by_target(before).values()
            for place, part, after in zip(places, parts, reports, strict=True):
                report = self.evaluated(part, result.model, config, place)
                name = f"eval_before_{place.replace(':', '_')}.json" if place else "eval_before.json"
                report.save(Path(out) / name)
                Console().print(comparison(report, after, place))

    def evaluated(self, part: SAE, model: Any, config: TrainConfig, place: str) -> Report:
        """What the SAE, or its part that predicts at one hook, was worth before."""
        from unweave.evaluation import evaluate

        with status(f"evaluating it as it was {place}".rstrip()) as tick:
            return evaluate(
                part, model=model, target=place or None, data=config.data, tokens=self.eval_tokens, seed=config.seed,
                progress=tick,
            )  # fmt: skip

    def to_config(self, sae: SAE, out: str, name: str, id: str | None) -> TrainConfig:
        """The run's config: what was given on the line, else what the SAE says of its own training.

        Raises:
            UnweaveError: The SAE does not say it.
        """
        from unweave.activations import DataConfig, ImageConfig
        from unweave.activations.cache import is_cache
        from unweave.evaluation.sample import default_masks
        from unweave.objectives import EndToEnd
        from unweave.sae import CrossLayerTranscoder, Transcoder
        from unweave.training import Start, TrainConfig
        from unweave.training.further import hooks_of_coder

        own = hooks_of_coder(sae)
        hooks, targets = self.hook or tuple(own[0]), self.target or tuple(own[1])
        if not hooks:
            raise UnweaveError("the SAE does not say which hook it was trained at; pass --hook.")
        if not targets and isinstance(sae, Transcoder | CrossLayerTranscoder):
            raise UnweaveError("the transcoder does not say which hook it predicts; pass --target.")
        source = source_of(sae, self)
        rows = source.pop("data_config")
        if isinstance(rows, DataConfig):
            rows = replace(rows, column=self.column or rows.column, streaming=self.streaming or rows.streaming)
        given = [self.context, self.held_out, self.column]
        if is_cache(source["data"]) and all(value is None for value in given):
            rows = type(rows)()  # the cache says how it was laid out
        here = Path(name).expanduser()
        name = str(here.resolve()) if here.exists() else name
        return TrainConfig(
            **source,
            hooks=hooks,
            targets=targets,
            tokens=self.tokens,
            batch_size=self.batch_size,
            out=out,
            checkpoint_every=max(1, self.tokens // 10) if self.checkpoint_every is None else self.checkpoint_every,
            text=rows if isinstance(rows, DataConfig) else DataConfig(),
            images=rows if isinstance(rows, ImageConfig) else ImageConfig(),
            masks=default_masks(sae),
            seed=self.seed,
            device=self.device,
            start=Start(name, id, None if self.what == "end_to_end" else self.what, self.lr),
            end_to_end=EndToEnd() if self.what == "end_to_end" else None,
        )


def named(source: str, id: str | None) -> tuple[str, str | None]:
    """The SAE that is meant: in a folder with several, such as a run's, the one whose path ends in `id`.

    Raises:
        UnweaveError: The folder holds none of its own, or none or several of this name; naming those that there are.
    """
    from unweave.hub.published import some

    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source, id
    path = folder if id is None else folder / id
    if path.exists():
        return str(saved(path) if path.is_dir() else path), None
    assert id is not None
    below = saes_below(folder)
    found = [path for path in below if f"/{path.relative_to(folder).as_posix()}".endswith(f"/{id.strip('/')}")]
    if len(found) == 1:
        return str(found[0]), None
    what = f"{len(found)} SAEs whose path ends" if found else "no SAE whose path ends"
    there = some([str(path.relative_to(folder)) for path in found or below]) if below else "none at all"
    raise UnweaveError(f"the folder {source!r} has {what} in {id!r}; there is {there}.")


def comparison(before: Report, after: Report, place: str = "") -> Table:
    """The numbers that matter most, before and after."""
    from rich.table import Table

    from unweave.evaluation.table import ROWS

    rows: dict[str, Any] = {row.name: row for group in ROWS.values() for row in group}
    title = f"{place} on {after.provenance['tokens']['kept']:,} held-out tokens".lstrip()
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in SHOWN:
        values = [report.metrics[rows[name].metric] for report in (before, after)]
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else rows[name].show(value) for value in values))
    return table
