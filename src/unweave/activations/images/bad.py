"""Images that cannot be read: each is named in a warning, and too many of them are an error."""

from __future__ import annotations

import warnings

from unweave._errors import UnweaveError


class BadImages(dict[str, str]):
    """Why each image of some `data` cannot be read, by its name: up to `most`, those that are `known` included.

    Attributes:
        new: Those that were found since.
    """

    def __init__(self, data: str, most: int, known: dict[str, str] | None = None) -> None:
        super().__init__(known or {})
        self._data, self._most = data, most
        self.new: dict[str, str] = {}

    def note(self, name: str, reason: str) -> None:
        """Add an image.

        Raises:
            UnweaveError: There are too many now; all are named.
        """
        self.new[name] = reason
        if name in self:
            return
        self[name] = reason
        self.check()
        warnings.warn(f"skipped the image {name}, which cannot be read: {reason}.", stacklevel=2)

    def check(self) -> None:
        """Refuse too many.

        Raises:
            UnweaveError: There are; all are named.
        """
        if len(self) > self._most:
            raise UnweaveError(
                f"{len(self)} images of {self._data} could not be read, more than max_bad={self._most}: "
                f"{'; '.join(f'{name} ({reason})' for name, reason in self.items())}."
            )
