"""`unweave info`: which SAEs are published, and what one is, without downloading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from unweave._errors import UnweaveError
from unweave.cli.hints import parse
from unweave.cli.output import shown


@dataclass
class InfoArgs:
    """Show which SAEs are published, or what one is: shapes, architecture, model, hook. No weights are read.

    With a release alone, its SAEs are listed.
    """

    source: Annotated[tyro.conf.Positional[str | None], shown("SOURCE")] = None
    """A release, a repository on the Hub (OWNER/NAME), or a folder or file."""
    id: Annotated[tyro.conf.Positional[str | None], shown("ID")] = None
    """The SAE in it."""
    releases: Annotated[str | None, shown("WORDS")] = None
    """List the published releases in which all of these words occur; "" lists all."""
    revision: Annotated[str | None, shown("NAME", "main")] = None
    """Branch, tag or commit of the repository."""
    local_files_only: bool = False
    """Use what was downloaded before, and no network."""

    hint: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], shown("KEY=VALUE")] = ()
    """What the format's files do not say: dict_class, position, repo, scale, or mean (a list, or an npy file). Once for
    each."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.hub import releases, sae_info
        from unweave.hub.published import WIDE, directory

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDE)
        if self.releases is not None:
            if self.source is not None:
                raise UnweaveError("--releases lists releases: leave the name of one out, or leave --releases out.")
            console.print(releases(self.releases))
            return
        if self.source is None:
            raise UnweaveError("name a release, a repository or a path, or list what is published: --releases WORDS.")
        release = directory().get(self.source)
        if release is not None and self.id is None and len(release.saes) > 1:
            console.print(f"{release.name}: {release.model}, {release.format}, {release.repo_id} on the Hub\n")
            console.print(release)
            return
        revision, local = self.revision, self.local_files_only
        hints = parse(self.hint)
        console.print(sae_info(self.source, self.id, revision=revision, local_files_only=local, **hints))
