"""`unweave eval`: how good a saved SAE is, on held-out text."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unweave.cli.output import shown, status

if TYPE_CHECKING:
    from unweave.sae import SAE


@dataclass
class EvalArgs:
    """Evaluate a saved SAE on held-out text: a table here, and eval.json in SAEBench's shape."""

    sae: Annotated[tyro.conf.Positional[Path], shown("FOLDER")]
    """Folder of the SAE."""
    model: Annotated[str | None, shown("NAME", "the model that the SAE was trained on")] = None
    """Model to run."""
    data: Annotated[str | None, shown("NAME", "the data that the SAE was trained on")] = None
    """Text or images to read."""
    hook: Annotated[str | None, shown("NAME", "the hook that the SAE was trained at")] = None
    """Where the SAE belongs; of a transcoder, what it reads."""
    target: Annotated[str | None, shown("NAME", "the target that the transcoder was trained on")] = None
    """Where a transcoder's output belongs."""
    tokens: int = 200_000
    """Held-out tokens to evaluate on."""
    context: Annotated[int | None, shown("N", "as in training")] = None
    """Tokens in a row."""
    held_out: Annotated[float | None, shown("X", "as in training")] = None
    """Share of the documents that is held out."""
    out: Annotated[Path | None, shown("FILE", "eval.json in the SAE's folder")] = None
    """File to write."""
    seed: int = 0
    """Seed of the order of the documents."""
    device: Annotated[str | None, shown("NAME", "a GPU if there is one")] = None
    """Where to run."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.evaluation import evaluate
        from unweave.sae import SAE, by_target

        for place, sae in by_target(SAE.load(saved(self.sae))).items():
            with status(f"evaluating {self.sae} {place}".rstrip()) as tick:
                report = evaluate(
                    sae, **source_of(sae, self), hook=self.hook, target=self.target, tokens=self.tokens,
                    device=self.device, seed=self.seed, progress=tick,
                )  # fmt: skip
            Console().print(report.table())
            path = self.out or self.sae / "eval.json"
            path = path.with_stem(f"{path.stem}_{place.replace(':', '_')}") if place else path
            report.save(path)
            print(f"saved {path}")


def evaluate_saved(result: Any, config: Any, tokens: int, *, again: bool = True) -> list[Any]:
    """Evaluate trained SAEs on held-out text, write an `eval.json` for each, and print their tables.

    Unless `again`, those that have one are left as they are.
    """
    from rich.console import Console

    from unweave.activations.cache import is_cache, open_cache
    from unweave.evaluation import evaluate
    from unweave.sae import by_target

    reports: list[Any] = []
    if is_cache(config.data):
        source = open_cache(config.data)
        if result.model is None or getattr(source, "tokens", None) is None:
            missing = f"the {'model' if result.model is None else 'data'} of the cache cannot be had from it"
        elif getattr(source, "held_out", None) is None:
            missing = f"{config.data} has no held-out rows"
        else:
            missing = ""
        if missing:
            print(f"not evaluated, for {missing}: use unweave eval.", file=sys.stderr)
            return reports
    parts = [(p, f, t) for sae, f in zip(result.saes, result.folders, strict=True) for t, p in by_target(sae).items()]
    for sae, folder, target in parts:
        name = f"eval_{target.replace(':', '_')}.json" if target else "eval.json"
        path = folder.parent / name if folder.name == "sae" else folder / name
        if path.exists() and not again:
            continue
        with status(f"evaluating {folder}") as tick:
            report = evaluate(sae, model=result.model, data=config.data, tokens=tokens, seed=config.seed, progress=tick)
        report.save(path)
        Console().print(report.table())
        print(f"saved {path}")
        reports.append(report)
    return reports


def saved(path: Path) -> Path:
    """The folder of a saved SAE, of any format that is read, as it was given.

    Raises:
        UnweaveError: There is no such folder, or no SAE in it; naming the nearest folder or release, or the SAEs below.
    """
    from unweave._errors import UnweaveError
    from unweave.hub.published import some
    from unweave.hub.reader import formats
    from unweave.hub.source import Source
    from unweave.sae.files import CONFIG

    source = Source(there(path))
    if source.file is not None:
        raise UnweaveError(f"{str(path)!r} is a file, and the folder of an SAE is needed.")
    if any(known.matches(source) for known in formats().values()):
        return path
    below = [str(folder) for folder in saes_below(path)]
    has = f"; there is one in {some(below)}." if below else f" ({CONFIG} is missing), and none below it."
    raise UnweaveError(f"the folder {str(path)!r} has no SAE in it{has}")


def saes_below(path: Path) -> list[Path]:
    """The folders of saved SAEs in a folder, such as a run's."""
    from unweave.sae.files import CONFIG

    found = {file.parent for deep in ("*", "*/*", "*/*/*") for file in path.glob(f"{deep}/{CONFIG}")}
    return sorted(folder for folder in found if not {"training", "checkpoints"} & set(folder.relative_to(path).parts))


def there(path: Path) -> Path:
    """A path on this machine, as it was given.

    Raises:
        UnweaveError: There is nothing at it; naming the nearest folder or release.
    """
    from unweave._errors import UnweaveError, nearest_beside
    from unweave.hub.published import directory

    if path.exists():
        return path
    if str(path) in directory():
        raise UnweaveError(
            f"{str(path)!r} is a release on the Hub, and a folder is needed: save one of its SAEs by "
            f"SAE.from_pretrained({str(path)!r}, ID).save(FOLDER); `unweave info {path}` lists them."
        )
    near = nearest_beside(path, directory(), folders=True)
    raise UnweaveError(f"there is no folder {str(path)!r}, and no release of this name{near or '.'}")


def source_of(sae: SAE, args: Any) -> dict[str, Any]:
    """Model, data and how to read them: from the command line, else as the SAE was trained."""
    from unweave._errors import UnweaveError
    from unweave.evaluation.sample import default_data_config, default_image_config

    metadata = sae.metadata
    found = {}
    for name, key in (("model", "model_name"), ("data", "dataset_path")):
        found[name] = getattr(args, name) or metadata.get(key)
        if found[name] is None:
            raise UnweaveError(f"the SAE does not say which {name} it was trained on; pass --{name}.")
    given: dict[str, Any] = {name: getattr(args, name, None) for name in ("context", "held_out")}
    given = {name: value for name, value in given.items() if value is not None}
    if "images" in metadata:
        if "context" in given:
            raise UnweaveError("the rows of an SAE of images are as long as the images make them: leave out --context.")
        return found | {"data_config": replace(default_image_config(sae), **given)}
    return found | {"data_config": replace(default_data_config(sae), **given)}
