"""`SAE.from_pretrained`: an SAE by its name in the directory of releases, by its repository, or by its path.

What the directory knows beyond the files (an input scale, keys of a config) is applied here, whichever way the SAE was
named; where it came from is kept in `metadata["source"]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from unweave._errors import UnweaveError, nearest
from unweave.hub import published as listed
from unweave.hub.card import join
from unweave.hub.download import fetch, listing
from unweave.hub.llamascopium import refuse_distributed
from unweave.hub.published import PublishedSAE, Release, some
from unweave.hub.reader import detect, format_named, read_sae
from unweave.hub.repo import HUB_NAME, Repo, check_inside, missing, within
from unweave.hub.saelens import SCALE
from unweave.hub.source import Source
from unweave.sae import SAE

_FILES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "saelens": ("{path}", ("{path}/cfg.json", "{path}/sae_weights.safetensors"), ()),
    "gemma_scope": ("{path}", ("{path}/params.npz",), ()),
    "gemma_scope_transcoder": ("{path}", ("{path}/params.npz",), ()),
    "gemma_scope_2": ("{path}", ("{path}/params.safetensors",), ("{path}/config.json",)),
    "llama_scope": ("{path}", ("{path}/hyperparams.json", "{path}/checkpoints/final.safetensors"), ()),
    "llama_scope_r1_distill": ("{path}", ("{path}/config.json", "{path}/sae_weights.safetensors"), ()),
    "dictionary_learning": ("{path}", ("{path}/config.json", "{path}/ae.pt"), ()),
    "temporal": ("{path}", ("{path}/conf.yaml", "{path}/latest_ckpt.safetensors"), ()),
    "hook_z": ("{path}", ("{path}", "{stem}_cfg.json"), ()),
    "qwen_scope": ("{path}", ("{path}",), ()),
    "goodfire": ("{path}", ("{path}",), ()),
    "deepseek_r1": ("{path}", ("{path}",), ()),
    "mwhanna_transcoder": ("{path}", ("{path}",), ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")),
}  # fmt: skip
"""Of each format of the directory: what its reader is given, the files that it takes, and those that may be missing."""

_READERS = {"gemma_scope_transcoder": "gemma_scope", "mwhanna_transcoder": "circuit_tracer"}
"""Names of the directory's formats, where they are not those of our readers."""
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".bin")
_NO_WEIGHTS = ("sparsity", "optimizer", "activation", "trainer_state", "state", "lr_scheduler", "scheduler", "rank_")
_NO_CONFIGS = ("eval", "runner_cfg", "tokenizer", "vocab", "special_tokens", "trainer_state")
_SIDE_FILES = (".json", ".yaml", ".yml")
_USUAL = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors")
_NESTED = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
"""Weights of OpenMOSS, whose config lies one folder above; the first that is there."""
_LAYERS = re.compile(r"(W_(enc|dec)|params_layer)_\d+\.safetensors")
"""Files that are one SAE together: the layers of a cross-layer transcoder."""


@dataclass(frozen=True)
class Place:
    """Where the files of an SAE are.

    Attributes:
        target: What its reader is given, relative to the repository.
        files: The files that it takes.
        optional: Files that it takes if they are there.
        repo: The repository; None for a path on this machine, which `target` then is.
        release: The release that it belongs to, if the directory knows it.
        published: What the directory says of it.
    """

    target: str
    files: Sequence[str] = ()
    optional: Sequence[str] = ()
    repo: Repo | None = None
    release: Release | None = None
    published: PublishedSAE | None = None

    @property
    def format(self) -> str | None:
        """The format, where the directory knows it and the files do not tell."""
        if self.release is None or self.release.format == "saelens":  # of which there are two
            return None
        return _READERS.get(self.release.format, self.release.format)

    def hints(self, path: Path) -> dict[str, Any]:
        """What the directory says and the reader of the downloaded files asks for."""
        hints: dict[str, Any] = {"format": self.format, "repo": self.repo.id if self.repo is not None else None}
        if self.release is not None and self.release.config_overrides:
            hints["config_overrides"] = self.release.config_overrides
        if self.published is not None and self.published.norm_scaling_factor is not None:
            made = detect(Source(path)) if self.format is None else format_named(self.format)
            if SCALE in made.hints:
                hints[SCALE] = self.published.norm_scaling_factor
        return hints


def from_pretrained(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    token: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **hints: Any,
) -> SAE:
    """Load a published SAE, or one from a folder.

    Args:
        source: Name of a release (`uw.releases()` lists them), a repository on the Hub (OWNER/NAME), or a path.
        id: The SAE in it: its id in the release, or its folder or file in the repository or below the path. It can be
            left out where there is only one.
        revision: Branch, tag or commit of the repository; by default "main".
        local_files_only: Use what was downloaded before, and no network.
        force_download: Download again what was downloaded before.
        token: Of a private or gated repository; by default what `hf auth login` or HF_TOKEN gave.
        device: Where to put the weights.
        dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.
        **hints: `format`, and what the format's files do not say; see `unweave.hub.read_sae`.

    Returns:
        The SAE, with where it came from in `metadata["source"]`.

    Raises:
        UnweaveError: If there is no such release, id, repository, revision or file, naming the nearest; if the id could
            mean several; if the repository needs a token; if there is no network, saying what was downloaded before; if
            a file arrived damaged; and as `unweave.hub.read_sae`.
    """
    place = find(
        source, id, revision=revision, local_files_only=local_files_only, force_download=force_download, token=token
    )
    if place.repo is None:
        return read_sae(place.target, device=device, dtype=dtype, **hints)
    folder = fetch(place.repo, place.files, place.optional)
    path = folder / place.target
    sae = read_sae(path, device=device, dtype=dtype, **(place.hints(path) | hints))
    complete(sae, place, folder.name)
    return sae


def find(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    token: str | None = None,
) -> Place:
    """Where an SAE is; arguments and errors as of `from_pretrained`. Of an unknown repository, its files are listed."""
    known = isinstance(source, str) and source in listed.directory()
    local = Path(source).expanduser()
    if not known and (isinstance(source, Path) or local.exists() or str(source).startswith((".", "/", "~"))):
        if revision is not None:
            raise UnweaveError(f"{str(source)!r} is a path, which has no revision {revision!r}.")
        return Place(str(local if id is None else local / check_inside(id)))
    options: dict[str, Any] = {"token": token, "local_files_only": local_files_only, "force_download": force_download}
    if known:
        release, published = listed.find(str(source), id)
        return _published(Repo(release.repo_id, revision or "main", **options), release, published)
    if not HUB_NAME.fullmatch(str(source)):
        hint = nearest(str(source), [*listed.directory(), *(p.name for p in Path.cwd().iterdir() if p.is_dir())])
        hint = hint or "; `unweave info --releases WORD` searches the releases."
        raise UnweaveError(f"there is no release and no folder {str(source)!r}{hint}")
    repo, path = Repo(str(source), revision or "main", **options), check_inside((id or "").strip("/"))
    if path and (found := listed.at(repo.id, path)):
        return _published(repo, *found)
    return _in_repository(repo, path)


def _published(repo: Repo, release: Release, published: PublishedSAE) -> Place:
    if release.format == "clt_layer_transcoder":
        raise UnweaveError(
            f"{published.id!r} of {release.name!r} is one layer of a cross-layer transcoder, whose codes decode into "
            f"all later layers: load the whole by its repository, {release.repo_id!r}."
        )
    target, files, optional = _FILES[release.format]
    path, stem = published.path, published.path.removesuffix(".pt")
    names, more = ([text.format(path=path, stem=stem) for text in texts] for texts in (files, optional))
    return Place(target.format(path=path), names, more, repo, release, published)


def _in_repository(repo: Repo, path: str) -> Place:
    """An SAE in a repository that the directory does not know: what is there decides."""
    repo, files = listing(repo)
    if path in files:
        folder = path.rpartition("/")[0]
        sides = _split(_directly(files, folder))[1]
        if PurePosixPath(folder).name == "checkpoints":  # the config lies beside the folder
            sides += _split(_directly(files, str(PurePosixPath(folder).parent).removeprefix(".")))[1]
        return Place(path, [*sides, path], repo=repo)
    below = within(files, path)
    if not below:
        raise missing(repo, files, path)
    here = _directly(below, path)
    weights, sides = _split(here)
    nested = [join(path, name) for name in _NESTED if join(path, name) in below]
    if nested and not weights:
        return Place(path, [*sides, nested[0]], repo=repo)
    if weights and all(_LAYERS.fullmatch(PurePosixPath(f).name) for f in weights):
        return Place(path, [*sides, *weights], repo=repo)
    if len(weights) == 1:
        others = [f for f in here if f.endswith(".safetensors") and "activation" in PurePosixPath(f).name]
        return Place(path, [*sides, *others, *weights], repo=repo)
    folders = sorted({str(PurePosixPath(f).parent) for f in _split(below)[0] if f.endswith(_USUAL)})
    if len(folders) == 1 and not path and not weights:
        return _in_repository(repo, folders[0])
    where = f"{path!r} of {repo}" if path else f"the repository {repo}"
    if several := weights or folders:
        raise UnweaveError(f"{where} holds several SAEs; name one: {some(several)}.")
    refuse_distributed(below, where)
    raise UnweaveError(f"{where} holds no SAE: there are {some(below)}.")


def _directly(files: Sequence[str], folder: str) -> list[str]:
    return [f for f in files if f.rpartition("/")[0] == folder]


def _split(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files with weights (if there are some that formats call so, only these), and the small ones beside them."""
    weights = [f for f in files if f.endswith(_WEIGHTS) and not PurePosixPath(f).name.startswith(_NO_WEIGHTS)]
    usual = [f for f in weights if PurePosixPath(f).name in _USUAL]
    sides = [f for f in files if f.endswith(_SIDE_FILES) and not PurePosixPath(f).name.startswith(_NO_CONFIGS)]
    return usual or weights, sides


def complete(sae: SAE, place: Place, commit: str) -> None:
    """Add to an SAE what the directory knows and its files do not say, and where it came from."""
    assert place.repo is not None
    source: dict[str, Any] = {"repo": place.repo.id, "path": place.target, "commit": commit}
    if place.release is not None and place.published is not None:
        source |= {"release": place.release.name, "id": place.published.id}
        sae.metadata |= {"sae_lens_release_id": place.release.name, "sae_lens_id": place.published.id}
        for key, value in (("model_name", place.release.model), ("neuronpedia_id", place.published.neuronpedia)):
            if sae.metadata.get(key) is None and value is not None:
                sae.metadata[key] = value
    sae.metadata["source"] = source
