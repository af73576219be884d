"""Whole runs on a tiny model: files, resuming, interruption, refusals."""

import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import unweave.training.trainer as trainer
from unweave._errors import UnweaveError
from unweave.activations import DataConfig
from unweave.objectives import Matryoshka, PreActivation
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, TrainConfig, train
from unweave.training.run_folder import read_run_config
from unweave.training.train import prepare

SAES = (
    SAEConfig(d_sae=32, activation=BatchTopK(4), dead_after=500),
    SAEConfig(d_sae=32, activation=JumpReLU()),
    SAEConfig(d_sae=24, activation=ReLU()),
    SAEConfig(d_sae=32, activation=TopK(4)),
    SAEConfig(d_sae=24, activation=Gated(), pre_act=PreActivation(), matryoshka=Matryoshka(), dead_after=500),
)


@pytest.fixture
def config(tmp_path, texts):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return TrainConfig(
        model="tiny",
        data=str(tmp_path / "text"),
        hooks=("resid_post.0", "mlp_out.1"),
        saes=SAES,
        tokens=3000,
        batch_size=128,
        buffer=1024,
        out=str(tmp_path / "run"),
        text=DataConfig(context=16, held_out=0.2),
    )


def config_path(config):
    return Path(config.out)


def weights(result):
    return [sae.state_dict() for sae in result.saes]


def assert_equal(a, b):
    for one, other in zip(weights(a), weights(b), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_a_run_and_its_files(config, tiny_model):
    """pitfall_169, 190, 276: no logger and no network; the run's config and each SAE's are files of their own."""
    result = train(config, model=tiny_model, progress=False)
    out = config_path(config)
    hooks = ["transformer.h.0"] * len(SAES) + ["transformer.h.1.mlp"] * len(SAES)
    assert [sae.metadata["hf_hook_name"] for sae in result.saes] == hooks
    assert result.saes[0].metadata["hook_name"] == "blocks.0.hook_resid_post"
    for sae, folder in zip(result.saes, result.folders, strict=True):
        loaded, x = SAE.load(folder), torch.randn(20, 16)
        torch.testing.assert_close(loaded(x), sae(x))
        assert type(SAE.load(folder / "training").activation) is type(sae.activation)
        file = json.loads((folder / "cfg.json").read_text())
        assert (file["d_in"], file["normalize_activations"]) == (16, "none")
        assert not {"saes", "tokens", "batch_size"} & file.keys()
        said = loaded.metadata
        assert (said["model_name"], said["context_size"], said["training_tokens"]) == ("tiny", 16, 3000)
        assert {"hf_hook_name", "dataset_path", "masks", "text", "tokenizer_fingerprint", "training"} <= said.keys()
    rows = [json.loads(line) for line in (config_path(config) / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert rows[-1]["tokens"] == 3000  # pitfall_160: the budget is met exactly
    assert read_run_config(config_path(config)) == config
    assert not (out / "checkpoints").exists()


def test_one_sae_lies_in_sae(config, tiny_model):
    """pitfall_196: folders are those that were asked for."""
    config = dataclasses.replace(config, hooks=("resid_post.0",), saes=SAES[:1], tokens=500)
    (folder,) = train(config, model=tiny_model, progress=False).folders
    assert folder == config_path(config) / "sae"


def test_two_runs_are_equal(config, tiny_model):
    runs = [
        train(dataclasses.replace(config, out=None, tokens=1500), model=tiny_model, progress=False) for _ in range(2)
    ]
    assert_equal(*runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_and_resumed_is_bit_equal(config, tiny_model, interrupted, number):
    """pitfall_109, 136, 178, 179, 183, 184: weights, moments, schedules, ring, counters and metrics, of every SAE."""
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)
    for steps in (7, 21):
        with interrupted(steps, number=number):
            train(config, model=tiny_model, resume=steps > 7, progress=False)
    resumed = train(config, model=tiny_model, resume=True, progress=False)
    assert_equal(whole, resumed)
    for row, other in zip(whole.history, resumed.history, strict=True):
        assert row | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}


def test_killed_between_checkpoints(config, tiny_model, monkeypatch):
    """pitfall_170, pitfall_181: a killed run goes on from its last checkpoint; later rows are dropped."""
    config = dataclasses.replace(config, checkpoint_every=640)
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)

    def die(*args, step=[0]):  # noqa: B006
        step[0] += 1
        if step[0] == 2 * 18:
            raise MemoryError

    monkeypatch.setattr(trainer, "_check_batch", die)
    with pytest.raises(MemoryError):
        train(config, model=tiny_model, progress=False)
    monkeypatch.undo()
    assert [p.name for p in (config_path(config) / "checkpoints").iterdir()] == ["step-000000015"]
    assert_equal(whole, train(config, model=tiny_model, resume=True, progress=False))


def test_a_truncated_checkpoint_is_refused(config, tiny_model, interrupted):
    with interrupted(7):
        train(config, model=tiny_model, progress=False)
    (state,) = (config_path(config) / "checkpoints").glob("*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UnweaveError, match="damaged"):
        train(config, model=tiny_model, resume=True, progress=False)


def test_folders_are_not_overwritten_by_accident(config, tiny_model):
    config = dataclasses.replace(config, tokens=500)
    train(config, model=tiny_model, progress=False)
    with pytest.raises(UnweaveError, match="--overwrite"):
        train(config, model=tiny_model, progress=False)
    train(config, model=tiny_model, overwrite=True, progress=False)


def test_overwriting_a_run_leaves_what_is_not_of_it(config, tiny_model):
    config = dataclasses.replace(config, tokens=500)
    train(config, model=tiny_model, progress=False)
    notes = config_path(config) / "notes.tex"
    notes.write_text("mine")
    train(config, model=tiny_model, overwrite=True, progress=False)
    assert notes.read_text() == "mine"
    inside = next((config_path(config) / "saes").glob("*/*")) / "notes.tex"
    notes.rename(inside)
    with pytest.raises(UnweaveError, match=r"notes\.tex' is not of the run that is to be replaced"):
        train(config, model=tiny_model, overwrite=True, progress=False)
    assert inside.read_text() == "mine"
    assert (inside.parent / "cfg.json").exists()


def test_resuming_another_run_is_refused(config, tiny_model, interrupted):
    with interrupted(7):
        train(config, model=tiny_model, progress=False)
    with pytest.raises(UnweaveError, match="seed"):
        train(dataclasses.replace(config, seed=1), model=tiny_model, resume=True, progress=False)


def test_a_finished_run_is_resumed_as_it_is(config, tiny_model, monkeypatch):
    result = train(config, model=tiny_model, progress=False)
    monkeypatch.setattr(trainer, "_check_batch", None)  # nothing is trained
    left = config_path(config) / ".eval.json.999999.tmp"
    left.write_text("{")
    again = train(config, model=tiny_model, resume=True, progress=False)
    assert not left.exists()
    assert again.folders == result.folders
    assert again.history == result.history
    x = torch.randn(20, 16)
    for sae, other in zip(result.saes, again.saes, strict=True):
        assert sae.metadata["hf_hook_name"] == other.metadata["hf_hook_name"]
        torch.testing.assert_close(sae(x), other(x))


def test_killed_before_the_first_checkpoint(config, tiny_model, monkeypatch, capsys):
    """pitfall_170, 182: whatever it left behind, the run starts at its beginning, as if it had not been begun."""
    config = dataclasses.replace(config, tokens=1500)
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)

    def die(*args, step=[0]):  # noqa: B006
        step[0] += 1
        if step[0] == 2 * 5:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_check_batch", die)
        with pytest.raises(MemoryError):
            train(config, model=tiny_model, progress=False)
    (config_path(config) / ".sae.999999.tmp").mkdir()
    with pytest.raises(UnweaveError, match="seed=0, so it cannot go on with 1"):
        train(dataclasses.replace(config, seed=1), model=tiny_model, resume=True, progress=False)
    assert_equal(whole, train(config, model=tiny_model, resume=True, progress=False))
    assert "holds no checkpoint yet, so the run starts at its beginning" in capsys.readouterr().err
    assert sorted(p.name for p in config_path(config).iterdir()) == ["config.json", "metrics.jsonl", "saes"]


def test_nothing_to_resume(config, tiny_model):
    config_path(config).mkdir()
    (config_path(config) / "thesis.tex").touch()
    with pytest.raises(UnweaveError, match="holds something else than a run"):
        train(config, model=tiny_model, resume=True, progress=False)
    with pytest.raises(UnweaveError, match="without an output folder"):
        train(dataclasses.replace(config, out=None), model=tiny_model, resume=True, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hooks": ("resid_post.7",)}, "resid_post.7"),
        ({"data": "no/such/file.txt"}, "no/such/file.txt"),
    ],
)
def test_bad_input_writes_nothing(config, tiny_model, change, message):
    with pytest.raises(UnweaveError, match=message):
        train(dataclasses.replace(config, **change), model=tiny_model, progress=False)
    assert not os.path.exists(config.out)


def test_a_full_disk_keeps_the_last_checkpoint(config, tiny_model, monkeypatch):
    """pitfall_186"""
    from unweave.training import checkpoint

    config = dataclasses.replace(config, checkpoint_every=1280)
    saves, save = [0], checkpoint.write_tensors

    def full(path, tensors):
        saves[0] += 1
        if saves[0] == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        train(config, model=tiny_model, progress=False)
    monkeypatch.undo()
    assert [p.name for p in (config_path(config) / "checkpoints").iterdir()] == ["step-000000010"]
    train(config, model=tiny_model, resume=True, progress=False)


def test_epochs_are_recorded(config, tiny_model):
    """pitfall_202: text that is read twice is not read twice in secret."""
    config = dataclasses.replace(config, hooks=("resid_post.0",), saes=SAES[3:4], out=None)
    long = train(dataclasses.replace(config, tokens=20_000), model=tiny_model, progress=False)
    assert long.saes[0].metadata["training_epochs"] > 2
    short = train(dataclasses.replace(config, tokens=500, buffer=256), model=tiny_model, progress=False)
    assert short.saes[0].metadata["training_epochs"] == 1


@pytest.mark.parametrize(("buffer", "planned"), [(16_384, True), (256, False)])
def test_that_text_begins_again_is_said_once(config, tiny_model, texts, capsys, buffer, planned):
    """By the plan if the ring takes all of the text before the first step, by the run where the text ends otherwise."""
    config = dataclasses.replace(
        config, tokens=20_000, hooks=("resid_post.0",), saes=SAES[3:4], out=None, buffer=buffer,
        text=dataclasses.replace(config.text, held_out=0),
    )  # fmt: skip
    session = prepare(config, tiny_model, texts)
    said = str(session.plan())
    assert ("begin again" in said) == planned
    result = train(config, model=tiny_model, data=texts)
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if "begin again" in line]
    once = 200 * 40  # words; the BOS token of each text is masked
    count, times = re.search(r"end after ([\d,]+) tokens and begin again: they are read ([\d.]+) times", line).groups()
    assert int(count.replace(",", "")) == pytest.approx(once, rel=0.01)
    assert float(times) == pytest.approx(20_000 / once, abs=0.1)
    assert result.saes[0].metadata["training_epochs"] == 3
    train(dataclasses.replace(config, tokens=4000), model=tiny_model, data=texts)
    assert "begin again" not in capsys.readouterr().err


def test_plan_matches_what_is_allocated(config, tiny_model):
    """pitfall_200, pitfall_309: the printed ring is the allocated one; the stream is not moved on by planning."""
    session = prepare(config, tiny_model)
    before = session.rows.state_dict()
    plan = session.plan()
    assert plan.buffer("ring") == 2 * 1024 * 16 * 4
    assert plan.steps == 24
    assert torch.equal(before["ids"], session.rows.state_dict()["ids"]) or before["ids"].numel() == 0
    assert "3,000 tokens in 24 steps" in str(plan)


def test_interrupted_while_saving(config, tiny_model, monkeypatch):
    """Whatever happens after the last step, the training is not lost, and a half-saved run is not called finished."""
    module = sys.modules[train.__module__]
    calls, save = [0], module.save_finished

    def once(*args):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return save(*args)

    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)
    monkeypatch.setattr(module, "save_finished", once)
    with pytest.raises(KeyboardInterrupt):
        train(config, model=tiny_model, progress=False)
    monkeypatch.undo()
    assert_equal(whole, train(config, model=tiny_model, resume=True, progress=False))


def test_a_model_that_is_elsewhere_is_refused(config, tiny_model):
    """pitfall_359: `model_device` is where a model is loaded, so one that is loaded must be there."""
    with pytest.raises(UnweaveError, match="model_device='meta', and the model that was given is on 'cpu'"):
        prepare(dataclasses.replace(config, model_device="meta"), tiny_model)
    prepare(dataclasses.replace(config, model_device="cpu"), tiny_model)


def test_all_saes_share_the_models_passes(config, tiny_model):
    """pitfall_307: five SAEs at two hooks take as many forward passes as one does."""
    passes = []
    for saes, hooks in ((SAES[:1], config.hooks[:1]), (SAES, config.hooks)):
        ran = []
        handle = tiny_model.module.transformer.h[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        out = f"{config.out}-{len(saes)}"
        settings = dataclasses.replace(config, saes=saes, hooks=hooks, out=out, tokens=2000, prompts_per_pass=8)
        train(dataclasses.replace(settings, background=False), model=tiny_model, progress=False)
        handle.remove()
        passes.append(len(ran))
    assert passes[0] == passes[1]


def test_text_without_held_out_documents_is_refused_before_training(config, tiny_model, texts):
    config = dataclasses.replace(config, data="in memory")
    with pytest.raises(UnweaveError, match="held_out=0"):
        train(config, model=tiny_model, data=[" ".join(texts)], progress=False)
    assert not os.path.exists(config.out)
    everything = dataclasses.replace(config, tokens=500, text=DataConfig(context=16, held_out=0), saes=SAES[:1])
    result = train(everything, model=tiny_model, data=[" ".join(texts)], progress=False)
    assert result.saes[0].metadata["dataset_path"] is None


def test_texts_in_memory(config, tiny_model, texts):
    config = dataclasses.replace(config, data="in memory", tokens=500, saes=SAES[3:])
    assert train(config, model=tiny_model, data=texts, progress=False).folders
