"""The sparse products against dense ones, in float64, over odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import gather_sum, scatter_outer, sddmm
from unweave.sae import SparseCodes


@st.composite
def sparse_codes(draw):
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 13))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dense = torch.randn(n, m, generator=generator, dtype=torch.float64)
    dense[torch.rand(n, m, generator=generator) >= density] = 0
    return SparseCodes.from_dense(dense), dense, generator


@settings(deadline=None)
@given(sparse_codes(), st.integers(1, 7))
def test_products_equal_dense_ones(case, d):
    codes, dense, generator = case
    weight = torch.randn(codes.d_sae, d, generator=generator, dtype=torch.float64)
    grad = torch.randn(codes.n_rows, d, generator=generator, dtype=torch.float64)

    torch.testing.assert_close(gather_sum(codes.indices, codes.values, codes.offsets, weight), dense @ weight)
    sampled = sddmm(codes.indices, codes.rows, codes.offsets, grad, weight)
    torch.testing.assert_close(sampled, (grad @ weight.T)[codes.rows, codes.indices])
    order, rows, offsets = codes.by_latent
    torch.testing.assert_close(scatter_outer(rows, codes.values[order], offsets, grad), dense.T @ grad)


def test_non_contiguous_weights():
    dense = torch.randn(4, 6, dtype=torch.float64)
    codes = SparseCodes.from_dense(dense)
    weight = torch.randn(3, 6, dtype=torch.float64).T
    torch.testing.assert_close(gather_sum(codes.indices, codes.values, codes.offsets, weight), dense @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_weights(dtype):
    codes = SparseCodes.from_dense(torch.eye(3))
    assert gather_sum(codes.indices, codes.values, codes.offsets, torch.ones(3, 2, dtype=dtype)).dtype == dtype
