"""Fine-tuning of decoders: codes stay, what is to move moves, and the error falls."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training.finetune import METHODS, finetune

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
    assert not tuned.apply_b_dec_to_input


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


def test_a_tied_encoder_cannot_stay_while_the_decoder_moves():
    from unweave.sae.pursuit import MatchingPursuit

    with pytest.raises(UnweaveError, match="encoder of its own"):
        finetune(SAE(D, M, MatchingPursuit(3)), [data()])
