"""What an SAE is, without its weights: from its config, and from the few bytes of a file that say what is in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import map_tensors
from unweave.hub.card import join, results_of
from unweave.hub.download import fetch
from unweave.hub.folders import EVALUATION, SPARSITY, read_json
from unweave.hub.pretrained import Place, find
from unweave.hub.published import PublishedSAE
from unweave.hub.reader import describe_sae
from unweave.hub.sketch import RemoteFile, sketch
from unweave.sae.files import CONFIG

if TYPE_CHECKING:
    from rich.console import RenderableType

_NEVER = -9.99
"""More than what is stored of a latent that never fired: the logarithm of 1e-10."""


@dataclass(frozen=True)
class SAEInfo:
    """What is known of an SAE before its weights are read.

    Attributes:
        where: Folder, or repository and path.
        format: How its files are laid out.
        kind: "SAE", "Transcoder", "Crosscoder" or "CrossLayerTranscoder".
        d_in: Width of its inputs.
        d_out: Width of its outputs.
        d_sae: Number of latents.
        dtype: As its weights are stored.
        activation: Name of the activation function as `type`, and its fields.
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input.
        metadata: Model, hook, data and what else its files say.
        published: What the directory of releases says of it, if it is there.
        log10_densities: `(d_sae,)`, the logarithm of how often each latent fires per token, as `sparsity.safetensors`
            beside SAELens' files has it: -10 where it never fired, NaN where that is unknown. None without that file.
        results: What the `eval.json` of a folder on this machine measured, as results of a model-index.
    """

    where: str
    format: str
    kind: str
    d_in: int
    d_out: int
    d_sae: int
    dtype: str
    activation: dict[str, Any]
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]
    published: PublishedSAE | None = None
    log10_densities: Float[Tensor, " d_sae"] | None = field(default=None, repr=False, compare=False)
    results: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder, the decoder and its bias, as this library lays them out."""
        return {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_out), "b_dec": (self.d_out,)}

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say in a few lines; all of it is in `as_dict`."""
        fields = ", ".join(f"{k}={v}" for k, v in self.activation.items() if k != "type" and v is not None)
        said, sizes = self.metadata, {"d_in": self.d_in, "d_sae": self.d_sae, "d_out": self.d_out}
        l0 = self.published.l0 if self.published is not None else None
        shapes = "  ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.shapes.items())
        hooks = dict.fromkeys(str(said[key]) for key in ("hook_name", "hf_hook_name") if said.get(key))
        rows = [
            ("what", f"{self.kind} {self.activation['type']}({fields})"),
            ("model", said.get("model_name")),
            ("hook", ", ".join(hooks)),
            ("output", said.get("hook_name_out")),
            ("data", said.get("dataset_path")),
            ("trained on", f"{n:,} tokens" if isinstance(n := said.get("training_tokens"), int) else None),
            ("sizes", "  ".join(f"{k} {v:,}" for k, v in sizes.items() if k != "d_out" or v != self.d_in)),
            ("weights", f"{shapes}  {self.dtype}"),
            ("L0, as published", f"{l0:g}" if l0 is not None else None),
        ]
        for result in self.results:
            measured = ", ".join(f"{metric['name']} {metric['value']:.4g}" for metric in result["metrics"])
            rows.append((f"measured on {result['dataset']['name']}", measured))
        if (found := self.log10_densities) is not None:
            never, known = int((found <= _NEVER).sum()), found[found > _NEVER]
            percent = 100 * 10 ** known.median().item() if len(known) else 0
            rows.append(("latents that never fired", f"{never:,}; the others on {percent:.2g} % of tokens (median)"))
        rows += [("format", self.format), ("where", self.where)]
        return [(name, str(value)) for name, value in rows if value]

    def as_dict(self) -> dict[str, Any]:
        """All that is known, as JSON has it."""
        never = self.log10_densities
        return {
            "where": self.where, "format": self.format, "kind": self.kind, "d_in": self.d_in, "d_out": self.d_out,
            "d_sae": self.d_sae, "dtype": self.dtype, "shapes": {k: list(v) for k, v in self.shapes.items()},
            "activation": self.activation, "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "published": asdict(self.published) if self.published is not None else None, "results": self.results,
            "never_fired": int((never <= _NEVER).sum()) if never is not None else None, "metadata": self.metadata,
        }  # fmt: skip

    def __rich__(self) -> RenderableType:
        return as_table(self.rows())


def as_table(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and values, for a terminal."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def sae_info(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    **hints: Any,
) -> SAEInfo:
    """What a published or saved SAE is, without reading or downloading its weights.

    Args:
        source: As for `SAE.from_pretrained`.
        id: Likewise.
        revision: Likewise.
        local_files_only: Likewise.
        token: Likewise.
        **hints: Likewise.

    Raises:
        UnweaveError: As `SAE.from_pretrained`; damage is only found in what is read.
    """
    place = find(source, id, revision=revision, local_files_only=local_files_only, token=token)
    if place.repo is None:
        described = describe_sae(place.target, **hints)
        path = Path(place.target)
        return SAEInfo(str(path), **described, log10_densities=_densities(path, described), results=_results(path))
    beside = [join(place.target, SPARSITY)] if join(place.target, CONFIG) in place.files else []
    with _sketched(replace(place, optional=[*place.optional, *beside])) as path:
        described = describe_sae(path, **(place.hints(path) | hints))
        densities = _densities(path, described)
    if place.release is not None:
        described["metadata"].setdefault("model_name", place.release.model)
    return SAEInfo(f"{place.repo}, {place.target}", **described, published=place.published, log10_densities=densities)


def _results(folder: Path) -> list[dict[str, Any]]:
    """What was measured of an SAE; of a run with one SAE the report lies above it."""
    beside = [folder / EVALUATION, *([folder.parent / EVALUATION] if folder.name == "sae" else [])]
    found = next((read_json(file) for file in beside if file.is_file()), {})
    return results_of(found) if "eval_result_unstructured" in found else []  # others write files of this name too


def _densities(path: Path, described: dict[str, Any]) -> Float[Tensor, " d_sae"] | None:
    """What is beside an SAE's files about its latents, if anything."""
    file = (path if path.is_dir() else path.parent) / SPARSITY
    if not file.is_file():
        return None
    found = map_tensors(file).get("sparsity")
    if found is None or found.shape != (described["d_sae"],):
        shape = "no tensor 'sparsity'" if found is None else f"'sparsity' of the shape {tuple(found.shape)}"
        raise UnweaveError(f"{str(file)!r} has {shape}, and the SAE beside it has d_sae={described['d_sae']}.")
    return found.float().clone()


@contextmanager
def _sketched(place: Place) -> Iterator[Path]:
    """The path that a reader is given, of files whose matrices are missing unless they are in the cache."""
    repo = place.repo
    assert repo is not None
    if repo.local_files_only:
        yield fetch(repo, place.files, place.optional) / place.target
        return
    large = [name for name in place.files if not name.endswith((".json", ".yaml", ".yml"))]
    small = [name for name in place.files if name not in large]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        cached = fetch(repo, small, place.optional)
        for name in (*small, *place.optional):
            if cached.name and (cached / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cached / name, folder / name)
        repo = replace(repo, commit=cached.name or repo.commit)  # what follows is of the same one
        for name in large:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with RemoteFile(repo, name) as remote:
                sketch(remote, folder / name)
        yield folder / place.target
