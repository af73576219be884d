"""We read the activations that sae-lens caches, as its own store reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave.activations.cache.saelens import SaelensCache

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D, CONTEXT, HOOK = 16, 12, "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=1, d_model=D, n_ctx=CONTEXT, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", device="cpu"
    )
    return HookedTransformer(config)


@pytest.mark.parametrize(("dtype", "seqpos"), [("float32", (None,)), ("float16", (2, 11, 3))])
def test_we_read_what_sae_lens_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, dtype: str, seqpos: tuple[int | None, ...]
) -> None:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, cache_activations_runner
    from sae_lens.config import CacheActivationsRunnerConfig

    tokens = torch.randint(50, (40, CONTEXT))
    context = len(range(CONTEXT)[slice(*seqpos)])
    config = CacheActivationsRunnerConfig(
        dataset_path="none", model_name="tiny", model_batch_size=4, hook_name=HOOK, d_in=D, context_size=CONTEXT,
        training_tokens=24 * context, new_cached_activations_path=str(tmp_path / "cache"), dtype=dtype,
        buffer_size_gb=8 * context * D * torch.finfo(getattr(torch, dtype)).bits / 8e9, prepend_bos=False,
        seqpos_slice=seqpos, streaming=False, device="cpu", shuffle=True,
    )  # fmt: skip
    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **_: model)
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}))
    runner.run()
    assert len(list((tmp_path / "cache").glob("data-*.arrow"))) == 3  # beside the order of the shuffled copy

    store = SaelensCache(tmp_path / "cache")
    assert (store.hooks, store.widths, store.context) == ((HOOK,), {HOOK: D}, context)
    assert store.dtypes[HOOK] == getattr(torch, dtype)
    assert store.n_rows == 24 * context
    saved = Dataset.load_from_disk(str(tmp_path / "cache")).with_format("numpy")
    ids = store.records["token_ids"][:].reshape(24, context)
    assert np.array_equal(ids, saved["token_ids"])
    found = store.read(0, store.n_rows)[HOOK].view(24, context, D)
    assert np.array_equal(found.numpy(), np.asarray(saved[HOOK]))
    assert np.array_equal(ids, tokens[:24].numpy()[:, slice(*seqpos)])  # in the order of generation
    with torch.no_grad():
        expected = model.run_with_cache(tokens[:24])[1][HOOK][:, slice(*seqpos)]
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
