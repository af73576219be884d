"""Configs with a name: they turn into a dictionary that says which they are, and back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError, nearest

Config = TypeVar("Config", bound="GeneratorConfig")


class Registry(Generic[Config]):
    """The config classes of one kind by name.

    Attributes:
        kind: What they generate, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[Config]] = {}

    def register(self, name: str, config_class: type[Config]) -> None:
        """Make a class known by a name.

        Raises:
            UnweaveError: If the class calls itself otherwise, or another class has the name.
        """
        if config_class.generator_name() != name:
            raise UnweaveError(
                f"{config_class.__name__} calls itself {config_class.generator_name()!r} and cannot be registered as "
                f"{name!r}, since its files would not be found again."
            )
        known = self._classes.setdefault(name, config_class)
        # A class that is defined again, as when the cell of a notebook is run twice, takes its own place.
        if (known.__module__, known.__qualname__) != (config_class.__module__, config_class.__qualname__):
            raise UnweaveError(f"the {self.kind} {name!r} is already registered, as {known.__name__}.")
        self._classes[name] = config_class

    def get(self, name: str) -> type[Config]:
        """The class of a name.

        Raises:
            UnweaveError: If there is none; the message has the nearest names.
        """
        if name not in self._classes:
            raise UnweaveError(f"there is no {self.kind} {name!r}{_hint(str(name), self._classes)}")
        return self._classes[name]


class GeneratorConfig(ABC):
    """A config that generates one number per feature. Subclasses are dataclasses."""

    registry: ClassVar[Registry[Any]]

    @classmethod
    @abstractmethod
    def generator_name(cls) -> str:
        """The name it is registered and saved under."""

    @abstractmethod
    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        """One float32 number per feature, on the CPU; what draws nothing ignores the seed."""

    def to_dict(self) -> dict[str, Any]:
        """The fields and `generator_name`."""
        return {"generator_name": self.generator_name(), **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote, of whichever class its `generator_name` says.

        Raises:
            UnweaveError: If the name or a field is unknown, missing, or out of range.
        """
        fields = dict(d)
        if "generator_name" not in fields:
            raise UnweaveError(f"a {cls.registry.kind} has a generator_name, and there is none in {dict(d)!r}.")
        config_class = cls.registry.get(fields.pop("generator_name"))
        if not issubclass(config_class, cls):
            raise UnweaveError(f"the dictionary is of a {config_class.__name__}, not of a {cls.__name__}.")
        known = {f.name: f for f in dataclasses.fields(config_class) if f.init}  # type: ignore[arg-type]
        for name in fields:
            if name not in known:
                raise UnweaveError(f"{config_class.__name__} has no field {name!r}{_hint(name, known)}")
        for name, field in known.items():
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and name not in fields:
                raise UnweaveError(f"{config_class.__name__} needs the field {name!r}, which is missing.")
        return config_class(**fields)


def _hint(name: str, valid: Mapping[str, Any]) -> str:
    return nearest(name, valid) or f"; known are {', '.join(valid) or 'none'}."
