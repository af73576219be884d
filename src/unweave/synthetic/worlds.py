"""Worlds: a synthetic model, SAEs to train on it and how long, in one TOML file. Some ship with unweave, by name."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError, nearest
from unweave.synthetic.arguments import require_count
from unweave.synthetic.model_config import SyntheticModelConfig
from unweave.training.config import SAEConfig, from_dict, to_dict

FOLDER = Path(__file__).with_name("worlds")


@dataclass(frozen=True)
class World:
    """A synthetic model, and what to do with it.

    Attributes:
        name: Its name, or that of its file.
        model: What the data are made of. Without a seed, it is 0.
        saes: SAEs to train, all on one stream; may be empty.
        description: A line about it.
        samples: Samples that its statistics are measured on.
        training_samples: Samples that the SAEs are trained on.
        batch_size: Samples in an optimiser step.
        eval_samples: Samples that the SAEs are scored on.

    Raises:
        UnweaveError: If a number is not a positive integer.
    """

    name: str
    model: SyntheticModelConfig
    saes: tuple[SAEConfig, ...] = ()
    description: str = ""
    samples: int = 100_000
    training_samples: int = 1_000_000
    batch_size: int = 1024
    eval_samples: int = 100_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "saes", tuple(self.saes))
        if self.model.seed is None:
            object.__setattr__(self, "model", dataclasses.replace(self.model, seed=0))
        for name in ("samples", "training_samples", "batch_size", "eval_samples"):
            require_count(name, getattr(self, name))

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> World:
        """The world of a TOML file's keys: `model`, `saes`, and the numbers; see the page on synthetic worlds.

        Raises:
            UnweaveError: If `model` is missing, a key does not exist (the message names the nearest that does), or a
                value does not fit.
        """
        keys = [f.name for f in dataclasses.fields(cls) if f.name != "name"]
        for key in values:
            if key not in keys:
                hint = nearest(key, keys) or f"; there are {', '.join(keys)}."
                raise UnweaveError(f"a world has no setting {key!r}{hint}")
        if not isinstance(values.get("model"), Mapping):
            raise UnweaveError(f"the world {name!r} needs a table [model] that says what its data are made of.")
        saes = values.get("saes", [])
        if not isinstance(saes, list) or not all(isinstance(sae, Mapping) for sae in saes):
            raise UnweaveError("saes must be a list of tables (in TOML, [[saes]]).")
        settings = {k: v for k, v in values.items() if k not in ("model", "saes")}
        return cls(
            name=name,
            model=SyntheticModelConfig.from_dict(values["model"]),
            saes=tuple(from_dict(SAEConfig, dict(sae), f"saes[{i}].") for i, sae in enumerate(saes)),
            **settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the name, and what `from_dict` takes."""
        result = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return result | {"model": self.model.to_dict(), "saes": [to_dict(sae) for sae in self.saes]}


def world_names() -> list[str]:
    """The worlds that ship with unweave."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_world(world: str | Path) -> dict[str, Any]:
    """The settings in a world's file.

    Args:
        world: The name of a world that ships with unweave, or the path of a TOML file.

    Raises:
        UnweaveError: If there is no such world (the message names the nearest), or the file cannot be read.
    """
    path = Path(world)
    if str(world) in world_names():
        path = FOLDER / f"{world}.toml"
    elif path.suffix != ".toml" and not path.is_file():
        names = world_names()
        hint = nearest(str(world), names) or f"; there are {', '.join(names)}, or name a TOML file."
        raise UnweaveError(f"there is no world {str(world)!r}{hint}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"the world {str(path)!r} cannot be read: {error}.") from error


def load_world(world: str | Path) -> World:
    """A world by its name, or from a TOML file.

    Raises:
        UnweaveError: See `read_world` and `World.from_dict`.
    """
    return World.from_dict(Path(world).stem, read_world(world))
