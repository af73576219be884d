"""The folder of a run: new, begun, stopped at a checkpoint, or finished.

Killed at any moment, a run leaves one of these behind, and resuming goes on from each of them. The checkpoints vanish
by one rename once the SAEs are saved: a run that has SAEs and no checkpoint is finished.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from unweave._errors import UnweaveError
from unweave._files import refuse_foreign, remove_folder, remove_leftovers, write_json
from unweave.training.checkpoint import checkpoints
from unweave.training.config import TrainConfig, from_dict, to_dict
from unweave.training.progress import say

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
FOLDERS = ("sae", "saes", CHECKPOINTS)
"""What a new run replaces."""
OURS = re.compile(r"(cfg|state|eval(_.+)?)\.json|(sae_weights|state)\.safetensors|features\.html")
"""Files that the commands write into them."""


def check_folder(config: TrainConfig, out: Path | None, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, if any; refuses a folder that holds something else."""
    if out is None:
        if resume:
            raise UnweaveError("a run without an output folder cannot be resumed.")
        return None
    if out.exists() and not out.is_dir():
        raise UnweaveError(f"the output {str(out)!r} is a file; name a folder.")
    held = out.is_dir() and any(out.iterdir())
    if not resume:
        if held and not overwrite:
            raise UnweaveError(
                f"the folder {str(out)!r} is not empty; pass --resume to go on or --overwrite to start anew."
            )
        if held:
            _check_ours(out)
        return None
    saved = checkpoints(out / CHECKPOINTS)
    if (out / CONFIG).exists() or saved:
        before = to_dict(read_run_config(out))
        for key, value in to_dict(config).items():
            if key not in ("out", "device") and value != before[key]:
                raise UnweaveError(
                    f"the run in {str(out)!r} has {key}={before[key]!r}, so it cannot go on with {value!r}."
                )
    elif held and not all(path.name.startswith(".") for path in out.iterdir()):
        raise UnweaveError(f"the folder {str(out)!r} holds something else than a run to resume: choose another one.")
    return saved[-1] if saved else None


def _check_ours(out: Path) -> None:
    """Refuse to overwrite what is no run, or what somebody put into the folders that a new run replaces.

    Raises:
        UnweaveError: It names the first such file.
    """
    visible = [path for path in out.iterdir() if not path.name.startswith(".")]
    if visible and not _is_config(out / CONFIG):
        raise UnweaveError(
            f"the folder {str(out)!r} holds something else than a run, such as {min(visible).name!r}: name another one."
        )
    refuse_foreign(out, FOLDERS, OURS)


def _is_config(path: Path) -> bool:
    """Whether a file is the config of a run, of any version: a model's `config.json` is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"hooks", "saes", "tokens"} <= found.keys()


def is_finished(out: Path) -> bool:
    """Whether all SAEs of the run in a folder are saved."""
    return not checkpoints(out / CHECKPOINTS) and any((out / name).is_dir() for name in ("sae", "saes"))


def read_run_config(out: Path) -> TrainConfig:
    """The config of the run in a folder.

    Raises:
        UnweaveError: If there is none, or it is damaged.
    """
    path = out / CONFIG
    try:
        config = from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is not the config of a run: {error}.") from error
    assert isinstance(config, TrainConfig)
    return config


def claim_folder(config: TrainConfig, out: Path, checkpoint: Path | None, *, resume: bool) -> None:
    """Make the folder this run's: without a checkpoint, empty it of an earlier run's files, and write the config."""
    if out.is_dir():
        remove_leftovers(out)
    if checkpoint is not None:
        return
    if resume:
        say(f"{str(out)!r} holds no checkpoint yet, so the run starts at its beginning.")
    for name in FOLDERS:
        remove_folder(out / name)
    for name in ("metrics.jsonl", "eval.json", "features.html"):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("eval_*.json"):  # of a coder with several targets
        path.unlink()
    write_json(out / CONFIG, to_dict(config))
