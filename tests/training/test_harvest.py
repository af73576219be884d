"""How the model of a run is run: its type, the rows of a pass, and the background."""

import json

import pytest
import torch

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.activations import Background, DataConfig
from unweave.activations.precision import model_dtype
from unweave.models import dtype_of
from unweave.sae import TopK
from unweave.training import SAEConfig, TrainConfig, train
from unweave.training.config import from_dict, to_dict
from unweave.training.harvest import runs_ahead
from unweave.training.train import prepare


@pytest.fixture
def settings(texts, tmp_path):
    def make(**changes):
        usual = {
            "model": "tiny", "hooks": ("resid_post.0", "mlp_out.1"), "saes": (SAEConfig(24, TopK(4)),), "tokens": 3000,
            "batch_size": 128, "buffer": 512, "text": DataConfig(context=16, held_out=0.0),
        }  # fmt: skip
        return TrainConfig(**usual | changes)

    return make


def assert_equal(one, other):
    for a, b in zip(one.saes, other.saes, strict=True):
        assert all(torch.equal(a.state_dict()[name], x) for name, x in b.state_dict().items())


def test_in_bf16_the_ring_holds_bf16_and_the_model_stays_in_fp32(settings, tiny_model, texts):
    """pitfall_164"""
    config = settings(model_precision="bf16")
    session = prepare(config, tiny_model, texts)
    plan = session.plan()
    assert plan.precision == "bfloat16"
    assert plan.buffer("ring") == 2 * 512 * 16 * 2
    assert plan.buffer("its copy") > 0
    low = train(config, model=tiny_model, data=texts, progress=False)
    assert low.model is tiny_model
    assert {p.dtype for p in tiny_model.module.parameters()} == {torch.float32}
    assert low.saes[0].metadata["model_precision"] == "bfloat16"
    plain = train(settings(model_precision="fp32"), model=tiny_model, data=texts, progress=False)
    assert plain.saes[0].metadata["model_precision"] == "float32"
    assert low.saes[0].W_dec.dtype == torch.float32
    distance = (low.saes[0].W_dec - plain.saes[0].W_dec).norm() / plain.saes[0].W_dec.norm()
    assert 0 < distance < 0.5


def test_auto_is_bf16_where_the_hardware_and_the_model_gain(settings, tiny_model, monkeypatch):
    from transformers import GPT2Config, GPT2Model

    from unweave.models import LoadedModel

    shape = {"vocab_size": 300, "n_positions": 300, "n_embd": 256, "n_layer": 1, "n_head": 2}
    large = LoadedModel(GPT2Model(GPT2Config(**shape)), None, "large")
    for fast, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(kernels, "low", lambda precision, device, fast=fast: fast)
        assert model_dtype("auto", large) == expected
        assert model_dtype("auto", tiny_model) is None
    assert model_dtype("fp32", large) is None
    low = LoadedModel(large.module.to(torch.float16), None, "half")
    assert model_dtype("auto", low) is None
    assert model_dtype("fp32", low) == torch.float32


def test_the_background_changes_nothing(settings, tiny_model, texts):
    results = [
        train(settings(background=b), model=tiny_model, data=texts, progress=False) for b in (False, True, "auto")
    ]
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_on_a_cpu_auto_is_without_a_thread(settings, tiny_model, texts):
    session = prepare(settings(), tiny_model, texts)
    assert not runs_ahead(session.config, session.stream)
    assert runs_ahead(settings(background=True), session.stream)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_pitfall_179_a_run_ahead_in_bf16_is_resumed_bit_equal(
    settings, tiny_model, texts, tmp_path, monkeypatch, interrupted, before, after
):
    """With passes in flight, and with as many rows in a pass as were chosen before."""
    common = {"model_precision": "bf16", "tokens": 4000}
    whole = train(settings(**common), model=tiny_model, data=texts, progress=False)
    out = tmp_path / "run"
    with interrupted(21):
        train(settings(**common, out=str(out), background=before), model=tiny_model, data=texts, progress=False)
    (state,) = (out / "checkpoints").glob("*/state.json")
    stream = json.loads(state.read_text())["stream"]["stream"]
    assert stream["dtype"] == "bfloat16"
    assert stream["prompts_per_pass"] == 4096 // 16
    path = out / "config.json"  # whether there is a thread is no part of what is trained
    path.write_text(json.dumps(json.loads(path.read_text()) | {"background": after}))
    monkeypatch.setattr("unweave.activations.live._CPU_TOKENS", 64)
    resumed = train(
        settings(**common, out=str(out), background=after), model=tiny_model, data=texts, resume=True, progress=False
    )
    assert_equal(whole, resumed)


def test_an_error_in_the_thread_ends_the_run(settings, tiny_model, texts, monkeypatch):
    closed = []
    close = Background.close
    monkeypatch.setattr(Background, "close", lambda self: (closed.append(self), close(self)))
    ids = torch.full((40, 16), 7).numpy()
    ids[30, 3] = 9999
    config = settings(background=True, prompts_per_pass=4, buffer=128)
    with pytest.raises(UnweaveError, match="token id 9999"):
        train(config, model=tiny_model, data=ids, progress=False)
    assert len(closed) == 1


def test_settings_are_checked_and_survive_json(settings):
    for name, value in (("background", "never"), ("model_precision", "fp8")):
        with pytest.raises(UnweaveError, match=f"{name} is one of"):
            settings(**{name: value})
    config = settings(background=True, model_precision="bf16", prompts_per_pass=None, model_device="cpu", device="cpu")
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_device_that_is_not_there(settings, tiny_model, texts):
    with pytest.raises(UnweaveError, match="the device 'cuda:7' cannot be used"):
        prepare(settings(device="cuda:7", model_device="cpu"), tiny_model, texts)


def test_the_activations_go_where_the_saes_are(settings, tiny_model, texts):
    session = prepare(settings(device="meta", model_device="cpu"), tiny_model, texts)
    assert session.stream.device.type == "meta"
    assert {x.device.type for x in next(session.stream).values()} == {"meta"}
    assert dtype_of(session.stream.model.module) == torch.float32
