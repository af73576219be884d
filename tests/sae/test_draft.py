"""Drafts: in which precision weights are folded, and what of it is checked."""

from __future__ import annotations

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, JumpReLU
from unweave.sae.draft import Draft, on_meta

D, M = 6, 10


def a_draft(dtype: torch.dtype, *factors: float) -> Draft:
    """One whose decoder is multiplied by some factors, one after another."""
    torch.manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.randn(D),
        "threshold": torch.rand(M),
    }  # fmt: skip
    folds = [lambda sae, factor=factor: sae.W_dec.mul_(factor) for factor in factors]
    sae = on_meta(lambda: SAE(D, M, JumpReLU()))
    return Draft(sae, {name: tensor.to(dtype) for name, tensor in tensors.items()}, "'file'", folds)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_after_they_are_folded(stored: torch.dtype, dtype: torch.dtype) -> None:
    """One rounding, of what the folds make of the stored weights."""
    weights = a_draft(stored).build().W_dec.double()
    sae = a_draft(stored, 1.1, 1 / 3, 0.7).build(dtype=dtype)
    exact = weights * 1.1 / 3 * 0.7
    assert {name: p.dtype for name, p in sae.named_parameters()} == {
        "W_dec": dtype, "W_enc": dtype, "b_enc": dtype, "b_dec": dtype, "threshold": torch.float32
    }  # fmt: skip
    assert sae.W_enc.T.is_contiguous()
    if dtype.itemsize == 2:
        # Half of a unit in the last place, and what float32 loses before it.
        assert ((sae.W_dec.double() - exact).abs() <= exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6)).all()
    else:
        torch.testing.assert_close(sae.W_dec.double(), exact, rtol=1e-6, atol=0)


def test_what_leaves_the_range_is_refused() -> None:
    with pytest.raises(UnweaveError, match="W_dec in 'file' is too large for float16 when it is folded"):
        a_draft(torch.float32, 1e6).build(dtype=torch.float16)
    a_draft(torch.float32, 1e6, 1e-6).build(dtype=torch.float16)  # in between it may
    with pytest.raises(UnweaveError, match="W_dec in 'file' is too large for float32 when it is folded"):
        a_draft(torch.float32, 1e30, 1e30).build()
    large = a_draft(torch.float32)
    large.tensors["b_enc"] = large.tensors["b_enc"] + 1e6
    with pytest.raises(UnweaveError, match=r"b_enc in 'file' holds .* not finite, or too large for float16"):
        large.build(dtype=torch.float16)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_that_is_not_finite_is_named(name: str, dtype: torch.dtype) -> None:
    bad = a_draft(torch.float32)
    bad.stored_names = {name: f"their.{name}"}
    bad.tensors[name].view(-1)[-1] = torch.nan
    with pytest.raises(UnweaveError, match=rf"^their\.{name} in 'file' holds values that are not finite"):
        bad.build(dtype=dtype)
