"""Training from a cache: no pass of the model, resumed to the bit, refused where it does not fit.

pitfall_208, pitfall_240, pitfall_242.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unweave import SAE, DataConfig, MaskConfig, SAEConfig, StoreBatches, TrainConfig, UnweaveError, cache, evaluate
from unweave.activations.cache.foreign import MappedStore
from unweave.models import LoadedModel
from unweave.sae import BatchTopK, TopK
from unweave.training import train, train_on
from unweave.training.train import prepare

TOPK = SAEConfig(d_sae=32, activation=TopK(k=4), lr=3e-3)
CONFIG = DataConfig(context=16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny_model, texts):
    return cache(
        texts, tmp_path_factory.mktemp("stored") / "cache", model=tiny_model, hooks=["resid_post.*", "mlp_out.0"],
        tokens=3000, held_out_tokens=300, config=CONFIG, dtype="float32", shard_bytes=200_000,
    )  # fmt: skip


@pytest.fixture
def config(stored, tmp_path):
    return TrainConfig(
        data=str(stored.path), hooks=("resid_post.0",), saes=(TOPK,), tokens=4000, batch_size=128, buffer=512,
        out=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.fixture
def no_pass(monkeypatch, tiny_model):
    """The model must not be run."""

    def ran(*arguments, **settings):
        raise AssertionError("the model was run")

    monkeypatch.setattr(tiny_model.module, "forward", ran)


@pytest.mark.usefixtures("no_pass")
def test_training_from_a_cache_runs_no_model_and_writes_everything(config, stored, tiny_model, capsys):
    result = train(config, model=tiny_model)
    printed = capsys.readouterr().err
    assert "times the" in printed
    assert "from a cache" in printed or "of a cache" in printed
    sae = SAE.load(result.folders[0])
    metadata = sae.metadata
    assert metadata["model_name"] == "tiny"
    assert metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert metadata["hf_hook_name"] == "transformer.h.0"
    assert metadata["context_size"] == 16
    assert metadata["dataset_path"] == str(stored.path)
    assert metadata["text"]["context"] == 16
    assert metadata["training_epochs"] == 2
    assert metadata["cache"]["hash"] == stored.hash
    assert result.history[-1]["explained_variance"] > result.history[0]["explained_variance"]
    assert result.history[-1]["tokens"] == 4000


def test_what_is_trained_on_is_what_a_live_stream_gives(config, stored, tiny_model, texts):
    """With everything in the ring, both are shuffles of the same activations."""
    live = replace(config, data="stdlib", text=CONFIG, prompts_per_pass=32, model_precision="fp32", buffer=2600)
    with prepare(live, tiny_model, texts).batches() as batches:
        seen = batches.peek(2600)["transformer.h.0"]
    with prepare(replace(config, buffer=4000), tiny_model).batches() as batches:
        read = batches.peek(2600)["transformer.h.0"]
        n_rows = batches.selected.n_rows
    assert n_rows < 3000  # special tokens are masked
    torch.testing.assert_close(read.mean(0), seen.mean(0), atol=0.1, rtol=0.1)
    distance = torch.cdist(read[:50], seen).amin(1)
    assert (distance < 1e-3).float().mean() > 0.7


@pytest.mark.usefixtures("no_pass")
def test_a_run_that_is_interrupted_ends_bit_equal(config, tiny_model, tmp_path, interrupted):
    whole = train(replace(config, out=str(tmp_path / "whole")), model=tiny_model, progress=False)
    with interrupted(11, "saved"):
        train(config, model=tiny_model, progress=False)
    checkpoint = next((Path(config.out) / "checkpoints").glob("step-*"))
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 60_000  # row numbers, no activations
    resumed = train(config, model=tiny_model, resume=True, progress=False)
    for name, value in whole.saes[0].state_dict().items():
        assert torch.equal(resumed.saes[0].state_dict()[name], value)


@pytest.mark.usefixtures("no_pass")
def test_several_hooks_targets_and_crosscoders(config, tiny_model):
    result = train(replace(config, hooks=("resid_post.*",), out=None), model=tiny_model, progress=False)
    assert [sae.metadata["hf_hook_name"] for sae in result.saes] == ["transformer.h.0", "transformer.h.1"]
    transcoder = replace(config, targets=("mlp_out.0",), saes=(replace(TOPK, coder="transcoder"),), out=None)
    (trained,) = train(transcoder, model=tiny_model, progress=False).saes
    assert trained.metadata["hf_hook_name_out"] == "transformer.h.0.mlp"
    crosscoder = replace(config, hooks=("resid_post.*",), saes=(replace(TOPK, coder="crosscoder"),), out=None)
    (trained,) = train(crosscoder, model=tiny_model, progress=False).saes
    assert trained.metadata["hf_hook_names"] == ["transformer.h.0", "transformer.h.1"]


@pytest.mark.usefixtures("no_pass")
def test_thresholds_are_calibrated_on_held_out_rows(config, stored, tiny_model):
    sae = SAEConfig(d_sae=32, activation=BatchTopK(k=4))
    (trained,) = train(replace(config, saes=(sae,), out=None), model=tiny_model, progress=False).saes
    ids = stored.held_out.records["token_ids"][:]
    assert trained.metadata["threshold_calibration_tokens"] == int((ids > 1).sum())  # 0 and 1 are special
    with prepare(config, tiny_model).batches() as batches:
        x = batches.peek(500)["transformer.h.0"]
    assert 2 < float((trained.encode(x) != 0).sum(1).float().mean()) < 8


def test_evaluation_reads_the_held_out_rows_of_the_cache(config, stored, tiny_model):
    (sae,) = train(replace(config, out=None), model=tiny_model, progress=False).saes
    report = evaluate(sae, model=tiny_model, data=stored.path, tokens=200)
    assert report.provenance["data"]["split"] == "held-out"
    assert report["explained_variance"] is not None


def test_what_does_not_fit_is_refused(config, stored, tiny_model):
    module = tiny_model.module
    torch.manual_seed(7)
    other = type(module)(module.config).eval()
    for settings, model, message in (
        ({"hooks": ("resid_post.7",)}, tiny_model, r"no hook 'resid_post\.7'; it has transformer\.h\.0"),
        ({"hooks": ("attn_out.0",)}, tiny_model, "no hook 'attn_out.0'"),
        ({}, LoadedModel(other, tiny_model.tokenizer, "other"), "activations of the model 'tiny', and 'other' has"),
        ({"text": DataConfig(context=32)}, tiny_model, "context=32 was asked for, and .* was made with 16"),
        ({"text": DataConfig(bos=False)}, tiny_model, "bos=False was asked for"),
        ({"masks": MaskConfig(positions="16:")}, tiny_model, "keeps nothing"),
    ):
        with pytest.raises(UnweaveError, match=message):
            prepare(replace(config, **settings), model).plan()
    assert not Path(config.out).exists()


def test_a_model_that_is_not_here_is_not_needed(config, capsys):
    result = train(replace(config, hooks=("blocks.1.hook_resid_post",)), progress=False)
    assert result.saes[0].metadata["hf_hook_name"] == "transformer.h.1"
    assert result.model is None
    assert "the model of the cache is not here" in capsys.readouterr().err


def test_another_model_that_is_named_is_refused_before_training(config):
    with pytest.raises(UnweaveError, match="'demo' has other parameters"):
        prepare(config, "demo")
    with pytest.raises(UnweaveError, match="has other parameters"):
        train(replace(config, model="demo-vit"), progress=False)
    assert not Path(config.out).exists()


def test_positions_of_the_cache_are_those_of_the_saes(tmp_path, tiny_model, texts):
    kept = {"positions": "2:9", "config": CONFIG}
    made = cache(texts, tmp_path / "c", model=tiny_model, hooks="resid_post.0", tokens=500, **kept)
    masks = MaskConfig(positions="::2")
    config = TrainConfig(hooks=("resid_post.0",), saes=(TOPK,), tokens=500, batch_size=64, masks=masks)
    (sae,) = train(config, model=tiny_model, data=made, progress=False).saes
    assert sae.metadata["masks"]["positions"] == [2, 4, 6, 8]
    (sae,) = train(replace(config, masks=MaskConfig()), model=tiny_model, data=made, progress=False).saes
    assert sae.metadata["masks"]["positions"] == "2:9"


def test_any_store_can_be_trained_on(stored):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    store = MappedStore("mine", {"here": [x]}, {}, {"name": "mine"})
    masks = MaskConfig(norm_multiple=None)
    config = TrainConfig(hooks=("here",), saes=(TOPK,), tokens=3000, batch_size=100, masks=masks)
    result = train(config, data=store, progress=False)
    assert result.saes[0].metadata["hf_hook_name"] == "here"
    with pytest.raises(UnweaveError, match="holds no activations at 'there'"):
        train(replace(config, hooks=("there",)), data=store, progress=False)
    (sae,) = train_on(StoreBatches(store, 100, 500, epochs=2), [TOPK], tokens=4000, progress=False)
    assert sae.d_in == 8
    read = StoreBatches(stored.train, 100, 500, hooks=["transformer.h.0"])
    (sae,) = train_on(read, [TOPK], tokens=2900, progress=False, hooks=["transformer.h.0"])
    assert sae.metadata["hf_hook_name"] == "transformer.h.0"


def test_special_tokens_that_a_store_does_not_know_are_trained_on_and_that_is_said(capsys):
    """SAELens' caches do not say which tokens are special: the SAE must not claim that they were left out."""
    x, ids = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)), np.arange(600, dtype=np.int32) % 10
    config = TrainConfig(hooks=("here",), saes=(TOPK,), tokens=600, batch_size=100)
    text = MappedStore("mine", {"here": [x]}, {"token_ids": ids}, {"name": "mine"})
    (sae,) = train(config, data=text).saes
    assert "mine does not say which tokens are special" in capsys.readouterr().err
    assert sae.metadata["exclude_special_tokens"] is False
    assert sae.metadata["masks"]["special_tokens"] is False
    known = MappedStore("mine", {"here": [x]}, {"token_ids": ids}, {"name": "mine"}, {3: "<s>"})
    session = prepare(config, data=known)
    assert session.metadata(session.sites[0][0])["exclude_special_tokens"] is True
    with session.batches() as batches:
        assert batches.selected.n_rows == 540
    images = MappedStore("mine", {"here": [x]}, {"kinds": np.zeros(600, dtype=np.uint8)}, {"name": "mine"})
    capsys.readouterr()
    prepare(config, data=images)
    assert capsys.readouterr().err == ""
