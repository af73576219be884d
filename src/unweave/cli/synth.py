"""`unweave synth`: a world with known features, its statistics, and how well SAEs recover it."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unweave._errors import UnweaveError
from unweave.cli.output import shown, status
from unweave.cli.train import TrainArgs

if TYPE_CHECKING:
    from unweave.synthetic.worlds import World

PICKY = ("k", "l1", "target_l0")
"""Settings that go with some activation functions only."""


@dataclass
class SynthArgs:
    """Make a world with known features, measure it, train SAEs on it, and score what they recovered.

    A world is a TOML file with a [model] table and a [[saes]] table for each SAE, or the name of one that ships with
    unweave (--list). What is given on the line wins, and settings of an SAE given on the line apply to all of them.
    """

    world: Annotated[tyro.conf.Positional[str | None], shown("WORLD", "independent")] = None
    """Name of a world that ships with unweave, or a TOML file."""
    out: Annotated[Path | None, shown("FOLDER", "unweave-synth-WORLD")] = None
    """Folder for the world, the SAEs, the pictures and results.json."""
    samples: Annotated[int | None, shown("N", "the world's")] = None
    """Samples that the statistics are measured on."""
    tokens: Annotated[int | None, shown("N", "the world's")] = None
    """Samples that the SAEs are trained on."""
    batch_size: Annotated[int | None, shown("N", "the world's")] = None
    """Samples in an optimiser step."""
    eval_samples: Annotated[int | None, shown("N", "the world's")] = None
    """Samples that each SAE is scored on."""
    d_sae: Annotated[int | None, shown("N", "the world's")] = None
    """Number of latents."""
    activation: Annotated[str | None, shown("NAME", "the world's")] = None
    """Activation function: topk, batchtopk, relu, jumprelu, gated, or another that `unweave train` knows."""
    k: Annotated[float | None, shown("K", "the world's")] = None
    """Active latents per sample, for topk, batchtopk and others that have a k."""
    l1: Annotated[float | None, shown("X", "the world's")] = None
    """L1 coefficient, for relu and gated."""
    target_l0: Annotated[float | None, shown("X", "the world's")] = None
    """Mean number of active latents to reach, for jumprelu."""
    lr: Annotated[float | None, shown("X", "the world's")] = None
    """Learning rate."""
    seed: Annotated[int | None, shown("N", "the world's")] = None
    """Everything that is drawn follows from it: the world, its samples, and the initial weights."""
    train: bool = True
    """Train and score the world's SAEs. --no-train only measures the world."""
    list: bool = False
    """Name the worlds that ship with unweave, and stop."""
    dry_run: bool = False
    """Print sizes, memory and expected time, and stop."""
    overwrite: bool = False
    """Replace the study that --out holds."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.cli.synth_tables import scores_table, statistics_table
        from unweave.synthetic.figures import pictures_available
        from unweave.synthetic.model import SyntheticModel
        from unweave.synthetic.study import Study, check_out, score, superposition_of, train_saes
        from unweave.synthetic.study_plan import plan_study
        from unweave.synthetic.survey import survey

        if self.list:
            _list_worlds()
            return
        world = self.to_world()
        out = self.out or Path(f"unweave-synth-{world.name}")
        if not self.dry_run:
            check_out(out, self.overwrite)
        started = time.perf_counter()
        with status(f"building {world.name}"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = SyntheticModel(world.model)
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        plan = plan_study(world, model, time.perf_counter() - started)
        if self.dry_run:
            print(plan)
            return
        print(plan, file=sys.stderr)
        if not (drawn := pictures_available()):
            print("note: matplotlib is missing, so pictures are left out; pip install 'unweave[plots]' brings it.",
                  file=sys.stderr)  # fmt: skip
        with status(f"sampling {world.samples:,} times") as tick:
            measured = survey(model, world.samples, progress=tick)
        with status("comparing features"):
            study = Study(world, model, measured, superposition_of(model, measured.requested_rates))
        if world.saes:
            study.saes, study.history = train_saes(world, model, seed=world.model.seed or 0)
            for name, sae in zip(study.names, study.saes, strict=True):
                with status(f"scoring {name}"):
                    study.scores.append(score(world, model, sae))
        console = Console(highlight=False)
        console.print(statistics_table(study))
        if study.scores:
            console.print()
            console.print(scores_table(study))
        with status(f"writing {out}"):
            written = study.save(out, pictures=drawn)
        for path in written:
            print(f"saved {path}")

    def to_world(self) -> World:
        """The world, with what was given on the line on top.

        Raises:
            UnweaveError: If there is no such world or setting, or settings do not go together.
        """
        from unweave.synthetic.worlds import World, read_world

        name = self.world or "independent"
        settings = read_world(name)
        for flag, key in (
            ("samples", "samples"), ("tokens", "training_samples"), ("batch_size", "batch_size"),
            ("eval_samples", "eval_samples"),
        ):  # fmt: skip
            if getattr(self, flag) is not None:
                settings[key] = getattr(self, flag)
        if self.seed is not None and isinstance(settings.get("model"), dict):
            settings["model"]["seed"] = self.seed
        given = {n: getattr(self, n) for n in ("d_sae", "activation", "k", "l1", "target_l0", "lr")}
        given = {name: value for name, value in given.items() if value is not None}
        world = World.from_dict(Path(name).stem, settings)
        if given:
            settings["saes"] = _from_line(settings.get("saes") or [{}], given)
            world = World.from_dict(world.name, settings)
        if not self.train:
            if given:
                raise UnweaveError("--no-train trains nothing, so it goes without settings of an SAE.")
            world = replace(world, saes=())
        return world


def _from_line(saes: Sequence[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """A world's SAEs with the settings of the line; what goes with some activation functions only goes to those.

    SAEs that the line makes the same are trained once.
    """
    result: list[dict[str, Any]] = []
    for sae in saes:
        # What no SAE can take stays, so that TrainArgs says with what it goes.
        own = {
            name: value
            for name, value in given.items()
            if name not in PICKY or _takes(sae, given, name) or not any(_takes(other, given, name) for other in saes)
        }
        settings = TrainArgs(**own).sae_settings(dict(sae))
        if settings not in result:
            result.append(settings)
    return result


def _takes(sae: dict[str, Any], given: dict[str, Any], name: str) -> bool:
    try:
        TrainArgs(activation=given.get("activation"), **{name: given[name]}).sae_settings(dict(sae))
    except UnweaveError:
        return False
    return True


def _list_worlds() -> None:
    from rich.console import Console
    from rich.table import Table

    from unweave.synthetic.worlds import load_world, world_names

    table = Table.grid(padding=(0, 2))
    for name in world_names():
        table.add_row(name, load_world(name).description)
    Console(highlight=False).print(table)
