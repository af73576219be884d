"""Activations on disk: written once, read in any order."""

from unweave.activations.cache.batches import StoreBatches
from unweave.activations.cache.folder import Cache
from unweave.activations.cache.open import is_cache, open_cache
from unweave.activations.cache.ordered import OrderedBatches
from unweave.activations.cache.quality import ShuffleQuality, shuffle_quality
from unweave.activations.cache.saelens import SaelensCache
from unweave.activations.cache.saev import SaevShards
from unweave.activations.cache.saev_write import write_saev_shards
from unweave.activations.cache.selection import Selected, Selection, select
from unweave.activations.cache.side import CacheSide
from unweave.activations.cache.store import Column, Joined, Store
from unweave.activations.cache.write import cache

__all__ = [
    "Cache", "CacheSide", "Column", "Joined", "OrderedBatches", "SaelensCache", "SaevShards", "Selected", "Selection",
    "ShuffleQuality", "Store", "StoreBatches", "cache", "is_cache", "open_cache", "select", "shuffle_quality",
    "write_saev_shards",
]  # fmt: skip
