"""The kernels of a fused step on sparse codes: squared errors with their gradients, and sums by latent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from unweave.kernels import cpu, reference

many = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def entries(counts: list[int], m: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, values and offsets of as many entries in each row or group, at random latents."""
    nnz = sum(counts)
    offsets = pad(torch.tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))
    return torch.randint(0, m, (nnz,), generator=generator), torch.randn(nnz, generator=generator), offsets


@many
@given(data=st.data())
def test_errors_and_gradients_equal_those_in_float64(target, data):
    """Widths around the blocks of columns, empty rows and groups, many entries, with and without a residual."""
    n, p = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    m, d = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 2, 15, 16, 17, 64, 127, 128, 129, 255, 300]))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 70]), min_size=n * p, max_size=n * p))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    indices, values, offsets = entries(counts, m, generator)
    weight, bias, x, scales = (torch.randn(s, generator=generator) for s in ((m, d), (d,), (n, d), (p,)))
    residual = torch.full((n, d), torch.nan) if data.draw(st.booleans()) else None

    found = cpu.squared_error_rows(indices, values, offsets, scales, weight, bias, x, residual)

    exact = (t.double() for t in (scales, weight, bias, x))
    expected = reference.squared_error_rows(indices, values.double(), offsets, *exact)
    for name, got, wanted in zip(found._fields, found, expected, strict=True):
        assert got.shape == wanted.shape, name
        size = 1 + wanted.abs().max().item() if wanted.numel() else 1.0
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-6 * size, msg=name)
    if residual is not None:
        last = reference.gather_sum(indices, values.double(), offsets, weight.double()).view(n, p, d).sum(1) + bias
        size = 1 + last.abs().max().item()
        torch.testing.assert_close(residual.double(), x.double() - last, rtol=0, atol=5e-6 * size)


@many
@given(data=st.data())
def test_sums_by_latent(target, data):
    m, counts = data.draw(st.integers(1, 40)), data.draw(st.lists(st.integers(0, 60), max_size=8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    indices, values, offsets = entries(counts, m, generator)
    found = cpu.sum_by_latent(cpu.transpose(indices, offsets, m), values)
    expected = torch.zeros(m, dtype=torch.float64).index_add_(0, indices, values.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [0, 1, 15, 512, 513, 5000])
def test_halves_are_added_in_fp32(target, n):
    into, halves = torch.randn(n), torch.randn(n).to(torch.bfloat16)
    expected = into + halves.float()
    cpu.add_halves_(into, halves)
    assert torch.equal(into, expected)
