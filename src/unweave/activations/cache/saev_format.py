"""saev's shards as files: what `metadata.json` and `shards.json` say, where an activation lies, and what must be there.

Example `e`, slot `s` and token `t` of a file lie at `((e * n_layers + s) * T + t) * d` numbers of little-endian
float32, where `T` counts the patches and the CLS token in front of them, if there is one. Every file has room for
`max_tokens_per_shard // (T * n_layers)` examples, the last one too, which zeros fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError
from unweave.activations.cache.foreign import counted, read_json

METADATA, SHARDS, LABELS = "metadata.json", "shards.json", "labels.bin"
FLOAT_BYTES = 4

# Names of protocol 2, and what protocol 1 called the same.
OLD_NAMES = {
    "family": ("vit_family",),
    "ckpt": ("vit_ckpt",),
    "content_tokens_per_example": ("n_patches_per_img",),
    "d_model": ("d_vit",),
    "n_examples": ("n_imgs",),
    "max_tokens_per_shard": ("n_patches_per_shard", "max_patches_per_shard"),
}


@dataclass(frozen=True)
class SaevMetadata:
    """What is needed of `metadata.json`. Its `data`, which holds a pickle, is never looked at."""

    family: str
    ckpt: str
    layers: tuple[int, ...]
    content_tokens_per_example: int
    """Patches of an image."""
    cls_token: bool
    """Whether a CLS token stands in front of them."""
    d_model: int
    n_examples: int
    max_tokens_per_shard: int

    @property
    def tokens(self) -> int:
        """Tokens of an example."""
        return self.content_tokens_per_example + self.cls_token

    @property
    def examples_per_shard(self) -> int:
        return self.max_tokens_per_shard // (self.tokens * len(self.layers))

    @property
    def shard_shape(self) -> tuple[int, int, int, int]:
        """Examples, layers, tokens and width of each file."""
        return self.examples_per_shard, len(self.layers), self.tokens, self.d_model

    @property
    def shard_bytes(self) -> int:
        """Size of each file."""
        examples, layers, tokens, d = self.shard_shape
        return examples * layers * tokens * d * FLOAT_BYTES

    def counts(self) -> list[int]:
        """Examples in each file that holds any."""
        full, rest = divmod(self.n_examples, self.examples_per_shard)
        return [self.examples_per_shard] * full + [rest] * (rest > 0)


def shard_name(number: int) -> str:
    return f"acts{number:06d}.bin"


def is_saev(folder: Path) -> bool:
    """Whether a folder says that it holds saev's shards."""
    if not (folder / METADATA).is_file():
        return False
    try:
        raw = read_json(folder / METADATA)
    except UnweaveError:
        return (folder / shard_name(0)).exists()
    return isinstance(raw, dict) and "layers" in raw and _find(raw, "max_tokens_per_shard") is not None


def read_metadata(folder: Path) -> SaevMetadata:
    """What `metadata.json` says, under the names of protocol 2 whichever it follows.

    Raises:
        UnweaveError: It is missing, damaged, or describes what this reader doesn't know.
    """
    path = folder / METADATA
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UnweaveError(f"{path} is not the metadata of saev's shards: it is no JSON object.")
    protocol, dtype = str(raw.get("protocol", "1")), raw.get("dtype", "float32")
    if protocol.split(".")[0] not in ("1", "2"):
        raise UnweaveError(f"{path} follows protocol {protocol!r}; 1 and 2 are known.")
    if dtype != "float32":
        raise UnweaveError(f"{path} says dtype={dtype!r}; saev's shards are float32.")
    names = [*SaevMetadata.__dataclass_fields__]
    found = {name: _find(raw, name) for name in names}
    if missing := [name for name in names if found[name] is None]:
        raise UnweaveError(f"{path} is not the metadata of saev's shards: it lacks {', '.join(missing)}.")
    layers, cls = found["layers"], found["cls_token"]
    sizes = ("content_tokens_per_example", "d_model", "n_examples", "max_tokens_per_shard")
    counted(path, {name: found[name] for name in sizes})
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise UnweaveError(f"{path} says layers={layers!r}, which is no list of whole numbers.")
    if len(set(layers)) < len(layers):
        raise UnweaveError(f"{path} lists a layer twice: {layers}.")
    if not isinstance(cls, bool):
        raise UnweaveError(f"{path} says cls_token={cls!r}, which is neither true nor false.")
    metadata = SaevMetadata(**found | {"layers": tuple(layers)})
    if not metadata.examples_per_shard:
        raise UnweaveError(
            f"{path} says max_tokens_per_shard={metadata.max_tokens_per_shard}, and one example at {len(layers)} "
            f"layers has {len(layers) * metadata.tokens}."
        )
    return metadata


def _find(raw: Mapping[str, Any], name: str) -> Any:
    return next((raw[n] for n in (name, *OLD_NAMES.get(name, ())) if n in raw), None)


def listed_shards(folder: Path, metadata: SaevMetadata, *, allow_fewer: bool) -> list[tuple[str, int]]:
    """Name and number of examples of each file that holds any.

    Args:
        folder: Where they are.
        metadata: What the folder's `metadata.json` says.
        allow_fewer: Take a `shards.json` that lists fewer examples than the metadata at its word.

    Raises:
        UnweaveError: A list that does not fit the metadata.
    """
    expected, path = metadata.counts(), folder / SHARDS
    if not path.is_file():  # protocol 1 began without it
        return [(shard_name(i), n) for i, n in enumerate(expected)]
    raw = read_json(path)
    shards: list[tuple[str, int]] = []
    for entry in raw if isinstance(raw, list) else [raw]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UnweaveError(f"{path} does not list file names and numbers of examples: {str(entry)[:80]}.")
        n = _find(entry, "n_examples")
        counted(path, {f"n_examples of {name}": n}, least=0)
        shards.append((name, n))
    names, counts = [name for name, _ in shards], [n for _, n in shards if n]
    if len(set(names)) < len(names):
        raise UnweaveError(f"{path} lists a file twice.")
    if allow_fewer and max(counts, default=0) <= metadata.examples_per_shard:
        return [(name, n) for name, n in shards if n]
    if sum(counts) != metadata.n_examples:
        raise UnweaveError(
            f"{path} lists {sum(counts):,} of the {metadata.n_examples:,} examples of {METADATA}: the recording was "
            "interrupted, or left some out. Pass allow_fewer=True to read those that it lists."
        )
    if counts != expected:
        raise UnweaveError(
            f"{path} lists {counts} examples, and shards of {metadata.examples_per_shard} hold {expected}."
        )
    return [(name, n) for name, n in shards if n]


def problems(folder: Path, metadata: SaevMetadata, shards: list[tuple[str, int]]) -> list[str]:
    """What is wrong with the files, as far as it can be seen without reading them."""
    sizes = {name: metadata.shard_bytes for name, _ in shards}
    if (folder / LABELS).exists():
        examples = sum(n for _, n in shards)
        sizes[LABELS] = examples * metadata.content_tokens_per_example
    found = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (there := path.stat().st_size) != size:
            found.append(f"{name} has {there:,} bytes, not {size:,}")
    return found


def in_forward_order(layers: tuple[int, ...]) -> bool | None:
    """Whether layers are listed as a model runs through them; None if that depends on how many it has."""
    if len(layers) > 1 and min(layers) < 0 <= max(layers):
        return None
    return list(layers) == sorted(layers)
