"""Fine-tuning of decoders: codes stay, what is to move moves, and the error falls."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig
from unweave.activations.cache.foreign import MappedStore
from unweave.objectives import EndToEnd
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, Start, TrainConfig, train
from unweave.training.config import METHODS
from unweave.training.finetune import finetune
from unweave.training.train import prepare

D, M = 12, 30


def data(n=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, D, generator=torch.Generator().manual_seed(9))
    on = torch.rand(n, 20, generator=generator) < 0.2
    return 7 * (torch.rand(n, 20, generator=generator) * on) @ directions + 3


def shrunk(activation=None, subtract=True):
    """An SAE whose codes are too small, as after an L1 penalty, at the scale of raw data."""
    x, activation = data(), activation or ReLU()
    sae = SAE(D, M, activation, apply_b_dec_to_input=subtract, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_dec.mul_(0.3 + 0.4 * torch.rand(M, 1, generator=torch.Generator().manual_seed(2)))
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc.copy_(torch.linspace(-8, 0, M))
        if sae.threshold is not None:
            sae.threshold.fill_(2.0)
        if activation.name == "gated":
            sae.r_mag.normal_(generator=torch.Generator().manual_seed(3))
            sae.b_mag.normal_(generator=torch.Generator().manual_seed(4))
    return sae


def error(sae, x):
    return (sae(x) - x).square().sum(1).mean().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [ReLU(), TopK(4), BatchTopK(4), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_codes_stay_and_the_error_falls(activation, method):
    """pitfall_177"""
    sae, x = shrunk(activation), data(seed=5)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    tuned = finetune(sae, [data(seed=i) for i in range(10, 40)], method=method, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    torch.testing.assert_close(tuned.encode(x), sae.encode(x), rtol=1e-4, atol=1e-3)
    assert error(tuned, x) < (0.8 if method == "decoder" else 0.98) * error(sae, x)
    assert tuned.metadata["finetuning"]["method"] == method
    assert tuned.apply_b_dec_to_input == (method == "scale")
    if method == "scale":
        assert torch.equal(tuned.encode(x), sae.encode(x))


@pytest.mark.parametrize("subtract", [True, False])
def test_what_moves(subtract):
    """Each method trains its parameters and no others."""
    sae, batches = shrunk(subtract=subtract), [data(seed=i) for i in range(5)]
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    moved = {}
    for method in METHODS:
        tuned = finetune(sae, batches, method=method, lr=1e-2)
        tuned_rows = torch.nn.functional.normalize(tuned.W_dec.detach(), dim=1)
        moved[method] = (
            not torch.allclose(tuned_rows, rows, atol=1e-4),
            not torch.allclose(tuned.W_dec.norm(dim=1), sae.W_dec.norm(dim=1), rtol=1e-3),
            not torch.allclose(tuned.b_dec, sae.b_dec, rtol=1e-4),
        )
    assert moved == {
        "scale": (False, True, False),
        "unrotated_decoder": (False, True, True),
        "decoder": (True, True, True),
    }


def test_without_a_step_of_any_size_nothing_changes():
    sae, x = shrunk(Gated()), data(seed=5)
    tuned = finetune(sae, [data()], lr=1e-12)
    torch.testing.assert_close(tuned(x), sae(x), rtol=1e-4, atol=1e-3)


def test_a_tuned_sae_is_saved_and_loaded(tmp_path):
    x = data(seed=5)
    tuned = finetune(shrunk(TopK(4)), [data(seed=i) for i in range(5)], method="scale")
    tuned.save(tmp_path / "sae")
    torch.testing.assert_close(SAE.load(tmp_path / "sae")(x), tuned(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_dtype_are_trained_in_float32(method):
    x, sae = data(seed=5), shrunk(TopK(4)).bfloat16()
    tuned = finetune(sae, [data(seed=i) for i in range(10, 20)], method=method, lr=1e-2)
    assert (tuned.dtype, sae.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(tuned.encode(x), sae.float().encode(x), rtol=1e-4, atol=1e-3)
    assert error(tuned, x) < error(sae, x)


def test_exactly_as_many_tokens_as_asked_for():
    used = []

    def batches():
        for i in range(10):
            used.append(i)
            yield data(100, i)

    finetune(shrunk(), batches(), tokens=250)
    assert used == [0, 1, 2]
    with pytest.raises(UnweaveError, match="ran out after 100 of 150"):
        finetune(shrunk(), [data(100)], tokens=150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "encoder"}, "unrotated_decoder"),
        ({"batches": []}, "no activations"),
        ({"batches": [torch.randn(5, D), torch.randn(5, D + 1)]}, r"batch 1 .*\(n, 12\)"),
        ({"batches": [torch.randn(5, D), torch.full((5, D), float("nan"))]}, "batch 1 must be finite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(UnweaveError, match=message):
        finetune(shrunk(), **({"batches": [data()]} | arguments))


def test_tokens_that_are_normalised_one_by_one():
    """The SAE goes on normalising; what is trained is the error of normalised tokens."""
    x, sae = data(seed=5), shrunk(TopK(4))
    sae.per_token = "layer_norm"
    tuned = finetune(sae, [data(seed=i) for i in range(10, 40)], lr=1e-2)
    assert tuned.per_token == "layer_norm"
    torch.testing.assert_close(tuned.encode(x), sae.encode(x), rtol=1e-4, atol=1e-3)
    assert error(tuned, x) < 0.8 * error(sae, x)


HOOK = "transformer.h.0"


@pytest.fixture
def begun(tmp_path, tiny_model, texts):
    """A run that fine-tunes the decoder of a trained SAE, which is in a folder."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    first = TrainConfig(
        model="tiny", data=str(tmp_path / "data.jsonl"), hooks=(HOOK,), tokens=2000, batch_size=128,
        saes=(SAEConfig(d_sae=32, activation=JumpReLU(), lr=5e-3),), out=str(tmp_path / "first"),
        text=DataConfig(context=16, held_out=0.2),
    )  # fmt: skip
    train(first, model=tiny_model, progress=False)
    start = Start(str(tmp_path / "first" / "sae"), method="decoder")
    return dataclasses.replace(first, saes=(SAEConfig(),), start=start, tokens=4000, out=str(tmp_path / "run"))


def test_a_run_writes_what_training_writes(begun, tiny_model):
    result = train(begun, model=tiny_model, progress=False)
    out = Path(begun.out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.jsonl", "sae"]
    start, tuned = SAE.load(begun.start.sae), SAE.load(out / "sae")
    x = prepare(begun, tiny_model).held_out()[HOOK]
    torch.testing.assert_close(tuned.encode(x), start.encode(x), rtol=1e-4, atol=1e-4)
    assert error(tuned, x) < error(start, x)
    assert result.history[-1]["tokens"] == 4000
    made = tuned.metadata["finetuning"]
    assert (made["method"], made["tokens"], made["sae"]) == ("decoder", 4000, begun.start.sae)
    assert tuned.metadata["training_tokens"] == 2000
    assert json.loads((out / "config.json").read_text())["saes"][0]["d_sae"] == 32


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_bit_equal(begun, tiny_model, interrupted, method):
    begun = dataclasses.replace(begun, start=dataclasses.replace(begun.start, method=method))
    whole = train(dataclasses.replace(begun, out=begun.out + "-whole"), model=tiny_model, progress=False)
    with interrupted(13, r"after 1,664 of 4,000 tokens.*--resume"):
        train(begun, model=tiny_model, progress=False)
    resumed = train(begun, model=tiny_model, resume=True, progress=False)
    for name, value in whole.saes[0].state_dict().items():
        assert torch.equal(value, resumed.saes[0].state_dict()[name]), name
    assert [row | {"tokens_per_second": 0} for row in whole.history] == [
        row | {"tokens_per_second": 0} for row in resumed.history
    ]


def test_a_cache_will_do_where_the_codes_stay():
    sae = shrunk(TopK(4))
    store = MappedStore("mine", {"here": [data(2000)]}, {}, {"name": "mine"})
    config = TrainConfig(hooks=("here",), tokens=3000, batch_size=100, start=Start(method="scale"))
    (tuned,) = train(config, data=store, start=sae, progress=False).saes
    assert error(tuned, data(seed=5)) < error(sae, data(seed=5))
    narrow = MappedStore("mine", {"here": [torch.ones(300, D + 1)]}, {}, {"name": "mine"})
    with pytest.raises(UnweaveError, match="width 12, and those at 'here' have width 13"):
        train(config, data=narrow, start=sae, progress=False)


@pytest.mark.parametrize(
    ("change", "start", "message"),
    [
        ({"start": Start()}, None, "by one of two"),
        ({"start": Start(method="scale"), "end_to_end": EndToEnd()}, None, "by one of two"),
        ({"start": Start(method="scale", lr=0.0)}, None, "lr must be above 0"),
        ({"start": Start(method="scale"), "tokens": 0}, None, "tokens must be at least 1"),
        ({"start": Start(method="scale")}, None, "which SAE"),
        ({"start": Start("nowhere/at/all", method="scale")}, None, "nowhere/at/all"),
        ({"start": Start(method="scale"), "saes": (SAEConfig(d_sae=64),)}, SAE(16, 8, TopK(2)), "leave out saes"),
        ({"start": Start(method="scale")}, SAE(12, 8, TopK(2)), "width 12, and those at 'transformer.h.0' have width"),
        ({"start": Start(method="scale"), "hooks": ("transformer.h.*",)}, SAE(16, 8, TopK(2)), "its one hook"),
    ],
)  # fmt: skip
def test_what_is_refused_before_any_text_is_read(tiny_model, change, start, message):
    def explode():
        raise AssertionError("text was read")
        yield

    with pytest.raises(UnweaveError, match=message):
        train(TrainConfig(**{"hooks": (HOOK,)} | change), model=tiny_model, data=explode(), start=start)
