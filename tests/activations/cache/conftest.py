"""A store in memory, and caches of a model whose activations tell which token they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave.activations import DataConfig
from unweave.activations.cache import Cache, Store, cache
from unweave.activations.cache.foreign import MappedStore
from unweave.models import LoadedModel

LETTERS = [chr(97 + i % 26) * (3 + i % 7) for i in range(400)]
"""Documents of 3 to 9 tokens each."""


@pytest.fixture
def store() -> Callable[..., Store]:
    def make(n: int, d: int = 3, parts: int = 3, row: int = 8, per_document: int = 20) -> Store:
        """Row `i` is `(i, i, ...)` at hook a, and `-i` at hook b."""
        rows = torch.arange(n)
        x = rows.float()[:, None].expand(n, d).contiguous()
        cuts = [n // parts] * (parts - 1) + [n - n // parts * (parts - 1)]
        numbers = rows.numpy()
        records = {
            "documents": numbers // per_document,
            "positions": (numbers % row).astype(np.int32),
            "token_ids": (numbers % 11).astype(np.int32),
            "labels": (numbers % 5).astype(np.uint16),
        }
        parts_of = {"a": x.split(cuts), "b": (-x).split(cuts)}
        return MappedStore("the store", parts_of, records, {"n": n}, special_ids={0: "<s>"})

    return make


@pytest.fixture
def letters() -> list[str]:
    return LETTERS


@pytest.fixture
def make_cache(tmp_path: Path, model: LoadedModel) -> Callable[..., Any]:
    """A cache of the speller's two hooks."""

    def make(out: str = "cache", tokens: int = 300, **settings: Any) -> Cache | None:
        settings = {"hooks": ["h.0", "h.1"], "config": DataConfig(context=8), "model": model, "dtype": "float32",
                    "shard_bytes": 4000, "prompts_per_pass": 3} | settings  # fmt: skip
        return cache(settings.pop("data", LETTERS), tmp_path / out, tokens=tokens, **settings)

    return make
