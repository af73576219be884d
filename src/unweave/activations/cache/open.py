"""Opening a cache, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from unweave._errors import UnweaveError
from unweave.activations.cache import folder as ours
from unweave.activations.cache.folder import Cache
from unweave.activations.cache.saelens import SaelensCache, is_saelens
from unweave.activations.cache.saev import SaevShards
from unweave.activations.cache.saev_format import is_saev
from unweave.activations.cache.store import Store


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a cache, finished or not: of ours, of SAELens, or saev's shards."""
    path = Path(path).expanduser()
    return ours.is_cache(path) or is_saev(path) or is_saelens(path)


def open_cache(folder: str | Path, *, verify: bool = False) -> Cache | Store:
    """Open a finished cache, and check that every file is there in its full size, of the right type and shape.

    Args:
        folder: The folder that `unweave.cache` or `unweave cache` wrote, SAELens' cached activations, or saev's shards.
        verify: Also compare the checksums, which reads every file. Only caches of ours have any.

    Returns:
        A `Cache`, whose `train` and `held_out` are stores; of others' caches a `Store`: see `SaelensCache` and
        `SaevShards`.

    Raises:
        UnweaveError: It is none, it is unfinished, or files are missing or damaged; all of those are named.
    """
    path = Path(folder).expanduser()
    if ours.is_cache(path):
        return ours.open_cache(path, verify=verify)
    for known, reader in ((is_saev, SaevShards), (is_saelens, SaelensCache)):
        if known(path):
            if verify:
                raise UnweaveError(f"{path} cannot be verified: only caches of unweave have checksums.")
            store: Store = reader(path)
            return store
    return ours.open_cache(path)  # which says what is missing
