"""Images that cannot be read: each is named in a warning, and too many of them are an error."""

from __future__ import annotations

import warnings

from unweave._errors import UnweaveError


class BadImages(dict[str, str]):
    """Why each image of some `data` cannot be read, by its name: up to `most`, those that are `known` included."""

    def __init__(self, data: str, most: int, known: dict[str, str] | None = None) -> None:
        super().__init__(known or {})
        self._data, self._most = data, most
        self._places: dict[str, tuple[int, int]] = {}

    def note(self, name: str, reason: str, place: tuple[int, int]) -> None:
        """Add an image, found at some place (epoch, and place behind it in the epoch's order).

        Raises:
            UnweaveError: There are too many now; all are named.
        """
        if name in self:
            return
        self[name], self._places[name] = reason, place
        if len(self) > self._most:
            raise UnweaveError(
                f"{len(self)} images of {self._data} could not be read, more than max_bad={self._most}: "
                f"{'; '.join(f'{name} ({reason})' for name, reason in self.items())}."
            )
        warnings.warn(f"skipped the image {name}, which cannot be read: {reason}.", stacklevel=2)

    def up_to(self, place: tuple[int, int]) -> dict[str, str]:
        """Those that were known before, or were found up to a place: images are read ahead of it."""
        return {name: reason for name, reason in self.items() if self._places.get(name, place) <= place}
