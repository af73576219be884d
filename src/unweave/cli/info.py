"""`unweave info`: which SAEs are published, and what one is, without downloading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unweave._errors import UnweaveError
from unweave.cli.hints import parse
from unweave.cli.output import shown


@dataclass
class InfoArgs:
    """Show which SAEs are published, or what one is: shapes, architecture, model, hook. No weights are read.

    With a release alone, its SAEs are listed. Folders that `unweave cache` and `unweave tokenize` wrote are known too.
    """

    source: Annotated[tyro.conf.Positional[str | None], shown("SOURCE")] = None
    """A release, a repository on the Hub (OWNER/NAME), or a folder or file."""
    id: Annotated[tyro.conf.Positional[str | None], shown("ID")] = None
    """The SAE in it."""
    releases: Annotated[tuple[str, ...] | None, shown("[WORD ...]")] = None
    """List the published releases in which all of these words occur; without a word, all of them."""
    revision: Annotated[str | None, shown("NAME", "main")] = None
    """Branch, tag or commit of the repository."""
    local_files_only: bool = False
    """Use what was downloaded before, and no network."""
    json: bool = False
    """Print all that is known of an SAE or a folder as JSON."""
    verify: bool = False
    """Compare every file of a cache or token folder with its checksum, which reads all of it."""

    hint: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], shown("KEY=VALUE")] = ()
    """What the format's files do not say: dict_class, position, repo, scale, or mean (a list, or an npy file). Once for
    each."""

    def run(self) -> None:
        import json

        from rich.console import Console

        from unweave.cli.folders import fact_rows, folder_facts, verify
        from unweave.hub import releases, sae_info
        from unweave.hub.info import as_table
        from unweave.hub.published import WIDE, directory

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDE)
        if self.json and (self.releases is not None or self.source is None):
            raise UnweaveError("--json prints what one SAE or one folder is: name it, and leave --releases out.")
        if self.releases is not None:
            if self.source is not None:
                raise UnweaveError("--releases lists releases: leave the name of one out, or leave --releases out.")
            console.print(releases(" ".join(self.releases)))
            return
        if self.source is None:
            raise UnweaveError("name a release, a repository or a path, or list what is published: --releases.")
        release = directory().get(self.source)
        if self.id is None and release is None and (facts := folder_facts(Path(self.source).expanduser())) is not None:
            if self.verify:
                verify(Path(self.source).expanduser())
                facts["verified"] = True
            print(json.dumps(facts, indent=1)) if self.json else console.print(as_table(fact_rows(facts)))
            return
        if release is not None and not self.json and self.id is None and len(release.saes) > 1:
            console.print(f"{release.name}: {release.model}, {release.format}, {release.repo_id} on the Hub\n")
            console.print(release)
            return
        if self.verify:
            raise UnweaveError(f"{self.source!r} is no cache or token folder: --verify compares their checksums.")
        revision, local = self.revision, self.local_files_only
        hints = parse(self.hint)
        info = sae_info(self.source, self.id, revision=revision, local_files_only=local, **hints)
        print(json.dumps(info.as_dict(), indent=1, default=str)) if self.json else console.print(info)
