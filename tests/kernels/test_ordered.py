"""Sums over a batch: how far its rows are from their mean."""

from __future__ import annotations

import pytest
import torch

from unweave.kernels import spread


def exact(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x - x.mean(0)).square().sum()


@pytest.mark.parametrize("shape", [(2, 1), (3, 15), (256, 17), (257, 33), (1000, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spread(backend, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = spread(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(x), rtol=1e-6, atol=0)


def test_a_mean_far_from_0(backend):
    """A difference of mean squares would leave nothing of it."""
    x = 1000 + torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread(x).double(), exact(x), rtol=1e-4, atol=0)


def test_rows_that_do_not_vary(backend):
    assert spread(torch.ones(1, 20)) == 0
    assert spread(torch.full((64, 20), 0.5)) == 0


def test_any_strides(backend):
    x = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread(x.T[::2]).double(), exact(x.T[::2]), rtol=1e-6, atol=0)
    assert x.T[::2].shape == (40, 60)


def test_what_is_not_finite_stays_so(backend):
    assert spread(torch.tensor([[1.0], [torch.nan]])).isnan()
    assert not spread(torch.tensor([[1.0], [torch.inf]])).isfinite()
