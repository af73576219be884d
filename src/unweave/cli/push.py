"""`unweave push`: share SAEs, synthetic models and cached activations on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unweave.cli.output import shown


@dataclass
class PushArgs:
    """Share a saved SAE, all SAEs of a run, a synthetic model, or cached activations on the Hugging Face Hub.

    In one commit, beside what the repository holds. A push that was interrupted goes on when it is given again.
    """

    folder: Annotated[tyro.conf.Positional[Path], shown("FOLDER")]
    """What to share."""
    repo: Annotated[tyro.conf.Positional[str], shown("OWNER/NAME")]
    """Repository; it is made if it is not there."""
    subfolder: Annotated[str | None, shown("FOLDER", "the hook of a single SAE, else the top")] = None
    """Where it goes in the repository."""
    private: bool = False
    """Make a new repository private."""
    revision: str = "main"
    """Branch; it is made if it is not there."""
    license: Annotated[str | None, shown("NAME", "not stated")] = None
    """Of what is shared, by its name on the Hub, such as mit."""
    message: Annotated[str | None, shown("TEXT", "what was pushed")] = None
    """Of the commit."""

    def run(self) -> None:
        from unweave.hub import push

        address = push(
            self.folder, self.repo, subfolder=self.subfolder, private=self.private or None, revision=self.revision,
            license=self.license, commit_message=self.message,
        )  # fmt: skip
        print(f"pushed {address}")
