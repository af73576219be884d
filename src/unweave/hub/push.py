"""To the Hub: SAEs, runs, synthetic models and cached activations, each with a page that says what it is.

A push is one commit, so a repository never holds half of it. Large files are uploaded before it and recognised by their
hash, so a push that was interrupted goes on where it stopped when it is given again. What else a repository holds
stays; its page then lists everything.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from unweave._errors import UnweaveError
from unweave._hub import unreachable
from unweave.hub import card
from unweave.hub.card import Entry, join
from unweave.hub.download import fetch, listing
from unweave.hub.explained import explained
from unweave.hub.folders import EVALUATION, PAGE, Upload, gathered, read_json, text_of
from unweave.hub.repo import Repo, check_inside, missing, within
from unweave.sae.files import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, HfApi

    from unweave.evaluation import Report
    from unweave.sae import SAE

_ATTEMPTS = 3


def push_to_hub(
    sae: SAE,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    revision: str = "main",
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    report: Report | str | Path | None = None,
    dashboard: str | Path | None = None,
) -> str:
    """Share an SAE on the Hub, in SAELens' layout: weights, config, and a page with usage and measured numbers.

    Args:
        sae: The SAE.
        repo_id: OWNER/NAME, or NAME in one's own name space. It is made if it is not there; what it holds stays.
        subfolder: Folder of the SAE; by default the name of its hook, by which SAELens loads it.
        private: Whether a new repository is private; by default as the owner's settings say.
        revision: Branch; made if it is not there.
        token: With the right to write; by default what `hf auth login` or HF_TOKEN gave.
        commit_message: By default, what was pushed.
        license: Of the weights, by its name on the Hub, such as "mit".
        report: What `evaluate` found, or the `eval.json` of it: goes beside the SAE and onto the page. The frequencies
            in it become `sparsity.safetensors`.
        dashboard: The `features.html` of `uw.dashboard`; goes beside the SAE.

    Returns:
        The address of the SAE's folder.

    Raises:
        UnweaveError: If the SAE has no inference form, there is no right to write, the repository is public and
            `private` asks for a private one, or the connection breaks; nothing is visible then.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = sae.save(Path(made) / "sae")
        if isinstance(report, str | Path):
            (folder / EVALUATION).write_bytes(_file(report).read_bytes())
        elif report is not None:
            report.save(folder / EVALUATION)
        if dashboard is not None:
            (folder / PAGE).write_bytes(_file(dashboard).read_bytes())
        return push(
            folder, repo_id, subfolder=subfolder, private=private, revision=revision, token=token, license=license,
            commit_message=commit_message,
        )  # fmt: skip


def push(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    revision: str = "main",
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
) -> str:
    """Share a folder: a saved SAE, all SAEs of a run, a synthetic model, cached activations or tokens.

    Of a run, the inference forms go (not its checkpoints, nor the training forms), each with its report and its page.

    Args:
        folder: The folder.
        repo_id: As for `push_to_hub`. Activations and tokens become a data set.
        subfolder: Where it goes in the repository. By default the hook of a single SAE, and the top for anything else;
            the SAEs of a run keep their folders below it.
        private: As for `push_to_hub`, and so are the rest.
        revision: Branch.
        token: With the right to write.
        commit_message: By default, what was pushed.
        license: Of what is pushed.

    Returns:
        The address of what was pushed.

    Raises:
        UnweaveError: If the folder holds nothing that is known, and as for `push_to_hub`.
    """
    folder = Path(folder)
    with gathered(folder, check_inside(subfolder.strip("/")) if subfolder is not None else None, repo_id) as upload:
        return _Push(upload, repo_id, private, revision, token, license).run(commit_message)


@dataclass
class _Push:
    """One push."""

    upload: Upload
    repo_id: str
    private: bool | None
    revision: str
    token: str | None
    license: str | None

    def run(self, message: str | None) -> str:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError

        api, kind = HfApi(token=self.token), self.upload.repo_type
        if (away := unreachable()) is not None:
            raise UnweaveError(f"nothing was pushed: the Hugging Face Hub cannot be reached {away}.")
        if "/" not in self.repo_id:
            with explained(Repo(f"me/{self.repo_id}", token=self.token), reads=False):
                self.repo_id = f"{api.whoami()['name']}/{self.repo_id}"
        repo = Repo(self.repo_id, self.revision, self.token, kind=kind)
        with explained(repo, reads=False):
            self._make(api, repo)
        message = message or f"Upload {self._what()}"
        for attempt in range(_ATTEMPTS):
            try:
                with explained(repo, reads=False):
                    self._commit(api, repo, message)
                break
            except UnweaveError as error:  # somebody pushed between our look and our commit
                cause = error.__cause__
                raced = isinstance(cause, HfHubHTTPError) and cause.response.status_code == 412
                if not raced or attempt == _ATTEMPTS - 1:
                    raise
        prefix = "datasets/" if kind == "dataset" else ""
        path = f"/{self.upload.saes[0].path}" if len(self.upload.saes) == 1 and self.upload.saes[0].path else ""
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}/tree/{self.revision}{path}"

    def _what(self) -> str:
        if self.upload.kind != "saes":
            return self.upload.kind
        return f"SAE {self.upload.saes[0].path}" if len(self.upload.saes) == 1 else f"{len(self.upload.saes)} SAEs"

    def _make(self, api: HfApi, repo: Repo) -> None:
        api.create_repo(repo.id, private=self.private, repo_type=repo.kind, exist_ok=True)
        if self.private and not api.repo_info(repo.id, repo_type=repo.kind).private:
            raise UnweaveError(f"the repository {repo} is public already, and private=True was asked for.")
        if self.revision != "main":
            api.create_branch(repo.id, branch=self.revision, repo_type=repo.kind, exist_ok=True)

    def _commit(self, api: HfApi, repo: Repo, message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        now, there = listing(repo)
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            CommitOperationAdd(name, path) for name, path in self.upload.files.items()
        ]
        operations += [CommitOperationDelete(name) for name in self._outdated(there)]
        operations.append(CommitOperationAdd("README.md", self._card(now, there).encode()))
        api.create_commit(
            repo.id, operations, commit_message=message, repo_type=repo.kind, revision=repo.revision,
            parent_commit=now.commit,
        )  # fmt: skip

    def _outdated(self, there: list[str]) -> list[str]:
        """What belongs to the SAEs that are replaced: their reports, pages and frequencies."""
        folders = {entry.path for entry in self.upload.saes}
        about = re.compile(r"eval(_.*)?\.json|features\.html|sparsity\.safetensors")
        return [
            name for name in there
            if name not in self.upload.files and name.rpartition("/")[0] in folders
            and about.fullmatch(name.rpartition("/")[2])
        ]  # fmt: skip

    def _card(self, repo: Repo, there: list[str]) -> str:
        before = text_of(fetch(repo, ["README.md"]) / "README.md") if "README.md" in there else ""
        if self.upload.kind == "saes":
            return card.sae_card(repo.id, self._all_saes(repo, there, before), before, self.license)
        title = {"synthetic model": "A synthetic model: activations whose features are known.",
                 "activations": "Cached activations.", "tokens": "Text as tokens."}[self.upload.kind]  # fmt: skip
        synthetic = self.upload.kind == "synthetic model"
        return card.folder_card(
            repo.id, title, self.upload.facts, self.upload.usage, before, self.license,
            library="saelens" if synthetic else None,
            tags=["sparse-autoencoder", "synthetic" if synthetic else self.upload.kind],
        )  # fmt: skip

    def _all_saes(self, repo: Repo, there: list[str], before: str) -> list[Entry]:
        """What is pushed, and what is there already and stays."""
        pushed = {entry.path for entry in self.upload.saes}
        measured, entries = card.measured_before(before), list(self.upload.saes)
        for name in there:
            path = str(PurePosixPath(name).parent)
            path = "" if path == "." else path
            if PurePosixPath(name).name != CONFIG or path in pushed or join(path, WEIGHTS) not in there:
                continue
            config = read_json(fetch(repo, [name]) / name)
            if "architecture" in config:
                entries.append(Entry(path, config, measured.get(path or repo.id, []), join(path, PAGE) in there))
        return sorted(entries, key=lambda entry: _natural(entry.path))


def pull(
    repo_id: str,
    subfolder: str = "",
    *,
    kind: Literal["model", "dataset"] = "model",
    revision: str = "main",
    local_files_only: bool = False,
    token: str | None = None,
    only: Sequence[str] = (),
) -> Path:
    """Download a folder of a repository with all that is in it, and return where it lies.

    Args:
        repo_id: OWNER/NAME.
        subfolder: The folder; the whole repository by default.
        kind: "model", or "dataset" for cached activations and tokens.
        revision: Branch, tag or commit.
        local_files_only: Use what was downloaded before, and no network.
        token: Of a private or gated repository.
        only: Names of files directly in the folder, which alone are wanted; those that are missing are left out.

    Raises:
        UnweaveError: As `SAE.from_pretrained`, for what concerns the Hub.
    """
    repo = Repo(repo_id, revision, token, local_files_only, kind=kind)
    folder = check_inside(subfolder.strip("/"))
    repo, there = listing(repo)
    files = [join(folder, name) for name in only if join(folder, name) in there] if only else within(there, folder)
    if not files:
        raise missing(repo, there, subfolder)
    return fetch(repo, files) / folder


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Order in which layer 10 comes after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def _file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UnweaveError(f"there is no file {str(path)!r} to push.")
    return Path(path)
